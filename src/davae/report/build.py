"""Building ``report.html``, a self-contained file, from a run directory."""

import html
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from safetensors.torch import load_file
from torch import Tensor

from davae.errors import DavaeError
from davae.recipes.read import flatten
from davae.report import words
from davae.report.plots import COLOURS, SHAPES, loss_plot, scatter_plot, spectrum_plot
from davae.report.recorder import data_uri
from davae.report.schema import TENSOR_FILE, Curve, Figures, Generation, Picture, Summary, usual_run
from davae.report.words import loss_terms, read_metrics, smoothed
from davae.runtime.atomic_files import atomic_write
from davae.training.checkpoints.run_directory import read_config

REPORT_FILE = "report.html"


def build_report(run_dir: Path | str) -> Path:
    """Write the report of a run directory from the files it holds (see ``davae.report.schema``).

    Building again from the same files gives the same bytes.

    Returns:
        Path of ``report.html``.

    Raises:
        DavaeError: a file is missing or invalid; the message names it.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DavaeError(f"there is no run directory {run_dir}")
    summary, figures = Summary.read(run_dir), Figures.read(run_dir)
    tensors = load_file(run_dir / TENSOR_FILE) if (run_dir / TENSOR_FILE).is_file() else {}
    page = _environment().get_template("report.html")
    usual = usual_run(summary.settings)
    usual = None if usual is not None and usual.created == summary.created else usual
    text = page.render(
        summary=summary,
        headline=words.headline(summary),
        change=words.sample_change(summary),
        hardware=words.hardware(summary.hardware),
        usual=words.usual_text(usual),
        classes=words.classes(summary),
        scene=words.scene(summary),
        next_steps=words.next_steps(summary),
        cost=_cost_rows(summary),
        quality=_quality(summary, usual),
        sections=[_section(run_dir, section.model_dump()) for section in figures.sections],
        curves=[_curve(run_dir, i, curve) for i, curve in enumerate(figures.curves)],
        maps=_maps(figures, tensors),
        map_method=figures.map_method,
        map_legend=_legend(figures.classes),
        spectra=_spectra(summary, figures, tensors),
        settings=flatten(summary.settings),
        everything=flatten(summary.model_dump(exclude={"settings", "hardware", "skipped", "command"})),
    )
    path = run_dir / REPORT_FILE
    atomic_write(path, text)
    return path


def _environment() -> Environment:
    folder = files("davae.report")
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.css")}
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=True,  # class names, file names and settings come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        seconds=words.seconds,
        operations=words.operations,
        memory=words.memory,
        times=words.times,
        significant=words.significant,
        value=words.any_value,
    )
    return environment


def _cost_rows(summary: Summary) -> list[dict[str, Any]]:
    """Rows of the cost table; the ratio is native over upgraded, so larger is better."""
    rows = (
        ("Image side", summary.image_size, lambda v: f"{v} px", False),
        ("Tokens per image" if summary.generation else "Latent positions per image", summary.tokens, str, True),
        ("FLOPs per image", summary.flops_per_image, words.operations, True),
        ("Time per image", summary.seconds_per_image, words.seconds, True),
    )
    return [
        {
            "name": name,
            "cells": [show(value) for value in values.model_dump().values() if value is not None],
            "saves": ratio and values.upgraded < values.native,
            "ratio": words.times(values.native / values.upgraded) if ratio and values.upgraded else "",
        }
        for name, values, show, ratio in rows
    ]


_COLUMNS = {
    "base_upscaled": "Base, enlarged",
    "decoder_alone": "Decoder alone",
    "upgraded": "Upgraded",
    "base_native": "Base at full size",
    "reduced": "Image reduced, enlarged",
}
_EQUAL = 3


def _quality(summary: Summary, usual: Summary | None) -> dict[str, Any]:
    """The table of figures: its columns, those that have any, and rows of cells as text.

    The first ``_EQUAL`` columns are this run's at equal tokens, and ``best`` of a row is the best one of them. Further
    ways follow, then the base at full size.
    """
    rebuilt, generated = summary.reconstruction, summary.generation
    others = list(rebuilt.others)
    found: list[tuple[str, list[float | None], Callable[[float], str], str]] = []
    for name, form in (("psnr", "{:.2f} dB"), ("ssim", "{:.3f}")):
        values = [getattr(rebuilt, f"{name}_{kind}") for kind in _COLUMNS]
        values[_EQUAL:_EQUAL] = [rebuilt.others[other].get(name) for other in others]
        values.append(None if usual is None else getattr(usual.reconstruction, f"{name}_upgraded"))
        found.append((f"Reconstruction, {name.upper()}", values, form.format, "higher"))
    if generated is not None:
        sets, size = _levels(generated), summary.image_size.upgraded
        reached = _levels(usual.generation)["upgraded"] if usual is not None and usual.generation is not None else []
        for level in range(len(sets["upgraded"])):
            name = f"Generation, distance at {size // 2**level} px{'' if level else ' (finest)'}"
            further = [generated.swd_levels_others.get(other, ()) for other in others]
            own = [sets.get(kind, ()) for kind in _COLUMNS]
            row = [dict(enumerate(levels)).get(level) for levels in (*own[:_EQUAL], *further, *own[_EQUAL:])]
            row.append(reached[level] if level < len(reached) else None)
            found.append((name, row, words.significant, "lower"))
    kinds = list(_COLUMNS)
    needed = kinds.index("base_upscaled"), kinds.index("upgraded")
    found = [row for row in found if all(row[1][i] is not None for i in needed)]
    titles = [*_COLUMNS.values(), "Usual"]
    titles[_EQUAL:_EQUAL] = [words.capitalised(other) for other in others]
    shown = [i for i in range(len(titles)) if any(values[i] is not None for _, values, _, _ in found)]
    rows = []
    for name, values, text, better in found:
        equal = [value for value in values[:_EQUAL] if value is not None]
        first = max(equal) if better == "higher" else min(equal)
        best = shown.index(values.index(first)) if equal.count(first) == 1 else None
        cells = ["" if (value := values[i]) is None else text(value) for i in shown]
        rows.append({"name": name, "cells": cells, "best": best, "better": better})
    return {"columns": [titles[i] for i in shown], "rows": rows}


def _levels(made: Generation) -> dict[str, list[float]]:
    """Distances by pyramid level, of the columns that have any; the finest alone if not all are known."""
    whole = bool(made.swd_levels_base_upscaled and made.swd_levels_upgraded)
    found = {}
    for kind in list(_COLUMNS)[:_EQUAL]:
        levels, finest = getattr(made, f"swd_levels_{kind}"), getattr(made, f"swd_finest_{kind}")
        found[kind] = levels if whole else [finest]
    return found


def _section(run_dir: Path, section: dict[str, Any]) -> dict[str, Any]:
    """A section with its picture files replaced by data URIs."""

    def embedded(picture: dict[str, Any]) -> dict[str, Any]:
        return Picture(**picture).model_dump() | {"uri": data_uri(run_dir, picture["file"])}

    for row in section["rows"]:
        row["pictures"] = [embedded(p) for p in row["pictures"]]
        row["zooms"] = [embedded(p) for p in row["zooms"]]
    section["columns"] = max((len(row["pictures"]) for row in section["rows"]), default=1)
    return section


def _legend(names: list[str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "colour": i % COLOURS + 1, "shape": SHAPES[i // COLOURS % len(SHAPES)]}
        for i, name in enumerate(names)
    ]


def _curve(run_dir: Path, index: int, curve: Curve) -> dict[str, Any]:
    """One stage's losses; for a stage without a metrics file the page says so."""
    path = run_dir / curve.file
    if not path.is_file():
        return {**curve.model_dump(), "svg": None, "legend": []}
    series = read_metrics(path)
    terms = loss_terms(series) if curve.terms is None else curve.terms
    missing = [term for term in terms if term not in series]
    if missing:
        raise DavaeError(f"{path} logs no {', '.join(missing)}; it has {', '.join(series) or 'nothing'}")
    if not terms:
        return {**curve.model_dump(), "svg": None, "legend": []}
    chosen = {term: series[term] for term in terms[:COLOURS]}
    last = {term: next((v for v in reversed(y) if math.isfinite(v)), math.nan) for term, (_, y) in chosen.items()}
    ends = ", ".join(f"{term} ends at {words.significant(value)}" for term, value in last.items())
    svg = loss_plot(
        f"curve-{index}",
        chosen,
        {term: (steps, smoothed(values)) for term, (steps, values) in chosen.items()},
        description=html.escape(f"Losses of the {curve.title} over the steps: {ends}."),
    )
    legend = [{**entry, "note": words.significant(last[entry["name"]])} for entry in _legend(list(chosen))]
    return {**curve.model_dump(), "svg": Markup(svg), "legend": legend}


