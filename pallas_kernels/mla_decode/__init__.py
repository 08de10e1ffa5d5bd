"""Attention of one or two new tokens to a paged latent cache (FlashMLA)."""
