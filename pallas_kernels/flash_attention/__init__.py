"""Attention that never holds all scores."""
