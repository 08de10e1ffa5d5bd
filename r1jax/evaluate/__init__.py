"""Scores of sampled completions, and how they are shown."""