@dataclass(frozen=True)
class RunView:
    """What the folder of a training run holds at this moment.

    Attributes:
        step: of the last line of its metrics; 0 without any.
        steps: of the whole run, None if its recipe does not say.
        finished: whether its result is there.
        age: seconds since its metrics were written last; None without any.
        curve: the losses as a drawing and its legend, as in the report; ``svg`` is None with fewer than two lines.
        sheets: files of its pictures of samples or reconstructions, the newest first.
    """

    step: int
    steps: int | None
    finished: bool
    age: float | None
    curve: dict[str, Any]
    sheets: list[Path]


_RESULTS = ("autoencoder", "vae", "pipeline")


def view_run(run: Path) -> RunView:
    """Read a training run, which may be running.

    Raises:
        DavaeError: its metrics are damaged.
    """
    metrics = run / "metrics.jsonl"
    recipe = read_config(run / "config.yaml") or {}
    stage = run.name if run.name in recipe else "diffusion" if "autoencoder_folder" in recipe else "autoencoder"
    section = recipe.get(stage)
    loop = section.get("loop") if isinstance(section, dict) else None
    sheets = {file: int(found[1]) for file in run.glob("samples/*.png") if (found := _SHEET.fullmatch(file.name))}
    last = [steps[-1] for steps, _ in read_metrics(metrics).values()] if metrics.is_file() else []
    return RunView(
        step=max(last, default=0),
        steps=loop.get("steps") if isinstance(loop, dict) else None,
        finished=any((run / name).is_dir() for name in _RESULTS),
        age=time.time() - metrics.stat().st_mtime if metrics.is_file() else None,
        curve=_curve(run, 0, Curve(title=run.name, file=metrics.name)),
        sheets=sorted(sheets, key=lambda file: (-sheets[file], file.name)),
    )


