"""Batches of a data set: in which order, read by whom, and what happens when reading stops."""
