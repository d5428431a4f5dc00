"""Every test draws from the same seed; where tests find reference tensors and real images, or skip without them."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

torch.set_num_threads(1)  # as in child processes: sums are made in the same order

_SHARED = Path(__file__).resolve().parents[2] / "shared"
PARITY_DIR = Path(os.environ.get("DAVAE_PARITY_DIR", _SHARED / "parity"))
TEST_DATA = Path(os.environ.get("DAVAE_TEST_DATA", _SHARED / "data"))
TEST_WEIGHTS = Path(os.environ.get("DAVAE_TEST_WEIGHTS", _SHARED / "weights"))


def _seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


def _drawn() -> bool:
    """Whether torch's or numpy's global generator has moved; libraries draw from ``random`` as they are imported."""
    found = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    _seed_everything()
    fresh = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    return not (torch.equal(found[0], fresh[0]) and all(map(np.array_equal, found[1], fresh[1])))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers alone, in another order and on another worker."""
    _seed_everything()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Generator[None, Any, Any]:
    """A fixture that several tests share draws from its own seed, whichever of them sets it up."""
    if fixturedef.scope == "function":
        return (yield)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    _seed_everything()
    try:
        return (yield)
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A module that draws from a global generator while it is imported is an error: its order would decide."""
    _seed_everything()
    report = yield
    if isinstance(collector, pytest.Module) and report.passed and _drawn():
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} draws when it is imported; hand a seeded generator to what draws"
    return report


@dataclass(frozen=True)
class ParityCase:
    """One reference case: its JSON description and its tensors."""

    name: str
    info: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The official weights below ``state_dict.<prefix>``, without that prefix."""
        start = f"state_dict.{prefix}"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def parity_cases(fixture: str, having: str | None = None) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``: every case of a fixture, or one that skips and says why.

    ``having`` keeps the cases that hold a tensor of that name, or a scalar or configuration key.
    """
    paths = sorted((PARITY_DIR / fixture).glob("*.json"))
    chosen = []
    for path in paths:
        info = json.loads(path.read_text())
        known = {*info["tensors"], *info.get("scalars", {}), *info.get("config", {})}
        if having is None or having in known:
            chosen.append(pytest.param(path, id=path.stem))
    if not chosen:
        reason = f"no reference tensors '{fixture}' under {PARITY_DIR}; set DAVAE_PARITY_DIR to use them"
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]
    return chosen


def load_case(path: Path) -> ParityCase:
    """Read a case that :func:`parity_cases` found."""
    return ParityCase(path.stem, json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``max|a - b| / max|b|``, the measure in which the reference tolerances are stated."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)}, {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-300))


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real images (photographs and a class-labelled set)."""
    if not TEST_DATA.is_dir():
        pytest.skip(f"no real images under {TEST_DATA}; set DAVAE_TEST_DATA to use them")
    return TEST_DATA


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """The folder of real pretrained autoencoders, in diffusers format."""
    if not TEST_WEIGHTS.is_dir():
        pytest.skip(f"no real weights under {TEST_WEIGHTS}; set DAVAE_TEST_WEIGHTS to use them")
    return TEST_WEIGHTS


@contextmanager
def small_tmpfs(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of so many megabytes, mounted at the new ``folder``; skips where tests may not mount one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a traceback may hold a file open