_SHEET = re.compile(r"step-(\d+)(-\w+)?\.png")


def page_colours() -> str:
    """The report's colours as CSS variables, which its drawings take, for light and for dark pages."""
    text = (files("davae.report") / "report.css").read_text(encoding="utf-8")
    return text.partition("\n* {")[0]


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise DavaeError(f"{TENSOR_FILE} holds no {key!r} that figures.json refers to")
    return tensors[key]


def _maps(figures: Figures, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    plots = []
    for i, entry in enumerate(figures.maps):
        points, labels = _tensor(tensors, entry.key), _tensor(tensors, "labels")
        description = f"{figures.map_method} of the {entry.title.lower()}, one point per image. {entry.note}"
        svg = scatter_plot(f"map-{i}", points.numpy(), labels.numpy(), description=html.escape(description))
        plots.append({**entry.model_dump(), "svg": Markup(svg)})
    return plots


def _spectra(summary: Summary, figures: Figures, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    groups: tuple[tuple[Literal["images", "latents"], str, str], ...] = (
        ("images", "Images", "pixel"),
        ("latents", "Latents", "latent cell"),
    )
    plots = []
    for group, title, unit in groups:
        chosen = [spectrum for spectrum in figures.spectra if spectrum.group == group]
        if not chosen:
            continue
        lines = []
        for spectrum in chosen:
            frequency = _tensor(tensors, f"frequency.{spectrum.key}").double()
            power = _tensor(tensors, f"power.{spectrum.key}").double()
            shown = (frequency > 0) & (frequency <= 0.5)
            lines.append((frequency[shown].tolist(), power[shown].tolist()))
        scale = summary.image_size.upgraded / summary.image_size.base
        labels = ", ".join(spectrum.label for spectrum in chosen)
        description = f"Radial power spectra up to half a cycle per {unit}: {labels}."
        svg = spectrum_plot(
            f"spectrum-{group}",
            lines,
            unit=unit,
            mark=0.5 / scale if group == "images" and scale > 1 else None,
            description=html.escape(description),
        )
        legend = _legend([spectrum.label for spectrum in chosen])
        plots.append({"group": group, "title": title, "svg": Markup(svg), "legend": legend})
    return plots
