"""The residual blocks against the official ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from davae.models import ResidualDownsample, ResidualUpsample
from tests.conftest import load_case, parity_cases, relative_error

TOLERANCE = 1e-5


def build(name: str, arguments: dict[str, int]) -> nn.Module:
    """Our block for an official class name (…Down… or …Up…) and its arguments."""
    sizes = (arguments["in_channels"], arguments["out_channels"], arguments.get("factor", 2))
    shortcut = bool(arguments["shortcut"])
    if "Down" in name:
        method = "unshuffle" if arguments["downsample"] else "stride"
        return ResidualDownsample(*sizes, method=method, shortcut=shortcut)  # type: ignore[arg-type]
    method = "nearest" if arguments["interpolate"] else "shuffle"
    return ResidualUpsample(*sizes, method=method, shortcut=shortcut)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", parity_cases("blocks"))
def test_blocks(path: Path) -> None:
    case = load_case(path)
    assert case.info["blocks"]
    for row in case.info["blocks"]:
        index = row["index"]
        block = build(row["block"], row["arguments"])
        start = f"{index}.state_dict."
        weights = {k.removeprefix(start): v for k, v in case.tensors.items() if k.startswith(start)}
        block.load_state_dict(weights)
        output = block(case.tensors[f"{index}.input"])
        assert relative_error(output.detach(), case.tensors[f"{index}.output"]) < TOLERANCE, f"block {index}"
