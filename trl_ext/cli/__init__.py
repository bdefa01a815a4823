"""The `trl-ext` command: `main.py` finds a command, and each command has a file."""
