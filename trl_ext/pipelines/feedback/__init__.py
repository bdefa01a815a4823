"""Where labels come from when there are none: judges, process labels from rollouts, and self-instruct."""
