"""Ablations of the method, and comparisons of autoencoders."""
