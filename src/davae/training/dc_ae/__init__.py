"""Deep compression autoencoders (DC-AE), trained in phases."""
