"""Batches of a data set: their order, loader processes, and reads that stall."""
