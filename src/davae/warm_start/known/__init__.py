"""The described transformer classes, a file for each family of forward arguments."""

from davae.warm_start.known import controlnets, packed, plain, tokens, variances  # noqa: F401  describe the classes
