"""Formatting of numbers, and the sentence that summarises a run."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from davae.errors import DavaeError, first_names
from davae.evaluation.metrics.names import SHIPPED, current_name
from davae.report.schema import Summary
from davae.runtime.package_files import TINY
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


def capitalised(name: str) -> str:
    """With a large first letter, the others as they are."""
    return name[:1].upper() + name[1:]


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


def headline(summary: Summary) -> list[str]:
    """The run's figures in two sentences, good or bad: of cost and reconstructions, and of samples if there are any.

    A quick run says first that it is one.
    """
    told = ["This was a quick run: it shows that everything works, not how well."] if summary.quick else []
    return told + _figures(summary)


def _figures(summary: Summary) -> list[str]:
    size, tokens = summary.image_size.upgraded, summary.tokens
    rebuilt, change = summary.reconstruction, sample_change(summary)
    gain = rebuilt.psnr_upgraded - rebuilt.psnr_base_upscaled
    told = f"rebuilds held-out images {abs(gain):.1f} dB {_nearer(gain)} the original than enlarging the base"
    if summary.generation is None:
        sentences = [f"With {tokens.upgraded} latent positions for {size} × {size} pixels this run {told}."]
        native = rebuilt.psnr_base_native
        if native is not None:
            above, share = native - rebuilt.psnr_upgraded, significant(tokens.native / tokens.upgraded, 2)
            whole = f"comes {abs(above):.1f} dB {_nearer(above)} it, from {share} times the positions"
            sentences.append(f"The base at full size {whole}.")
        return sentences
    ratio = speed_up(summary)
    pace = f"{significant(ratio, 2)} times as fast" if ratio >= 1 else f"{significant(1 / ratio, 2)} times more slowly"
    made = f"The upgraded pipeline makes {size} × {size} pixel images from {tokens.upgraded} tokens instead of the"
    sentences = [f"{made} {tokens.native} that the base takes for this size, {pace}."]
    if change is None:
        return [*sentences, f"It {told}."]
    joined = "but" if (gain >= 0) != (change <= 0) else "and"
    finest = f"{abs(change):.0%}".replace("%", " %") + f" {_nearer(-change)} real images at the finest scale"
    worse = worse_levels(summary)
    farther = f", but farther at {' and '.join(worse)}" if worse and change <= 0 else ""
    sentences.append(f"It {told}, {joined} its samples are {finest} than the base's{farther}.")
    if scene_moved(summary) > _OTHER:
        sentences.append("They show other scenes than the base's from the same seeds.")
    return sentences


def _nearer(gain: float) -> str:
    return "closer to" if gain >= 0 else "farther from"


def sample_change(summary: Summary) -> float | None:
    """Change of the samples' finest distance to real images against the base's, enlarged; None without samples."""
    made = summary.generation
    if made is None or made.swd_finest_base_upscaled <= 0:
        return None
    return made.swd_finest_upgraded / made.swd_finest_base_upscaled - 1


def worse_levels(summary: Summary) -> list[str]:
    """Sizes of the pyramid levels at which the samples are farther from real images than the base's, finest first."""
    made, size = summary.generation, summary.image_size.upgraded
    both = [] if made is None else zip(made.swd_levels_upgraded, made.swd_levels_base_upscaled)
    return [f"{size // 2**level} px" for level, (ours, base) in enumerate(both) if ours > base]


def scene_moved(summary: Summary) -> float:
    """Drift of the samples' base previews as a share of the distance between two seeds; 0 if it was not measured."""
    made = summary.generation
    return made.preview_drift / made.seeds_apart if made and made.preview_drift and made.seeds_apart else 0.0


def hardware(facts: Mapping[str, object]) -> str:
    """The machine of a run in words: ``AMD EPYC, 2 processor cores, of which torch used 1``."""
    words = [str(facts["device"])] if facts.get("device") else []
    cores, used = facts.get("cpu_count"), facts.get("torch_threads")
    if isinstance(cores, int):
        words.append(f"{cores} processor core{'s' if cores > 1 else ''}")
        if isinstance(used, int) and used < cores:
            words.append(f"of which torch used {used}")
    return ", ".join(words)


