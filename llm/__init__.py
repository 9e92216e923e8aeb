"""Fathom: train your own ChatGPT from raw text."""

__version__ = "0.1.0"
