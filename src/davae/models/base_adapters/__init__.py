"""Adapters to base autoencoders, one for each class."""
