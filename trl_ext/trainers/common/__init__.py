"""What every trainer of reward models uses."""
