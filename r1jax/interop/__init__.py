"""Weights of other tools: Hugging Face safetensors in and out."""
