"""Where channels sit in a transformer that nobody described, found by running it: see `probe`."""
