"""Reinforcement learning: arrays in, arrays out."""
