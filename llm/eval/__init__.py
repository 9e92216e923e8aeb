"""Scores of models: bits per byte, tasks, CORE, lm-eval, samples."""
