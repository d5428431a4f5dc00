"""Pictures of an inspection: class maps, spectra, channels, and the contribution of the details."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from davae.evaluation.latent_space.inspect import Inspection
from davae.evaluation.latent_space.spectra import Spectrum
from davae.evaluation.metrics.spectrum import NYQUIST
from davae.report.plots import save_figure
from davae.runtime.atomic_files import atomic_json
from davae.runtime.places import claim

_PARTS = {"base": "base latent", "detail": "detail latent"}
_MADE = {"whole": "reconstruction", "zeroed": "decoder alone", "shuffled": "details shuffled", "base": "base, enlarged"}
_GROUP = re.compile(r"details (of level )?\d+$")
_COLOURS = {"z": "black", "images": "black", "reconstruction": "tab:blue", "without details": "tab:red"}
_COLOURS["added by all details"] = "tab:orange"


def write_inspection(inspections: Mapping[str, Inspection], folder: Path) -> list[Path]:
    """Write the pictures of :func:`draw_inspection`, and all figures to ``inspection.json``; returns the files."""
    with claim(folder, "inspection") as inside:
        drawn = draw_inspection(inspections, inside)
        atomic_json(inside / "inspection.json", {title: found.to_json() for title, found in inspections.items()})
    return [*(folder / file.name for file in drawn), folder / "inspection.json"]


def draw_inspection(inspections: Mapping[str, Inspection], folder: Path) -> list[Path]:
    """Write the pictures, the autoencoders side by side.

    ``map.png`` shows the class maps, ``spectra.png`` and ``channels.png`` the latents, ``details.png`` the contribution
    of the details, ``examples.png`` a few images.

    Args:
        inspections: by title, of the same images.
        folder: created if absent.
    """
    files = []
    for name, figure in (
        ("map", _map(inspections)),
        ("spectra", _spectra(inspections)),
        ("channels", _channels(inspections)),
        ("details", _details(inspections)),
        ("examples", _examples(inspections)),
    ):
        files.append(folder / f"{name}.png")
        save_figure(figure, files[-1], dpi=110)
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
        label = "" if probe is None else f"\nlinear probe {probe:.1%}, chance {found.chance:.1%}"
        axes.set_title(f"{title}: {_PARTS[part]}{label}", fontsize=9)
    return figure


def _spectra(inspections: Mapping[str, Inspection]) -> Figure:
    figure = Figure(figsize=(9, 3.6 * len(inspections)), layout="constrained")
    for row, (title, found) in zip(figure.subplots(len(inspections), 2, squeeze=False), inspections.items()):
        _lines(row[0], found.latent_spectra, f"{title}: latent")
        _lines(row[1], found.image_spectra, f"{title}: image")
    return figure


def _lines(axes: Axes, spectra: Mapping[str, Spectrum], title: str) -> None:
    """One line per signal; those of the detail groups range from dark to light and share a legend entry."""
    groups = [name for name in spectra if _GROUP.search(name)]
    for name, (frequency, power) in spectra.items():
        inside = [(f, p) for f, p in zip(frequency, power) if 0 < f <= NYQUIST]
        if name in groups:
            place = groups.index(name) / max(len(groups) - 1, 1)
            label = f"{name} to {len(groups)}" if name == groups[0] and len(groups) > 1 else None
            axes.plot(*zip(*inside), color=colormaps["viridis"](place), linewidth=0.8, label=label)
        else:
            axes.plot(*zip(*inside), label=name, linewidth=1.6, color=_COLOURS.get(name))
    axes.set_yscale("log")
    axes.set_xlabel("frequency in cycles per sample")
    axes.set_ylabel("power")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _channels(inspections: Mapping[str, Inspection]) -> Figure:
    figure = Figure(figsize=(8, 2.4 * len(inspections)), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(len(inspections), 1, squeeze=False)[:, 0], inspections.items()):
        numbers = np.arange(len(found.channel_mean))
        axes.errorbar(numbers, found.channel_mean, found.channel_std, fmt=".", markersize=4, linewidth=1)
        axes.axvline(found.base_channels - 0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(f"{title}: mean and standard deviation of each channel, base first", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _examples(inspections: Mapping[str, Inspection]) -> Figure:
    rows = [
        (f"{title}\n{_MADE[name]}" if name in _MADE else name, found.examples[name])
        for k, (title, found) in enumerate(inspections.items())
        for name in ("images", *_MADE)
        if name in found.examples and (name != "images" or k == 0)
    ]
    columns = len(rows[0][1])
    figure = Figure(figsize=(1.5 + 1.5 * columns, 1.55 * len(rows)), layout="constrained")
    for line, (label, images) in zip(figure.subplots(len(rows), columns, squeeze=False), rows):
        for axes, image in zip(line, images):
            axes.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(label, fontsize=7)
    return figure


def _details(inspections: Mapping[str, Inspection]) -> Figure:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(inspections)
    for i, (title, found) in enumerate(inspections.items()):
        values = [found.psnr.get(name, np.nan) for name in _MADE]
        bars = axes.bar(np.arange(len(_MADE)) + i * width, values, width, label=title)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(np.arange(len(_MADE)) + 0.4 - width / 2)
    axes.set_xticklabels(_MADE.values())
    axes.set_ylabel("PSNR in dB")
    if len(inspections) > 1:
        axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
