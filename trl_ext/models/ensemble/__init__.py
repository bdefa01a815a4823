"""Many ensemble members on one base: stacked in training, branched where they differ, loaded together."""
