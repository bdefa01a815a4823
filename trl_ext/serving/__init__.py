"""Stock inference servers: requests to them, scores from them, and the command that starts one for a reward model."""
