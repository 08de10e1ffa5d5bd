"""Config files: each has a get_config() that returns a ConfigDict."""
