"""How fast training, scoring and sampling are, beside TRL's way: one file a case."""
