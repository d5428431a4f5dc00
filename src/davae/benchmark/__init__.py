"""What an image costs: operations, seconds, memory."""

from davae.benchmark.flops import count_flops
from davae.benchmark.timing import SideBySide, median_seconds, peak_memory_bytes, side_by_side, synchronise

__all__ = [
    "SideBySide",
    "count_flops",
    "median_seconds",
    "peak_memory_bytes",
    "side_by_side",
    "synchronise",
]
