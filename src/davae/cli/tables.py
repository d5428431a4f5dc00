"""Results as tables and lines of text. This module imports rich; commands import it late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from davae.evaluation.metrics.names import BASE_ENLARGED, DECODER_ALONE
from davae.planner.text import notes, tables
from davae.report.schema import usual_run
from davae.report.words import classes, memory, metric_label, next_steps, seconds, usual_text
from davae.runtime.console import PlainConsole, wide_console

if TYPE_CHECKING:
    from davae.benchmark.autoencoder import AutoencoderBenchmark
    from davae.benchmark.inference import InferenceBenchmark
    from davae.benchmark.training import StepProfile, TrainingBenchmark
    from davae.evaluation.latent_space.inspect import Inspection
    from davae.experiments.compare import AutoencoderScore, Comparison, DiffusionScore
    from davae.planner.plan import Plan
    from davae.report import Summary


def print_plan(plan: Plan) -> None:
    """Print the cost of an image, memory and training hours of a plan, and its assumptions."""
    console = PlainConsole()
    for table in tables(plan):
        console.print(table)
    for line in notes(plan):
        console.print(line)


def print_demo(summary: Summary) -> None:
    """Print the cost and quality of images from a demo, and what to try next."""
    console = PlainConsole()
    made, rebuilt = summary.generation, summary.reconstruction
    ways = [way for way, value in summary.seconds_per_image.model_dump().items() if value is not None]
    table = Table("", *(way.replace("_", " ") for way in ways), title="what an image costs")
    for name, row, scale in (
        ("tokens" if made else "latent positions", summary.tokens, 1),
        ("GFLOP", summary.flops_per_image, 1e-9),
        ("seconds", summary.seconds_per_image, 1),
    ):
        table.add_row(name, *("" if (value := getattr(row, way)) is None else f"{value * scale:.4g}" for way in ways))
    console.print(table)
    others = {BASE_ENLARGED: rebuilt.psnr_base_upscaled, DECODER_ALONE: rebuilt.psnr_decoder_alone}
    others |= {name: figures["psnr"] for name, figures in rebuilt.others.items()}
    others["base at full size"] = rebuilt.psnr_base_native
    beside = [f"{name} {value:.2f} dB" for name, value in others.items() if value is not None]
    lines = [f"reconstruction: {rebuilt.psnr_upgraded:.2f} dB; {'; '.join(beside)}"]
    if made is not None:
        finest = {BASE_ENLARGED: made.swd_finest_base_upscaled, DECODER_ALONE: made.swd_finest_decoder_alone}
        finest |= {name: levels[0] for name, levels in made.swd_levels_others.items()}
        beside = [f"{name} {value:.3f}" for name, value in finest.items() if value is not None]
        lines.append(
            "samples against real images (sliced Wasserstein, finest level, lower is better): "
            f"{made.swd_finest_upgraded:.3f}; {'; '.join(beside)}"
        )
    lines += [
        line for line in (summary.not_generated, classes(summary), usual_text(usual_run(summary.settings))) if line
    ]
    lines.append(f"{seconds(summary.wall_seconds)}, {memory(summary.peak_memory_bytes)} at most")
    lines += [f"next: {text} {command}" for text, command in next_steps(summary)]
    for line in lines:
        console.print(line, soft_wrap=True)


def inference_table(result: InferenceBenchmark) -> Table:
    """An inference benchmark, one row per variant."""
    title = f"{result.base}: {result.device}, {result.dtype}, batch {result.batch}, {result.repeats} rounds"
    table = Table(title=title + (", compiled" if result.compiled else ""))
    whole = any(row.whole_image_seconds is not None for row in result.rows)
    for column in (
        "",
        "pixels",
        "tokens",
        "s / text",
        "s / step",
        "s / decode",
        "s / image",
        *(["s, whole image"] if whole else []),
        "TFLOP",
        "TFLOP/s",
        "memory",
        "speed-up",
        "FLOP-limited",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for row in result.rows:
        operations = row.text_flops + row.steps * row.step_flops + row.decode_flops
        table.add_row(
            row.name,
            str(row.resolution),
            str(row.tokens),
            "no encoders" if row.text_seconds is None else f"{row.text_seconds:.3g}",
            f"{row.step_seconds:.3g}",
            f"{row.decode_seconds:.3g}",
            f"{row.image_seconds:.3g}",
            *([f"{row.whole_image_seconds:.3g}"] if row.whole_image_seconds is not None else []),
            f"{operations / 1e12:.3g}",
            f"{row.achieved_flops / 1e12:.3g}",
            "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.1f} GiB",
            f"{row.speedup if row.whole_image_speedup is None else row.whole_image_speedup:.2f}x",
            f"{row.flop_limited_speedup:.2f}x ({row.share:.0%})",
        )
    return table


def autoencoder_table(result: AutoencoderBenchmark) -> Table:
    """An autoencoder benchmark, one row per autoencoder."""
    table = Table(title=f"{result.base}: {result.device}, {result.dtype}, {result.resolution} px")
    for column in ("", "encode, images/s", "decode, images/s", "decode over base", "decode memory"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.encode_images_per_second:.3g}",
            f"{row.decode_images_per_second:.3g}",
            f"{row.decode_over_base:.2f}x",
            f"{row.decode_memory_bytes / 2**20:.0f} MiB",
        )
    return table


def print_training(console: PlainConsole, result: TrainingBenchmark) -> None:
    """Print a training benchmark, and its profiles if there are any."""
    console.print(training_table(result))
    for name, found in result.profiles.items():
        console.print(profile_table(name, found))


def training_table(result: TrainingBenchmark) -> Table:
    """A training benchmark, one row per stage and form."""
    title = (
        f"{result.base}: {result.device}, {result.resolution} px, batch {result.batch}, "
        f"precision {result.precision}, {result.repeats} rounds"
    )
    table = Table(title=title + (", compiled" if result.compiled else ""))
    for column in ("stage", "form", "s / step", "images/s", "memory", "speed-up", "memory over plain"):
        table.add_column(column, justify="left" if column in ("stage", "form") else "right")
    for row in result.rows:
        table.add_row(
            row.stage,
            row.form,
            f"{row.step_seconds:.3g}",
            f"{row.images_per_second:.3g}",
            f"{row.memory_bytes / 2**20:.0f} MiB",
            f"{row.speedup:.2f}x",
            f"{row.memory_over_plain:.2f}x",
        )
    return table


def profile_table(stage: str, found: StepProfile) -> Table:
    """A profile of a stage's cached form, one row per operator."""
    parts = ", ".join(f"{name} {share:.0%}" for name, share in found.parts.items())
    table = Table(title=f"{stage} step: {parts}")
    for column in ("operator", "ms", "share", "calls"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for line in found.operators:
        table.add_row(line.name, f"{line.seconds * 1e3:.1f}", f"{line.share:.0%}", str(line.calls))
    return table


def comparison_table(result: Comparison) -> Table:
    """A comparison, one column per autoencoder and one row per measurement."""
    table = Table(title=f"{result.images} images of {result.resolution} px, {result.device}")
    table.add_column("")
    for row in result.autoencoders:
        table.add_column(row.name, justify="right")
    lines = {
        "model": [row.kind for row in result.autoencoders],
        "latent": [f"f{row.compression} c{row.channels} p{row.patch}" for row in result.autoencoders],
        "tokens": [str(row.tokens) for row in result.autoencoders],
        "parameters": [f"{row.parameters / 1e6:.1f}M" for row in result.autoencoders],
        **_figure_lines(result.autoencoders, ("psnr", "ssim", "lpips", "swd/finest", "spectrum_db"), "{}"),
        "encode, images/s": [f"{row.encode_images_per_second:.3g}" for row in result.autoencoders],
        "decode, images/s": [f"{row.decode_images_per_second:.3g}" for row in result.autoencoders],
    }
    if result.diffusion:
        lines |= {
            "transformer": [f"{row.parameters / 1e6:.1f}M" for row in result.diffusion],
            "training, images/s": [f"{row.train_images_per_second:.3g}" for row in result.diffusion],
            "  over the first (FLOP-limited)": [
                f"{row.train_speedup:.2f}x ({row.train_flop_limited:.2f}x)" for row in result.diffusion
            ],
            "sampling, images/s": [f"{row.sample_images_per_second:.3g}" for row in result.diffusion],
            "  over the first (FLOP-limited) ": [
                f"{row.sample_speedup:.2f}x ({row.sample_flop_limited:.2f}x)" for row in result.diffusion
            ],
            "loss at the end": [f"{row.loss:.3f}" for row in result.diffusion],
            **_figure_lines(result.diffusion, ("swd/finest",), "{} of samples"),
        }
    lines |= _figure_lines(result.autoencoders, ("fid",), "r{}")
    lines |= _figure_lines(result.diffusion, ("fid", "kid"), "{} of samples")  # KID is unbiased for few samples
    for name, values in lines.items():
        table.add_row(name, *values)
    return table


def _figure_lines(
    rows: Sequence[AutoencoderScore] | Sequence[DiffusionScore], metrics: Sequence[str], form: str
) -> dict[str, list[str]]:
    """Rows of those ``metrics`` that were measured, for all networks; ``form`` formats their names."""
    names = rows[0].figures if rows else ()
    found = [name for metric in metrics for name in names if name == metric or name.startswith(f"{metric}/")]
    labels = {name: metric_label(name).partition(", ") for name in found}
    return {
        form.format(metric) + comma + rest: [f"{row.figures[name]:.3f}" for row in rows]
        for name, (metric, comma, rest) in labels.items()
    }


def print_figures(
    rows: Mapping[str, Mapping[str, float]], unavailable: Mapping[str, str], meanings: Mapping[str, str]
) -> None:
    """Print one row per metric and one column per variant, what each variant is, then what is missing and why."""
    table = Table()
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for metric in dict.fromkeys(metric for figures in rows.values() for metric in figures):
        values = [figures.get(metric) for figures in rows.values()]
        table.add_row(metric, *("-" if value is None else f"{value:.4g}" for value in values))
    console = wide_console()
    console.print(table)
    for name, meaning in meanings.items():
        console.print(f"{name}: {meaning}", soft_wrap=True)
    for name, reason in unavailable.items():
        console.print(f"{name}: not measured. {reason}", soft_wrap=True)


def inspection_table(found: dict[str, Inspection]) -> Table:
    """An inspection, one column per autoencoder."""
    table = Table()
    table.add_column("")
    for title in found:
        table.add_column(title, justify="right")

    def row(name: str, values: list[float | None], form: str) -> None:
        table.add_row(name, *("-" if v is None else format(v, form) for v in values))

    some = list(found.values())
    for kind, label in (
        ("whole", "PSNR, reconstruction"),
        ("zeroed", "PSNR, decoder alone"),
        ("shuffled", "PSNR, details shuffled"),
        ("base", "PSNR, base, enlarged"),
    ):
        row(label, [i.psnr.get(kind) for i in some], ".2f")
    row("alignment error, relative", [i.alignment_error for i in some], ".3f")
    for part in ("base", "detail", "structured"):
        row(f"linear probe, {part}", [i.parts[part].linear_probe for i in some], ".1%")
        row("   its deviation over splits", [i.parts[part].linear_probe_std for i in some], ".1%")
        row(f"nearest neighbours, {part}", [i.parts[part].nearest_neighbours for i in some], ".1%")
    row("chance", [i.chance for i in some], ".1%")
    for part in ("base", "detail"):
        row(f"high-frequency share, {part}", [i.parts[part].high_frequency_share for i in some], ".3f")
        row(f"local - distant similarity, {part}", [i.parts[part].local_distant_similarity for i in some], ".3f")
    row("high-frequency share, images", [i.image_high_frequency_share for i in some], ".3f")
    return table
