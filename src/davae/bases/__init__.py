"""Bases by name, and what is done with them in one call."""
