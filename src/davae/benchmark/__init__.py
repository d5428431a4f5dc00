"""Cost of an image and of a training step: FLOPs, seconds, memory."""

from davae.benchmark.timing import SideBySide, peak_memory_bytes, side_by_side
from davae.planner.memory import count_flops

__all__ = ["SideBySide", "count_flops", "peak_memory_bytes", "side_by_side"]
