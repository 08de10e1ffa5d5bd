"""Losses: typed arrays in, a scalar out; no model, no tokenizer, no config."""
