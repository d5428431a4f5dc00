"""Find where channels are in an undescribed transformer by running it: see `probe`."""
