"""Peak speed and memory of well-known GPUs, and the hours that a number of operations takes on one."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from davae.errors import DavaeError

#: Shares of a GPU's peak that training reaches, where kernels are PyTorch's own. Transformers: the paper's 0.25
#: images/s of SD3.5-medium at 1024 pixels on an A100 are 45 to 55 % of its peak (28 to 30 steps, guidance); a
#: backward with checkpointing stays a little behind. Convolutions at full resolution wait for memory more.
TRANSFORMER_UTILISATION = 0.4
AUTOENCODER_UTILISATION = 0.25


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: short name.
        peak_flops: bfloat16 operations a second with float32 accumulation, dense (without sparsity).
        memory_bytes: of the device.
        source: where the numbers stand.
    """

    name: str
    peak_flops: float
    memory_bytes: int
    source: str


def _gpu(name: str, teraflops: float, gigabytes: int, source: str) -> Gpu:
    return Gpu(name, teraflops * 1e12, gigabytes * 10**9, source)


#: Sparse figures of datasheets are halved.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("B200", 2250, 180, "NVIDIA DGX B200 datasheet: 36 PFLOPS for eight, sparse"),
        _gpu("H200", 989, 141, "NVIDIA H200 datasheet, SXM: 1,979 TFLOPS sparse"),
        _gpu("H100", 989, 80, "NVIDIA H100 datasheet, SXM: 1,979 TFLOPS sparse"),
        _gpu("H100-PCIe", 756, 80, "NVIDIA H100 datasheet, PCIe: 1,513 TFLOPS sparse"),
        _gpu("A100", 312, 80, "NVIDIA A100 datasheet, 80 GB"),
        _gpu("A100-40GB", 312, 40, "NVIDIA A100 datasheet, 40 GB"),
        _gpu("L40S", 362, 48, "NVIDIA L40S datasheet: 733 TFLOPS sparse"),
        _gpu("5090", 209.5, 32, "NVIDIA RTX Blackwell whitepaper, GeForce RTX 5090"),
        _gpu("4090", 165.2, 24, "NVIDIA Ada whitepaper, GeForce RTX 4090"),
        _gpu("3090", 71, 24, "NVIDIA Ampere GA102 whitepaper, GeForce RTX 3090"),
        _gpu("MI300X", 1307, 192, "AMD Instinct MI300X datasheet"),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by name, in any case.

    Raises:
        DavaeError: an unknown name; lists the known ones.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    wanted = name.lower().removeprefix("rtx").strip(" -")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, 1)
    hint = f" (did you mean {known[near[0]].name}?)" if near else ""
    raise DavaeError(f"no GPU '{name}' in the table{hint}; there are {', '.join(GPUS)}")


def hours(flops: float, gpu: Gpu, utilisation: float) -> float:
    """Hours of that many operations on one GPU at a share `utilisation` of its peak.

    Raises:
        DavaeError: a share outside (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise DavaeError(f"utilisation must lie in (0, 1], not {utilisation}")
    return flops / (gpu.peak_flops * utilisation) / 3600
