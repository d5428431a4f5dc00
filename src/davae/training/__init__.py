"""One training loop on accelerate, and one small file a stage."""
