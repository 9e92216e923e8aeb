"""Schemas of the configuration and the table of stages. Nothing heavy is imported here."""
