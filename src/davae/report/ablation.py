"""Picture and table of an ablation: the figures of all variants and seeds."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from davae.experiments.ablation import Ablation, ablate
from davae.recipes.settings import AblationRecipe
from davae.report.plots import save_figure
from davae.report.words import better, metric_label, significant

_SHOWN = ("swd/finest", "swd/mean", "spectrum_db", "fid", "kid", "autoencoder_psnr")


def shown_metrics(result: Ablation) -> dict[str, str]:
    """Labels of the metrics to show, by name, among those that all variants have."""
    first, *others = result.variants.values()
    everywhere = [m for m in first if all(m in figures for figures in others)]
    names = [m for shown in _SHOWN for m in everywhere if m == shown or m.startswith(f"{shown}/")]
    bare = {name: name.removeprefix("autoencoder_") for name in names}
    return {name: f"{metric_label(bare[name])}\n({better(bare[name])} is better)" for name in names}


def run_ablation(recipe: AblationRecipe, out: Path) -> Ablation:
    """:func:`davae.experiments.ablation.ablate`, and the picture ``out/ablation.png`` of its result."""
    result = ablate(recipe, out)
    draw_ablation(result, out / "ablation.png")
    return result


def draw_ablation(result: Ablation, file: Path) -> Path:
    """Write one picture: one panel per metric, one row per variant, dots for the seeds and a bar for their mean."""
    names = list(result.variants)
    shown = shown_metrics(result)
    figure = Figure(figsize=(2.6 * len(shown) + 1.6, 0.45 * len(names) + 1.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown):
        for row, name in enumerate(names):
            spread = result.variants[name][metric]
            axes.plot([spread.mean] * 2, [row - 0.3, row + 0.3], color="C0" if row == 0 else "C1", linewidth=2.5)
            axes.scatter(spread.values, [row] * len(spread.values), s=16, color="0.3", alpha=0.7, linewidths=0)
        real = f"\nreal images: {result.real[metric]:.3g}" if metric in result.real else ""
        axes.set_title(shown[metric] + real, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
    figure.axes[0].invert_yaxis()
    save_figure(figure, file, dpi=120)
    return file


def ablation_table(result: Ablation) -> Table:
    """Mean and spread of the shown metrics, one row per variant."""
    seeds = f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}, {result.samples} samples each"
    table = Table(title=f"mean (standard deviation) over {seeds}")
    table.add_column("variant")
    shown = shown_metrics(result)
    for label in shown.values():
        table.add_column(label, justify="right")
    for name, figures in result.variants.items():
        spreads = (figures[metric] for metric in shown)
        table.add_row(name, *(f"{significant(s.mean, 4)} ({significant(s.std, 2)})" for s in spreads))
    table.add_row("real images", *(significant(result.real[m], 4) if m in result.real else "" for m in shown))
    return table
