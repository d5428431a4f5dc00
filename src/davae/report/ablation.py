"""Pictures and table of an ablation: the figures of all variants and seeds, and their course over the steps."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from davae.experiments.ablation import Ablation, Spread, ablate
from davae.recipes.settings import AblationRecipe
from davae.report.plots import save_figure
from davae.report.words import better, metric_label, significant

_SHOWN = (
    *("swd/finest", "swd/mean", "spectrum_db", "fid", "kid", "preview_fid", "preview_drift", "autoencoder_psnr"),
    "autoencoder_ssim",
    *("autoencoder_swd/finest", "autoencoder_spectrum_db", "autoencoder_fid", "autoencoder_kid"),
    *("autoencoder_alignment_relative", "autoencoder_probe"),
)
_CURVES = ("psnr", "alignment_relative", "held_out_total", "swd/finest", "preview_drift")


def shown_metrics(result: Ablation) -> dict[str, str]:
    """Labels of the metrics to show, by name: those that some variant has; of other details only their PSNR."""
    known = dict.fromkeys(metric for figures in result.variants.values() for metric in figures)
    names = [m for shown in _SHOWN for m in known if m == shown or m.startswith(f"{shown}/")]
    names = [name for name in names if "/details" not in name or "psnr" in name]
    return {name: f"{_label(name)}\n({better(name.removeprefix('autoencoder_'))} is better)" for name in names}


def _label(name: str) -> str:
    """Of a metric of an ablation: those of the autoencoder as those of images."""
    of_previews = name.removeprefix("preview_")
    if of_previews != name and name != "preview_drift":
        return f"base preview: {metric_label(of_previews)}"
    return metric_label(name.removeprefix("autoencoder_"))


def run_ablation(recipe: AblationRecipe, out: Path) -> Ablation:
    """:func:`davae.experiments.ablation.ablate`, and pictures of its result in ``out``: ``ablation.png`` and, where
    validations measured at several steps, ``curves.png``.
    """
    result = ablate(recipe, out)
    draw_ablation(result, out / "ablation.png")
    draw_curves(result, out / "curves.png")
    return result


def draw_ablation(result: Ablation, file: Path) -> Path:
    """Write one picture: a panel per metric, a row per variant or baseline, dots for seeds and a bar for the mean."""
    rows = result.variants | result.baselines
    shown = shown_metrics(result)
    figure = Figure(figsize=(2.6 * len(shown) + 1.6, 0.45 * len(rows) + 1.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown):
        for row, (name, figures) in enumerate(rows.items()):
            if metric not in figures:
                continue
            spread = figures[metric]
            colour = "C0" if row == 0 else "C1" if name in result.variants else "C2"
            axes.plot([spread.mean] * 2, [row - 0.3, row + 0.3], color=colour, linewidth=2.5)
            axes.scatter(spread.values, [row] * len(spread.values), s=16, color="0.3", alpha=0.7, linewidths=0)
        real = f"\nreal images: {result.real[metric]:.3g}" if metric in result.real else ""
        axes.set_title(shown[metric] + real, fontsize=8)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
    figure.axes[0].invert_yaxis()
    save_figure(figure, file, dpi=120)
    return file


def draw_curves(result: Ablation, file: Path) -> Path | None:
    """Write one picture: a panel per metric, over the steps a line per variant (mean) in a band of its seeds' range.

    Returns None, without a picture, if no metric was measured at two steps.
    """
    curves = {
        metric: {name: found[metric] for name, found in result.curves.items() if len(found.get(metric, ())) > 1}
        for metric in _CURVES
    }
    curves = {metric: lines for metric, lines in curves.items() if lines}
    if not curves:
        return None
    figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
    for axes, (metric, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for name, points in lines.items():
            (drawn,) = axes.plot(list(points), [spread.mean for spread in points.values()], label=name, marker=".")
            low, high = ([f(spread.values) for spread in points.values()] for f in (min, max))
            axes.fill_between(list(points), low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axes.set_title(f"{metric_label(metric)} ({better(metric)} is better)", fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7)
    save_figure(figure, file, dpi=120)
    return file


def ablation_table(result: Ablation) -> Table:
    """Mean and spread of the shown metrics, one row per variant and baseline."""
    seeds = f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"
    samples = f", {result.samples} samples each" if result.real else ""
    table = Table(title=f"mean (standard deviation) over {seeds}{samples}")
    table.add_column("variant")
    shown = shown_metrics(result)
    for label in shown.values():
        table.add_column(label, justify="right")
    for name, figures in (result.variants | result.baselines).items():
        table.add_row(name, *(_cell(figures.get(metric)) for metric in shown))
    if result.real:
        table.add_row("real images", *(significant(result.real[m], 4) if m in result.real else "" for m in shown))
    return table


def _cell(spread: Spread | None) -> str:
    return "" if spread is None else f"{significant(spread.mean, 4)} ({significant(spread.std, 2)})"
