"""Where channels sit in a transformer that nobody described, found by running it."""

from davae.warm_start.probing.probe import probed_description

__all__ = ["probed_description"]
