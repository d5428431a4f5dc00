"""The described transformer classes, one file for each kind of forward arguments."""

from davae.warm_start.known import controlnets, packed, plain, tokens, variances  # noqa: F401  describe the classes
