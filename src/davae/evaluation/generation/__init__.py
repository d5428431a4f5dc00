"""Generated images: made, and measured beside their baselines."""
