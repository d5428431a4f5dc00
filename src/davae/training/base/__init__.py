"""Training of a new base pipeline."""
