"""Reading ``metrics.jsonl``: one JSON object a logged step, of which any may hold other terms."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from davae.errors import DavaeError
from davae.evaluation.metrics.names import current_name

_BOOKKEEPING = re.compile(
    r"(^|[_/.])(step|epoch|lr|learning_rate|seconds|time|rate|images|samples|norm|weight|memory|eta|psnr|ssim)"
    r"($|[_/.]|_per_)|per_second"
)

Series = dict[str, tuple[list[int], list[float]]]
"""Term to steps and values; values may be NaN where a run logged one."""


def read_metrics(path: Path) -> Series:
    """All numeric terms of a metrics file, each over the steps it was logged at.

    A step that appears twice (a run that was stopped and went on from a checkpoint) counts once, with what
    was written last. A last line without its newline, cut short by a kill, is left out.

    Raises:
        DavaeError: a line is not a JSON object with a whole-numbered ``step``.
    """
    found: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
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
        side = min(reach, i, len(values) - 1 - i)  # the same on both sides, so that a slope is kept
        window = [v for v in values[i - side : i + side + 1] if math.isfinite(v)]
        result.append(sum(window) / len(window) if window else math.nan)
    return result
