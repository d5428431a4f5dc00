"""Formatting of numbers, and the sentence that summarises a run."""

import math
import re
from pathlib import Path

from davae.errors import DavaeError
from davae.evaluation.metrics.names import current_name
from davae.report.schema import Summary
from davae.runtime.text_files import lines_of, plain_json, read_text

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
    "preview_drift": "drift of previews",
    "alignment_relative": "alignment error, relative",
    "probe": "linear probe",
}
_HIGHER_IS_BETTER = {"psnr", "ssim", "precision", "recall", "inception_score", "clip_score", "probe"}
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def metric_label(name: str) -> str:
    """A readable label of a metric (:mod:`davae.evaluation.metrics.names`): ``FID, NETWORK`` for ``fid/NETWORK``."""
    family, _, network = name.partition("/")
    return _METRICS.get(name) or (f"{_METRICS[family]}, {network}" if family in _METRICS else name)


def better(name: str) -> str:
    """Which way a metric is better: ``higher`` or ``lower``."""
    return "higher" if name.partition("/")[0] in _HIGHER_IS_BETTER else "lower"


def significant(value: float, digits: int = 3) -> str:
    """A number with that many significant digits, without an exponent if it is readable so."""
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


def speed_up(summary: Summary) -> float:
    """Speed-up of the upgraded pipeline over the base at full resolution."""
    return summary.seconds_per_image.native / summary.seconds_per_image.upgraded


def headline(summary: Summary) -> str:
    """One sentence with the run's figures, good or bad."""
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


_BOOKKEEPING = re.compile(
    r"(^|[_/.])(step|epoch|lr|learning_rate|seconds|time|rate|images|samples|norm|weight|memory|eta|psnr|ssim)"
    r"($|[_/.]|_per_)|per_second"
)

Series = dict[str, tuple[list[int], list[float]]]
"""Term to steps and values; values may be NaN where a run logged one."""


def read_metrics(path: Path) -> Series:
    """All numeric terms of a metrics file, each over the steps it was logged at.

    A step that appears twice (in a run that was resumed from a checkpoint) counts once, with its last values.
    A last line without a newline, truncated by a kill, is ignored.

    Raises:
        DavaeError: a line is not a JSON object with a whole-numbered ``step``.
    """
    found: dict[str, dict[int, float]] = {}
    lines = lines_of(read_text(path))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = plain_json(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: still being written
                continue
            raise DavaeError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise DavaeError(f"{path}, line {number} must be an object with a whole-numbered 'step'")
        for term, value in record.items():
            if term != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(current_name(term), {})[record["step"]] = float(value)
    return {term: (sorted(points), [points[s] for s in sorted(points)]) for term, points in found.items()}


def loss_terms(series: Series) -> list[str]:
    """Terms worth a curve: logged at least twice, with two finite values, and not bookkeeping."""
    return [
        term
        for term, (_, values) in series.items()
        if not _BOOKKEEPING.search(term) and sum(map(math.isfinite, values)) >= 2
    ]


def smoothed(values: list[float]) -> list[float]:
    """Mean over a centred window of about a twentieth of the run, narrower at the ends; skips NaN."""
    reach = len(values) // 40
    result = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)  # equal on both sides, which preserves slopes
        window = [v for v in values[i - side : i + side + 1] if math.isfinite(v)]
        result.append(sum(window) / len(window) if window else math.nan)
    return result
