"""Command line: help, checks, composition of the configuration, sweeps."""
