"""The commands around training (train, cache, export, reconstruct) as functions."""
