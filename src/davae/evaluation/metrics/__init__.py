"""Metrics: one module each, and the two bundles that everything measures with."""
