"""Experiments over many runs: their table, the comparison of two configurations, scaling laws and the queue."""
