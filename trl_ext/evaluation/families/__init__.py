"""The numbers of each family of rows: preference and ranked, outcome, stepwise, best-of-n, samples of a policy."""
