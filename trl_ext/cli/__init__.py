"""The `trl-ext` command: `main.py` and one file per command."""
