"""Deep-compression autoencoders, in phases."""
