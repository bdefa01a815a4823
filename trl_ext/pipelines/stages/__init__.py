"""What is kept on disk and when it is still valid; how stages run."""
