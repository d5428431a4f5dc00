"""Figures that set runs side by side: a metric over steps, and power spectra. PNG for pages, JSON for checking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from davae.errors import DavaeError
from davae.evaluation.metrics.names import current_name
from davae.runtime.atomic_files import atomic_json
from davae.training.checkpoints.run_directory import read_metrics

Line = tuple[list[float], list[float]]


def save_curves(runs: Mapping[str, Path], metric: str, out: Path, *, label: str | None = None) -> dict[str, Line]:
    """Draw one metric of several runs over their steps.

    Args:
        runs: legend to run directory.
        metric: a key of ``metrics.jsonl``, e.g. ``psnr_128``.
        out: the picture, ``.png``; the numbers are written beside it as ``.json``.
        label: of the y axis; the metric's name by default.

    Returns:
        steps and values by legend.

    Raises:
        DavaeError: a run has not logged the metric.
    """
    lines = {name: _curve(folder, metric) for name, folder in runs.items()}
    _save(out, lines, "step", label or metric, log=False)
    return lines


def save_spectra(summaries: Mapping[str, Path], side: int, out: Path, *, images: str = "images") -> dict[str, Line]:
    """Draw the radial power spectra that DC-AE phases leave in ``summary.json``, and that of the images.

    Args:
        summaries: legend to run directory; all measured on the same images.
        side: resolution in pixels.
        out: the picture, ``.png``; the numbers are written beside it as ``.json``.
        images: legend of the images' own spectrum.

    Returns:
        frequency in cycles a pixel (up to 0.5) and power by legend.

    Raises:
        DavaeError: a run has no summary, or was not measured at this resolution.
    """
    lines: dict[str, Line] = {}
    for name, folder in summaries.items():
        file = folder / "summary.json"
        spectra = json.loads(file.read_text()).get("spectra", {}) if file.is_file() else {}
        if str(side) not in spectra:
            raise DavaeError(f"{folder} holds no spectra at {side} px: was the phase trained to its end?")
        found = spectra[str(side)]
        rings = [i for i, f in enumerate(found["frequency"]) if 0 < f <= 0.5]
        frequency = [found["frequency"][i] for i in rings]
        lines.setdefault(images, (frequency, [found["images"][i] for i in rings]))
        lines[name] = (frequency, [found["reconstructions"][i] for i in rings])
    _save(out, lines, "frequency in cycles a pixel", "power", log=True)
    return lines


def _curve(folder: Path, metric: str) -> Line:
    metric = current_name(metric)
    logged = [line for line in read_metrics(folder / "metrics.jsonl") if metric in line]
    if not logged:
        raise DavaeError(f"{folder} has no '{metric}' in its metrics.jsonl")
    return [line["step"] for line in logged], [line[metric] for line in logged]


def _save(out: Path, lines: Mapping[str, Line], x: str, y: str, *, log: bool) -> None:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes: Axes = figure.add_subplot()
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=name, linewidth=1.6, marker="o" if len(xs) <= 30 else None, markersize=3)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140, metadata={"Software": None})
    atomic_json(out.with_suffix(".json"), {"x": x, "y": y, "lines": lines})
