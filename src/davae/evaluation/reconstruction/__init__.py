"""Reconstructed images beside their baselines."""
