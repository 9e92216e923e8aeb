"""Rules that turn depth into a training run, and an estimate of its needs on a GPU."""
