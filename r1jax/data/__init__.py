"""Tasks, text, tokens: everything up to a batch; never a model."""
