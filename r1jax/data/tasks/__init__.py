"""Generated tasks: problems with random access and known answers."""
