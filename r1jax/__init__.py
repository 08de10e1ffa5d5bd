"""r1jax: the DeepSeek-R1 system in JAX, from a laptop to a TPU pod."""
