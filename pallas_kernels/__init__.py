"""Kernels, each with its reference; the ground floor: imports jax only."""
