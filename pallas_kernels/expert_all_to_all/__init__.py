"""Spans of rows to the devices of a mesh axis: dispatch and combine."""
