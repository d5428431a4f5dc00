"""Where the tests find reference tensors and real images, and what happens where there are none."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

_SHARED = Path(__file__).resolve().parents[2] / "shared"
PARITY_DIR = Path(os.environ.get("DAVAE_PARITY_DIR", _SHARED / "parity"))
TEST_DATA = Path(os.environ.get("DAVAE_TEST_DATA", _SHARED / "data"))


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
