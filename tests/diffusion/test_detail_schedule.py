from __future__ import annotations

import itertools

import pytest

from davae.diffusion import detail_weight
from davae.errors import DavaeError


@pytest.mark.parametrize(
    ("step", "weight"),
    [
        (0, 0.0),
        (250, (1 - 2**-0.5) / 2),  # (1 - cos 45 deg) / 2
        (500, 0.5),
        (900, 0.9755283),  # (1 + cos 18 deg) / 2
        (1000, 1.0),
        (10**9, 1.0),
    ],
)
def test_equation_12(step: int, weight: float) -> None:
    assert detail_weight(step, 1000) == pytest.approx(weight, abs=1e-7)


def test_two_thirds_of_the_way() -> None:
    assert detail_weight(2, 3) == pytest.approx(0.75)  # (1 - cos 120 deg) / 2
    assert detail_weight(1, 3) == pytest.approx(0.25)


def test_end_weight_start_weight_and_start_step() -> None:
    # Half way from step 200 to 600, between 0.5 and 2.5.
    assert detail_weight(400, 400, 2.5, start_step=200, start_weight=0.5) == pytest.approx(1.5)
    assert detail_weight(200, 400, 2.5, start_step=200, start_weight=0.5) == 0.5
    assert detail_weight(0, 400, 2.5, start_step=200, start_weight=0.5) == 0.5
    assert detail_weight(600, 400, 2.5, start_step=200, start_weight=0.5) == 2.5


def test_shapes() -> None:
    assert detail_weight(25, 100, shape="linear") == 0.25
    assert detail_weight(25, 100, 0.7, shape="constant") == 0.7


def test_rises_without_a_step() -> None:
    weights = [detail_weight(n, 50) for n in range(60)]
    rises = [b - a for a, b in itertools.pairwise(weights)]
    assert min(rises) >= 0
    assert max(rises) < 0.04  # slope at most pi / 2 / 50


def test_no_warm_up() -> None:
    assert detail_weight(0, 0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1, "warmup_steps": 1}, "step must be finite and not negative, got -1"),
        ({"step": 0, "warmup_steps": -5}, "warmup_steps must be finite and not negative, got -5"),
        ({"step": 0, "warmup_steps": 1, "end_weight": float("nan")}, "end_weight must be finite"),
        ({"step": 0, "warmup_steps": 1, "shape": "cosin"}, "'cosin': use cosine, linear or constant"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(DavaeError, match=message):
        detail_weight(**arguments)
