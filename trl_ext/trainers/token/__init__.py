"""`ORMTrainer`, `PRMTrainer`, `SegmentRewardTrainer`: reward models that score tokens, and what the three share."""
