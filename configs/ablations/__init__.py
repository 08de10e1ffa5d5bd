"""Ablations: one change to a config, named by the file."""
