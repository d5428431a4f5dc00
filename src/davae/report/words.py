"""Numbers as a person reads them, and the sentence that says what happened."""

from __future__ import annotations

import math
from collections.abc import Mapping

from davae.report.schema import Summary

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_METRICS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "dino": "DINO distance",
    "swd/finest": "SWD, finest level",
    "swd/mean": "SWD, mean of levels",
    "spectrum_db": "spectral distance, dB",
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception Score",
    "clip_score": "CLIP score",
}
_HIGHER_IS_BETTER = {"psnr", "ssim", "precision", "recall", "inception_score", "clip_score"}
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def metric_label(name: str) -> str:
    """A metric for people (:mod:`davae.evaluation.metrics.names`): ``fid/NETWORK`` as ``FID, NETWORK``."""
    family, _, network = name.partition("/")
    return _METRICS.get(name) or (f"{_METRICS[family]}, {network}" if family in _METRICS else name)


def better(name: str) -> str:
    """Which way a metric is better: ``higher`` or ``lower``."""
    return "higher" if name.partition("/")[0] in _HIGHER_IS_BETTER else "lower"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it stays readable."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent <= 6:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}\u202f×\u202f10{str(int(power)).translate(_RAISED)}"
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def seconds(value: float) -> str:
    """A duration: ms under a second, minutes from two minutes on."""
    if value < 1:
        return f"{significant(value * 1000)} ms"
    if value < 120:
        return f"{significant(value)} s"
    whole = round(value)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def operations(value: float) -> str:
    """A count with a decimal prefix: ``46.0 G``."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{significant(value / size)} {prefix}"
    return significant(value)


def memory(value: float) -> str:
    """Bytes as MB or GB (powers of ten)."""
    return f"{significant(value / 1e9)} GB" if value >= 1e9 else f"{significant(value / 1e6)} MB"


def times(value: float) -> str:
    """A ratio."""
    return f"{significant(value, 2 if value < 10 else 3)}×"


def any_value(value: object) -> str:
    """A setting or figure of unknown kind."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if 1e-4 <= abs(value) < 1e7 else significant(value)
    if isinstance(value, list):
        return ", ".join(any_value(v) for v in value) or "none"
    return str(value)


def flatten(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Nested mappings as rows with dotted names."""
    rows: list[tuple[str, object]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def speed_up(summary: Summary) -> float:
    """How many times as fast the upgraded pipeline is as the base at full resolution."""
    return summary.seconds_per_image.native / summary.seconds_per_image.upgraded


def headline(summary: Summary) -> str:
    """One sentence with the run's own numbers, whichever way they came out."""
    size, tokens = summary.image_size.upgraded, summary.tokens
    ratio = speed_up(summary)
    pace = (
        f"{significant(ratio, 2)} times as fast as the base model does"
        if ratio >= 1
        else f"{significant(1 / ratio, 2)} times more slowly than the base model does"
    )
    gain = summary.reconstruction.psnr_upgraded - summary.reconstruction.psnr_base_upscaled
    nearer = "closer to" if gain >= 0 else "farther from"
    return (
        f"The upgraded pipeline makes {size} × {size} pixel images from {tokens.upgraded} tokens instead of "
        f"{tokens.native}, {pace}, and rebuilds held-out images {abs(gain):.1f} dB {nearer} the original "
        f"than upscaling the base."
    )
