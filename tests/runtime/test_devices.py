"""Switches of CUDA kernels, which are plain values without a GPU too."""

import pytest
import torch

from davae.runtime.devices import use_gpu_for_training, without_tf32


@pytest.fixture
def switches():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield lambda: (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_training_takes_fast_kernels_and_comparisons_exact_ones(switches):
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = False
    use_gpu_for_training()
    assert switches() == (True, True, True)
    with without_tf32():
        assert switches() == (True, False, False)
    assert switches() == (True, True, True)
