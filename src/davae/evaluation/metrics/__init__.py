"""Metrics, one module each, and two bundles of them, for pairs and for sets of images."""
