"""Rules that turn depth into a training run, and what it needs on a GPU."""
