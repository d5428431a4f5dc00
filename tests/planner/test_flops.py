import pytest
import torch
import torch.nn.functional as F
from torch import nn

from davae.benchmark import count_flops

both_ways = pytest.mark.parametrize("fake", [False, True])


@both_ways
def test_linear(fake: bool) -> None:
    layer = nn.Linear(5, 7)
    x = torch.randn(3, 5)
    assert count_flops(lambda: layer(x), fake=fake) == 2 * 3 * 5 * 7


@both_ways
def test_convolution(fake: bool) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 4, 8, 10)
    assert count_flops(lambda: layer(x), fake=fake) == 2 * (2 * 6 * 4 * 5) * (4 // 2 * 3 * 3)


@both_ways
def test_attention(fake: bool) -> None:
    batch, heads, queries, keys, width = 2, 3, 8, 5, 16
    q = torch.randn(batch, heads, queries, width)
    k, v = (torch.randn(batch, heads, keys, width) for _ in range(2))
    expected = 4 * batch * heads * queries * keys * width
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v), fake=fake) == expected


def test_fake_counts_what_would_not_fit_and_leaves_the_model_alone() -> None:
    layer = nn.Linear(8, 8)
    assert count_flops(lambda: layer(torch.empty(10**12, 8)), fake=True) == 2 * 10**12 * 64
    assert type(layer.weight) is nn.Parameter
    assert layer(torch.ones(1, 8)).isfinite().all()
