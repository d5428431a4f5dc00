"""Plots as inline SVG with the page's colours, for light and dark themes.

matplotlib draws with placeholder colours, which are then replaced by CSS variables. Legends are part of the
page, where they wrap, are accessible and are escaped with everything else.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from davae.runtime.atomic_files import atomic_file

COLOURS = 8
"""Distinct series colours, the CSS variables --s1 to --s8."""
SHAPES = ("o", "s", "^")
"""Markers that distinguish classes of the same colour."""

_INK = "#0a0a01"
_LINE = "#0a0a02"
_Point = tuple[Sequence[float], Sequence[float]]


def save_figure(figure: Figure, file: Path, *, dpi: int) -> None:
    """Write a figure atomically, in the format of the file's extension."""
    with atomic_file(file) as partial:
        figure.savefig(partial, format=file.suffix.removeprefix("."), dpi=dpi)


def _series(index: int) -> str:
    return f"#0b00{index % COLOURS:02x}"


@contextmanager
def _axes(name: str, *, square: bool = False) -> Iterator[tuple[Figure, Axes]]:
    """A figure of about 330 units width with quiet axes; ``name`` makes its drawing reproducible."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10.5,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _LINE,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": _LINE,
        "grid.linewidth": 0.7,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 4.0) if square else (4.6, 3.0), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element without size of its own, its ids made unique by ``name``.

    ``description`` must be escaped.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        rf'<svg \1 xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        rf'role="img" aria-label="{description}">',
        text,
        count=1,
    )
    text = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px var(--sans)", text)
    text = text.replace(_INK, "var(--soft)").replace(_LINE, "var(--line)")
    return re.sub(r"#0b00(0[0-7])", lambda m: f"var(--s{int(m[1], 16) + 1})", text)


def _plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def _log_y(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic y axis, labelled with plain numbers and at more than the powers of ten where few fit."""
    axes.set_yscale("log")
    decades = np.log10(values.max() / values.min()) if len(values) else 1
    subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(map(float, range(1, 10)))
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


def loss_plot(name: str, curves: Mapping[str, _Point], smooth: Mapping[str, _Point], *, description: str) -> str:
    """Losses over steps: logged values in pale colours, with smoothed ones on top.

    The y axis is logarithmic unless a value is zero or negative.
    """
    values = np.concatenate([np.asarray(y, dtype=float) for _, y in curves.values()] or [np.ones(1)])
    values = values[np.isfinite(values)]
    with _axes(name) as (figure, axes):
        for i, (term, (steps, logged)) in enumerate(curves.items()):
            axes.plot(steps, logged, color=_series(i), linewidth=0.8, alpha=0.28)
            axes.plot(*smooth[term], color=_series(i), linewidth=1.6)
        if len(values) and values.min() > 0:
            _log_y(axes, values)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.01)
        return _svg(figure, name, description)


def scatter_plot(name: str, points: np.ndarray, labels: np.ndarray, *, description: str) -> str:
    """Points [N, 2] coloured and shaped by label [N]. The axes mean nothing, so none are drawn."""
    with _axes(name, square=True) as (figure, axes):
        for label in np.unique(labels):
            chosen = points[labels == label]
            axes.scatter(
                chosen[:, 0],
                chosen[:, 1],
                s=14,
                color=_series(int(label)),
                marker=SHAPES[int(label) // COLOURS % len(SHAPES)],
                alpha=0.75,
                linewidths=0,
            )
        axes.set_axis_off()
        return _svg(figure, name, description)


def spectrum_plot(name: str, lines: Sequence[_Point], *, unit: str, mark: float | None, description: str) -> str:
    """Power against frequency up to Nyquist, without the mean; ``mark`` draws a dotted upright line."""
    shown = np.concatenate([np.asarray(power, dtype=float) for _, power in lines] or [np.ones(1)])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    with _axes(name) as (figure, axes):
        for i, (frequency, power) in enumerate(lines):
            few = len(frequency) <= 16
            axes.plot(
                frequency,
                power,
                color=_series(i),
                linewidth=1.6,
                marker="o" if few else None,
                markersize=4,
                clip_on=False,
            )
        if mark is not None:
            axes.axvline(mark, color=_INK, linewidth=1, linestyle=(0, (1.5, 2.5)))
        if len(shown):
            _log_y(axes, shown)
        axes.set_xlim(0, 0.5)
        axes.set_xlabel(f"frequency in cycles per {unit}")
        axes.set_ylabel("power")
        return _svg(figure, name, description)
