"""What an evaluation found, judged and shown: verdicts, files, pictures, the HTML page, W&B tables."""
