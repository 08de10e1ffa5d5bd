"""Meshes and shardings: the only package that writes a PartitionSpec."""
