"""Reading other people's checkpoint files without running their code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from davae.errors import DavaeError

_WRAPPERS = ("module.", "_orig_mod.")  # put before every name by data parallelism and by torch.compile


def read_state_dict(
    path: str | Path, *, entries: Sequence[str] = ("ema", "model", "state_dict")
) -> dict[str, Tensor]:
    """Named tensors of a ``.safetensors`` file, or of a torch file (``.pt``) that holds tensors only.

    Args:
        path: the file.
        entries: where a file nests several models under names, the first of these it has is taken.

    Returns:
        Tensors by name on the CPU, without the prefixes of data parallelism and torch.compile.

    Raises:
        DavaeError: no such file, a pickle that would have to run code, or no tensors where they should be.
    """
    path = Path(path)
    if not path.is_file():
        raise DavaeError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return strip_wrappers(load_file(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DavaeError(
            f"{path} holds more than tensors, and reading it would run code from the file. Save its weights "
            f"alone with the program that made it, or as safetensors. ({str(error).splitlines()[0]})"
        ) from error
    return strip_wrappers(_find_tensors(content, path, entries))


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the prefixes of data parallelism and torch.compile."""
    names = {name: name for name in state_dict}
    for original in names:
        while names[original].startswith(_WRAPPERS):
            names[original] = names[original].split(".", 1)[1]
    return {names[original]: tensor for original, tensor in state_dict.items()}


def _find_tensors(content: Any, path: Path, entries: Sequence[str]) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping):
        for entry in entries:
            if isinstance(content.get(entry), Mapping):
                return _find_tensors(content[entry], path, ())
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
    else:
        found = f"a {type(content).__name__}"
    raise DavaeError(
        f"{path} holds {found}; expected named tensors, bare or under {', '.join(entries) or 'one name'}"
    )
