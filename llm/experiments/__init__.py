"""Experiments over many runs: scaling laws. Starts runs as processes of train.py."""
