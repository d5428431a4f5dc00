"""Reading third-party checkpoint files without executing code from them, and writing tensors."""

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from davae.errors import DavaeError, first_line
from davae.runtime.atomic_files import atomic_file
from davae.runtime.model_files import not_finite

logger = logging.getLogger(__name__)
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of data parallelism and torch.compile


def read_state_dict(path: str | Path, *, entries: Sequence[str] = ("ema", "model", "state_dict")) -> dict[str, Tensor]:
    """Read the state dict of a ``.safetensors`` file, or of a torch file (``.pt``) that holds only tensors.

    Args:
        path: the file.
        entries: names under which a file may nest state dicts; the first one present is read, and logged.

    Returns:
        Tensors by name on the CPU, without the prefixes of data parallelism and torch.compile.

    Raises:
        DavaeError: the file is absent or damaged, is a pickle that would execute code, or has no named tensors where
            they are expected.
    """
    content = _read(Path(path))
    return strip_wrappers(_find_tensors(content, Path(path), entries))


@contextmanager
def about_file(path: str | Path) -> Iterator[None]:
    """Prefix every :class:`DavaeError` in the block with the file's name."""
    try:
        yield
    except DavaeError as error:
        raise DavaeError(f"{path}: {error}") from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Named tensors at the top level of a file of either kind, such as statistics.

    Raises:
        DavaeError: as :func:`read_state_dict`.
    """
    return dict(_find_tensors(_read(Path(path)), Path(path), ()))


def read_finite(path: str | Path) -> dict[str, Tensor]:
    """:func:`read_tensors` of a file that must contain only finite numbers.

    Raises:
        DavaeError: as :func:`read_state_dict`, or a tensor is not finite.
    """
    tensors = read_tensors(path)
    if bad := not_finite(tensors):
        raise DavaeError(f"{path}: {bad[0]} holds numbers that are not finite: download it again")
    return tensors


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DavaeError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            begin = file.read(16)
        if not begin.startswith((b"PK", b"\x80")):
            raise DavaeError(
                f"{path} is no checkpoint: it begins with {begin!r}. A file that begins with '<' is a web page saved "
                "in its place; download the file itself"
            ) from error
        raise DavaeError(
            f"{path} holds more than tensors, and reading it would run code from the file. If you trust its source, "
            "save its weights alone with the program that made it, and convert that file: "
            f'`content = torch.load("{path.name}", weights_only=False); torch.save({{"state_dict": '
            'content["state_dict"]}, "weights.pt")`, with "ema" or "model" if the weights are under that name. '
            f"({first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, SafetensorError) as error:
        raise DavaeError(
            f"{path} cannot be read: it is damaged or not a checkpoint. Download it again. ({first_line(error)})"
        ) from error


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
                others = [str(name) for name in content if name != entry]
                besides = f" (not: {', '.join(others)})" if others else ""
                logger.info("%s: taking the weights under '%s'%s", path.name, entry, besides)
                return _find_tensors(content[entry], path, ())
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
    else:
        found = f"a {type(content).__name__}"
    raise DavaeError(f"{path} holds {found}; expected named tensors, bare or under {', '.join(entries) or 'one name'}")


def atomic_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors, on any device, atomically as a safetensors file, with ``metadata`` in its header."""
    with atomic_file(path) as partial:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata=metadata)
