"""Switches of CUDA kernels, which are plain values without a GPU too, and what a processor computes fast."""

import pytest
import torch

from davae.runtime.devices import computes_bfloat16, use_gpu_for_training, without_tf32


@pytest.fixture
def switches():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield lambda: (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_bfloat16_is_for_processors_that_multiply_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for found, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert computes_bfloat16() == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not computes_bfloat16()


def test_training_takes_fast_kernels_and_comparisons_exact_ones(switches):
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = False
    use_gpu_for_training()
    assert switches() == (True, True, True)
    with without_tf32():
        assert switches() == (True, False, False)
    assert switches() == (True, True, True)
