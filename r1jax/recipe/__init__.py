"""The stages of R1, and what passes between them."""
