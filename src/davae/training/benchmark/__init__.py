"""What a step of each training stage costs, beside the plain form of the same step."""

from davae.training.benchmark.profile import StepProfile, profile_step
from davae.training.benchmark.side_by_side import TrainingBenchmark, TrainingRow, bench_training

__all__ = ["StepProfile", "TrainingBenchmark", "TrainingRow", "bench_training", "profile_step"]
