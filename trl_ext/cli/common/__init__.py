"""What the commands share: options, logs, and the steps of commands that train, sample or score."""
