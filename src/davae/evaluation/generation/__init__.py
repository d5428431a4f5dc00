"""Generating images, and measuring them beside their baselines."""
