"""A process's draws are its rows of the draws that one process would make for the whole batch."""

import pytest
import torch

from davae.training.loop.rng import RankInvariantDraws

DRAWS = [
    lambda n: torch.randn(n, 3),
    lambda n: torch.randn((n, 3), dtype=torch.float64),
    lambda n: torch.randn(size=(n, 3)),
    lambda n: torch.rand(n),
    lambda n: torch.randn_like(torch.zeros(n, 2, 2)),
    lambda n: torch.rand_like(torch.zeros(n, 2)),
    lambda n: torch.randint(7, (n,)),
    lambda n: torch.randint(3, 9, (n, 2)),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_rows_of_two_processes_are_the_whole_batch(draw):
    torch.manual_seed(0)
    whole = [draw(8), draw(8)]
    parts = []
    for rank in range(2):
        torch.manual_seed(0)
        with RankInvariantDraws(rank, 2, 4):
            parts.append([draw(4), draw(4)])
    for i in range(2):
        assert torch.equal(torch.cat([parts[0][i], parts[1][i]]), whole[i])


def test_other_draws_are_left_alone():
    with RankInvariantDraws(1, 2, 4):
        torch.manual_seed(0)
        inside = torch.randn(5, 2), torch.randn(4, generator=torch.Generator().manual_seed(1)), torch.zeros(4)
    torch.manual_seed(0)
    outside = torch.randn(5, 2), torch.randn(4, generator=torch.Generator().manual_seed(1)), torch.zeros(4)
    for a, b in zip(inside, outside):
        assert torch.equal(a, b)