def classes(summary: Summary) -> str:
    """What the base does not know of the images' classes, in a sentence or two; empty if it knows all."""
    if not summary.unlabelled and not summary.unknown_classes:
        return ""
    names = first_names(summary.unknown_classes, _NAMED)
    unknown = f"The base pipeline does not know {names}: their images were trained without a label."
    text = unknown if summary.unknown_classes else "The images have no classes: they were trained without a label."
    return text + (" So the samples are of no class, which is harder than of one." if summary.unlabelled else "")


def scene(summary: Summary) -> str:
    """How far the samples have moved from the base's own scenes; empty if that was not measured."""
    made = summary.generation
    if made is None or made.preview_drift is None:
        return ""
    drift = made.preview_drift
    text = (
        f"Decoded by the base, the base part of the samples is {significant(drift, 2)} away from the base's own "
        "samples of the same seeds (root mean square, images in [−1, 1])"
    )
    if not made.seeds_apart:
        return f"{text}."
    share = scene_moved(summary)
    verdict = "the scene is kept" if share <= _KEPT else "the scene changes" if share > _OTHER else "the scene moves"
    return f"{text}; the base's samples of two seeds are {significant(made.seeds_apart, 2)} apart, so {verdict}."


_KEPT, _OTHER = 1 / 3, 2 / 3
"""Drift of previews as a share of the distance between two seeds: up to where a scene is kept, from where another."""
_NAMED = 5


def usual_text(usual: Summary | None) -> str:
    """What a recorded run of the same settings reached, in a sentence; empty without one."""
    if usual is None:
        return ""
    text = f"This demo usually reaches {usual.reconstruction.psnr_upgraded:.1f} dB"
    if usual.generation is not None:
        text += f" and a finest distance of {significant(usual.generation.swd_finest_upgraded)}"
    return f"{text} in {seconds(usual.wall_seconds)} ({hardware(usual.hardware)}, {usual.created[:10]})."


_OWN = "davae train base --recipe classes-taesd3-base data.path=FOLDER"
_REAL = "davae demo --base madebyollin/taesd3 --data FOLDER"


def next_steps(summary: Summary) -> list[tuple[str, str]]:
    """What to try next, the most pressing first: a sentence, and the command or setting that it is about."""
    rebuilt, made, change = summary.reconstruction, summary.generation, sample_change(summary)

    def longer(stage: str) -> str:
        settings: Any = summary.settings.get(stage) or {}
        steps = settings.get("loop", {}).get("steps")
        return f"{stage}.loop.steps={'...' if steps is None else 3 * steps}"

    steps = []
    if summary.quick:
        steps.append(("For figures that tell how well it works, run the same without", "--quick"))
    if summary.unlabelled:
        steps.append(("For samples of your own classes train a small base on them, and name it with --base:", _OWN))
    if rebuilt.psnr_upgraded < rebuilt.psnr_base_upscaled + 1 or made is None:
        steps.append(("Let the autoencoder learn for longer, in another folder, by", longer("autoencoder")))
    poor = (rebuilt.psnr_base_native or math.inf) < (rebuilt.psnr_reduced or 0)
    if poor and summary.settings.get("base") == TINY:
        steps.append(("The base loses more than reducing and enlarging the image does. Try a better one:", _REAL))
    behind = made is not None and made.swd_levels_others.get(SHIPPED, [math.inf])[0] < made.swd_finest_upgraded
    if change is not None and (change > -0.1 or len(worse_levels(summary)) > 1 or behind):
        steps.append(
            ("Let the transformer learn for longer, in the same folder, where it goes on, by", longer("diffusion"))
        )
    if scene_moved(summary) > _KEPT:
        steps.append(
            ("To keep the base's scenes tune fewer weights, in another folder, by", "diffusion.tune.mode=lora")
        )
    if made is None:
        steps.append(("Samples take a pipeline over this autoencoder, such as a small one of your classes:", _OWN))
    return steps or [("See it on your own photographs, in a real latent space:", _REAL)]


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
