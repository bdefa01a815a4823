"""`DenseGRPOTrainer`: policies trained with rewards of tokens, steps and segments."""
