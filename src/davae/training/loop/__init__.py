"""The training loop, one for every stage."""
