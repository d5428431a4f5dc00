"""The device and precision that models run in, checked before anything is loaded."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from davae.errors import DavaeError
from davae.runtime.model_files import variant_of

Result = TypeVar("Result")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions accepted on the command line."""
_SAVED_AS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def chosen_device(device: str | None) -> str:
    """The requested device; by default ``cuda`` if available, else ``cpu``.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``None`` for the default.

    Raises:
        DavaeError: the name is unknown, or this machine has no such device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise DavaeError(f"device '{device}' (--device): there is none of that name; {_GIVE}") from error
    if asked.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (asked.index or 0) >= found:
            seen = f"torch {torch.__version__} finds {found or 'no'} GPU{'s' * (found > 1)} on this machine"
            raise DavaeError(f"device '{device}' (--device): {seen}; {_GIVE}")
    elif asked.type == "mps":
        if not torch.backends.mps.is_available():
            raise DavaeError(f"device '{device}' (--device): this machine has no such GPU; {_GIVE}")
    elif asked.type != "cpu":
        raise DavaeError(f"device '{device}' (--device): davae does not run on it; {_GIVE}")
    return device


_GIVE = "give cpu, or cuda where there is a GPU, or leave it out"


def named_dtype(name: str) -> torch.dtype:
    """The dtype called ``name`` on the command line.

    Raises:
        DavaeError: the name is not in :data:`DTYPES`.
    """
    if name not in DTYPES:
        raise DavaeError(f"dtype must be {', '.join(DTYPES)}, not '{name}' (--dtype)")
    return DTYPES[name]


def saved_dtype(folder: str | Path, *, variant: str | None = None) -> torch.dtype:
    """The dtype of most elements in a model's saved weights; float32 if no readable header tells.

    Args:
        folder: the model's folder with its ``.safetensors`` files.
        variant: of the files to look at, by default those without one; all files if the folder has none of these.
    """
    numbers = dict.fromkeys(_SAVED_AS, 0)
    files = list(Path(folder).glob("*.safetensors"))
    for file in [file for file in files if variant_of(file.name) == variant] or files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # no mapping
                    part = opened.get_slice(key)
                    if part.get_dtype() in numbers:
                        numbers[part.get_dtype()] += torch.Size(part.get_shape()).numel()
        except SafetensorError:  # damaged: loading the model reports it
            continue
    return _SAVED_AS[max(numbers, key=numbers.__getitem__)] if any(numbers.values()) else torch.float32


def wanted_dtype(name: str | None) -> torch.dtype | Literal["saved"]:
    """The requested dtype; by default ``"saved"``, that of the weights' files.

    Args:
        name: ``float32``, ``bfloat16``, ``float16``, or ``None`` for the default.

    Raises:
        DavaeError: an unknown name.
    """
    return "saved" if name is None else named_dtype(name)


def computes_bfloat16() -> bool:
    """Whether this machine's GPU, else its CPU, multiplies bfloat16 matrices in hardware: elsewhere it is no faster."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.11
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def synchronise() -> None:
    """Wait until the accelerator, if there is one, has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """The result of a call, and its seconds until the accelerator has finished its work."""
    synchronise()
    start = time.perf_counter()
    result = call()
    synchronise()
    return result, time.perf_counter() - start


def use_gpu_for_training() -> None:
    """Let CUDA kernels be chosen for training; without a GPU the switches have no effect."""
    # Images of a training have one size, or a few (buckets): each is tried once, then cuDNN's fastest kernel is used.
    torch.backends.cudnn.benchmark = True
    # Products of float32 matrices then use tensor cores, as convolutions do by torch's default. Training noise is far
    # above the rounding to 10 bits; sums stay float32, and autocast's products have 7 bits.
    torch.backends.cuda.matmul.allow_tf32 = True


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context in which CUDA multiplies float32 numbers in float32, for comparisons of results."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        # cuDNN would choose TF32 for some channel counts and not for others.
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before
