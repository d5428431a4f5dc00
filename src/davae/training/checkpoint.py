"""Checkpoints: everything a run needs to go on exactly, in safetensors and JSON.

A checkpoint is a folder ``checkpoints/step-N`` with one ``<name>.safetensors`` for each part (weights,
averages, optimizer moments, random state) and ``state.json`` for the plain values. It is written under a
temporary name, flushed to disk and then renamed, so a folder named ``step-N`` is always whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from davae.errors import DavaeError

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any], *, keep: int
) -> Path:
    """Write ``folder/step-<step>`` and remove all but the newest ``keep`` checkpoints.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: optimizer steps done.
        tensors: file name (without suffix) to named tensors.
        values: everything else, as JSON.
        keep: how many checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, named in tensors.items():
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in named.items()}, partial / f"{name}.safetensors"
        )
    (partial / "state.json").write_text(json.dumps({"step": step, **values}))
    for file in partial.iterdir():
        _flush(file)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote: tensors by file name, and the plain values.

    Raises:
        DavaeError: a file is missing or damaged.
    """
    try:
        values = json.loads((path / "state.json").read_text())
        tensors = {p.stem: load_file(p) for p in sorted(path.glob("*.safetensors"))}
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise DavaeError(
            f"checkpoint {path} cannot be read ({error}); remove it to use the one before"
        ) from error
    return tensors, values


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that training changes: trained parameters and buffers."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    buffers = {n: b for n, b in module.state_dict().items() if n not in trained and n not in frozen}
    return {**trained, **buffers}


@torch.no_grad()
def restore_module(module: nn.Module, saved: dict[str, Tensor], where: Path) -> None:
    """Copy saved tensors into a module; both must hold exactly the same names and shapes."""
    current = module_tensors(module)
    if current.keys() != saved.keys():
        differing = sorted(current.keys() ^ saved.keys())
        raise DavaeError(
            f"checkpoint {where} holds other weights than this run trains: "
            f"{len(differing)} names differ, first '{differing[0]}'"
        )
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape:
            raise DavaeError(
                f"checkpoint {where}: '{name}' has shape {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments as ``<parameter index>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Put moments written by :func:`optimizer_tensors` back.

    Files hold contiguous tensors. Moments get the memory order of their parameter again, as fused optimizers
    expect: a channels-last weight with contiguous moments would be updated wrongly.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flush(path: Path) -> None:
    """Ask the operating system to put a file, or a folder's entries, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
