"""Attention of MLA for training and prefill, as TPU kernels."""
