"""`RewardTrainer`: reward models from pairs and K-way rankings."""
