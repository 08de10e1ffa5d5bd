"""The transformer: pure functions, and linen modules that hold parameters."""
