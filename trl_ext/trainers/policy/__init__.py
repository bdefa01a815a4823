"""`DenseGRPOTrainer`: trains a policy with rewards of tokens, steps and segments."""
