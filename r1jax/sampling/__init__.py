"""Sampling from the one model that is trained."""
