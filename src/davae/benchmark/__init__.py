"""What an image costs: operations, seconds, memory."""

from davae.benchmark.flops import count_flops
from davae.benchmark.timing import SideBySide, peak_memory_bytes, side_by_side

__all__ = ["SideBySide", "count_flops", "peak_memory_bytes", "side_by_side"]
