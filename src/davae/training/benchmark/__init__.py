"""What a step of each training stage costs, beside the plain form of the same step."""

from davae.training.benchmark.profile import StepProfile, profile_step
from davae.training.benchmark.side_by_side import TrainingBenchmark, bench_training

__all__ = ["StepProfile", "TrainingBenchmark", "bench_training", "profile_step"]
