"""Names of metrics, one per quantity, and of the ways to an image, one per way, wherever they are written or shown.

* means over pairs of images: ``psnr``, ``ssim``, ``lpips``, ``dino`` (see :mod:`davae.evaluation.metrics.psnr_ssim`);
* between two sets of images (see :mod:`davae.evaluation.metrics.image_set`): ``swd/finest``, ``swd/levelN``,
  ``swd/mean``, ``spectrum_db``, of reconstructions ``spectral_gain/octaveN`` (octave 0 ends at Nyquist), and of each
  feature network ``fid/NETWORK``, ``kid/NETWORK``, ``kid_std/NETWORK``, ``precision/NETWORK``, ``recall/NETWORK``,
  ``inception_score/NETWORK``, ``inception_score_std/NETWORK``;
* between images and their texts: ``clip_score``.

A training that measures at several resolutions appends the side: ``psnr_128``.

Tables have a row or column for each way: ``upgraded`` is the autoencoder, or the pipeline over it; ``decoder alone``
its joint decoder on the base latent, without details; ``base, enlarged`` the base's image at base resolution,
enlarged bicubically; ``shipped upgrade`` the one that comes with davae, beside a demo's own; these have equal tokens.
``base, native`` is the base at full resolution, with more.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

PSNR, SSIM, LPIPS, DINO = "psnr", "ssim", "lpips", "dino"
SWD_FINEST, SWD_MEAN, SPECTRUM_DB, CLIP_SCORE = "swd/finest", "swd/mean", "spectrum_db", "clip_score"
SPECTRAL_GAIN = "spectral_gain"
UPGRADED, DECODER_ALONE, SHIPPED = "upgraded", "decoder alone", "shipped upgrade"
BASE_ENLARGED, BASE_NATIVE, REDUCED = OF_BASE = "base, enlarged", "base, native", "image, reduced"

_EARLIER = {
    "swd": SWD_FINEST,
    "spectral_distance": SPECTRUM_DB,
    "swd_upgraded": "swd_finest_upgraded",
    "swd_base_upscaled": "swd_finest_base_upscaled",
    "swd_real": "swd_finest_real",
}
"""Names in ``metrics.jsonl``, recipes and summaries of earlier runs. (In the JSON of earlier evaluations, which is not
read, ``swd`` is ``swd/mean``; in that of ablations ``frechet`` is ``fid`` and ``kernel`` is 1000 ``kid``.)"""
_EARLIER_WAYS = {"base, upscaled": BASE_ENLARGED, "details zeroed": DECODER_ALONE}
_SIDE = re.compile(r"_\d+$")
Value = TypeVar("Value")


def current_name(name: str) -> str:
    """The current name of a metric in a file of an earlier run; other names are unchanged."""
    stem, side = _SIDE.sub("", name), _SIDE.search(name)
    return _EARLIER.get(stem, stem) + ("" if side is None else side[0])


def current_way(name: str) -> str:
    """The current name of a way to an image in a file of an earlier run; other names are unchanged."""
    return _EARLIER_WAYS.get(name, name)


def alone(name: str) -> str:
    """The name of the joint decoder without details of the autoencoder, or pipeline, called ``name``."""
    return DECODER_ALONE if name == UPGRADED else f"{name}, {DECODER_ALONE}"


def current_names(figures: Mapping[str, Value]) -> dict[str, Value]:
    """Figures under their current names."""
    return {current_name(name): value for name, value in figures.items()}
