"""Pictures of an inspection: where images lie, spectra, and what the details are worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from davae.evaluation.inspection import Inspection

_PARTS = {"base": "base latent", "detail": "detail latent"}


def draw_inspection(inspections: Mapping[str, Inspection], folder: Path) -> list[Path]:
    """Write ``map.png``, ``spectra.png`` and ``details.png``, the autoencoders side by side.

    Args:
        inspections: title to inspection, one or two of the same images.
        folder: made where absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in (
        ("map", _map(inspections)),
        ("spectra", _spectra(inspections)),
        ("details", _details(inspections)),
    ):
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=110)
    return files


def _map(inspections: Mapping[str, Inspection]) -> Figure:
    columns = [(title, part) for title in inspections for part in _PARTS]
    figure = Figure(figsize=(3.4 * len(columns), 3.7), layout="constrained")
    for axes, (title, part) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        found = inspections[title]
        points, labels = np.array(found.parts[part].projection), np.array(found.labels)
        axes.scatter(points[:, 0], points[:, 1], c=labels, cmap="tab20", s=12, linewidths=0, alpha=0.8)
        axes.set_axis_off()
        probe = found.parts[part].linear_probe
        told = "" if probe is None else f"\nlinear probe {probe:.0%}, chance {found.chance:.0%}"
        axes.set_title(f"{title}: {_PARTS[part]}{told}", fontsize=9)
    return figure


def _spectra(inspections: Mapping[str, Inspection]) -> Figure:
    figure = Figure(figsize=(8, 3.4 * len(inspections)), layout="constrained")
    for row, (title, found) in zip(figure.subplots(len(inspections), 2, squeeze=False), inspections.items()):
        _lines(row[0], found, f"{title}: latent", lambda name: name == "z" or name.startswith("details"))
        _lines(
            row[1], found, f"{title}: pixels", lambda name: not (name == "z" or name.startswith("details"))
        )
    return figure


def _lines(axes: Axes, found: Inspection, title: str, chosen: object) -> None:
    for name, (frequency, power) in found.spectra.items():
        if chosen(name):  # type: ignore[operator]
            inside = [(f, p) for f, p in zip(frequency, power) if 0 < f <= 0.5]
            axes.plot(*zip(*inside), label=name, linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlabel("frequency in cycles a sample")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _details(inspections: Mapping[str, Inspection]) -> Figure:
    names = ["whole", "zeroed", "shuffled", "base"]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(inspections)
    for i, (title, found) in enumerate(inspections.items()):
        values = [found.psnr.get(name, np.nan) for name in names]
        bars = axes.bar(np.arange(len(names)) + i * width, values, width, label=title)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(np.arange(len(names)) + 0.4 - width / 2)
    axes.set_xticklabels(["reconstruction", "details zeroed", "details shuffled", "base enlarged"])
    axes.set_ylabel("PSNR in dB")
    if len(inspections) > 1:
        axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
