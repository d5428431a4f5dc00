"""The whole method on the embedded base: both stages, samples, figures, one report."""

import logging
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.bases.open import load_recipe_base
from davae.benchmark import count_flops, peak_memory_bytes, side_by_side
from davae.data import ItemDataset
from davae.errors import DavaeError
from davae.evaluation import PatchSet
from davae.evaluation.metrics.psnr_ssim import pair_metrics
from davae.latents import token_count
from davae.models import AutoencoderDA
from davae.pipelines import ClassConditionalPipeline, load_pipeline, upgrade_pipeline
from davae.pipelines.saving.opening import load_autoencoder
from davae.recipes.read import load_recipe
from davae.recipes.settings import UpgradeRecipe
from davae.report import (
    Alignment,
    FigureRecorder,
    Generation,
    Reconstruction,
    Summary,
    ThreeWay,
    WarmStart,
    build_report,
)
from davae.runtime.pictures import save_rows, upscaled
from davae.runtime.places import claim
from davae.training.autoencoder.stage import upscaled_base
from davae.training.checkpoints.run_directory import environment, read_metrics
from davae.training.data import open_held_out
from davae.training.diffusion import ClassMap, generate_classes
from davae.training.runs.train import train_autoencoder, train_diffusion
from davae.warm_start import check_warm_start

logger = logging.getLogger(__name__)

_QUICK = (
    "data.path=procedural:256",
    "data.hold_out=48",
    "autoencoder.statistics_images=128",
    "autoencoder.loop.steps=120",
    "autoencoder.loop.validation_images=24",
    "diffusion.loop.steps=40",
    "diffusion.loss.detail_warmup_steps=10",
    "diffusion.loop.validation_images=24",
    "diffusion.sample.num_inference_steps=12",
)
_SHOWN = 6  # reconstructions and samples that the report shows


def run_demo(
    out: Path | str = "runs/demo", *, seed: int = 0, quick: bool = False, data: str | None = None, recipe: str = "tiny"
) -> Path:
    """Train both stages on the embedded base, compare, and write ``out/report.html``.

    An interrupted demo continues when it is run again.

    Args:
        out: run directory.
        seed: of both training stages, the samples and the metrics.
        quick: few steps of each stage, to show that everything works, not how well.
        data: images to use instead of the procedural scenes: anything that ``davae train`` takes.
        recipe: an upgrade recipe of a class-conditional base, by name or file.

    Returns:
        Path of the report.

    Raises:
        DavaeError: the recipe or the data is invalid, or ``out`` holds another run.
    """
    out = Path(out)
    settings = _settings(recipe, seed, quick, data)
    with claim(out, "demo"):
        _run(out, settings, seed=seed, quick=quick, data=data, recipe=recipe)
    return build_report(out)


def _run(out: Path, settings: UpgradeRecipe, *, seed: int, quick: bool, data: str | None, recipe: str) -> None:
    """Everything but the report."""
    began = time.perf_counter()
    held_out = open_held_out(settings.data)  # fails before any training if there are none
    base = load_recipe_base(settings)

    stage1 = train_autoencoder(settings, out / "autoencoder")
    vae = load_autoencoder(stage1.result)
    warm_start = check_warm_start(base.transformer, upgrade_pipeline(base, vae).transformer, vae.layout)
    stage2 = train_diffusion(settings, out / "diffusion", stage1.result)
    upgraded = load_pipeline(stage2.result)

    logger.info("comparing base, native and upgraded")
    recorder = FigureRecorder(out, classes=list(held_out.classes) or ["images"])
    images, labels, names = _first_images(held_out, settings.autoencoder.loop.validation_images)
    reconstruction, alignment = _compare_reconstructions(base, vae, images, labels, names, recorder)
    sampled = ClassMap(list(held_out.classes), base).known
    generation = _compare_samples(base, upgraded, images, sampled, settings, recorder)
    flops, seconds = _compare_cost(base, upgraded, settings)
    recorder.write()

    full, small = settings.data.resolution, settings.data.resolution // vae.scale
    f = vae.base_compression
    logged = [line for line in read_metrics(out / "autoencoder" / "metrics.jsonl") if "alignment" in line]
    facts = environment()
    Summary(
        title="davae on its own pictures" if data is None else f"davae on {data}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(out, seed, quick, data, recipe),
        hardware={k: v for k, v in facts.items() if isinstance(v, str | int | None) and k != "command"},
        image_size=ThreeWay[int](base=small, native=full, upgraded=full),
        tokens=ThreeWay[int](
            base=token_count(small, small, spatial_compression=f),
            native=token_count(full, full, spatial_compression=f),
            upgraded=token_count(full, full, spatial_compression=vae.spatial_compression),
        ),
        flops_per_image=flops,
        seconds_per_image=seconds,
        reconstruction=reconstruction,
        generation=generation,
        alignment=Alignment(**alignment, loss=stage1.metrics["alignment"], loss_start=logged[0]["alignment"]),
        warm_start=WarmStart(
            max_base_difference=warm_start.max_base_difference, max_detail_output=warm_start.max_detail_output
        ),
        wall_seconds=time.perf_counter() - began,
        peak_memory_bytes=peak_memory_bytes(),
        settings=settings.model_dump(mode="json"),
        skipped=stage1.skipped.entries,
    ).write(out)


def _settings(recipe: str, seed: int, quick: bool, data: str | None) -> UpgradeRecipe:
    if not isinstance(load_recipe(recipe), UpgradeRecipe):
        raise DavaeError(f"recipe '{recipe}' is not an upgrade of a base pipeline, which the demo needs")
    overrides = [f"autoencoder.loop.seed={seed}", f"diffusion.loop.seed={seed}", *(_QUICK if quick else ())]
    if data is not None:
        overrides += [f"data.path={data}", "data.hold_out=0.1"]
    settings = load_recipe(recipe, overrides)
    assert isinstance(settings, UpgradeRecipe)
    return settings


def _command(out: Path, seed: int, quick: bool, data: str | None, recipe: str) -> str:
    words = ["davae", "demo", "--out", str(out), "--seed", str(seed)]
    words += ["--quick"] if quick else []
    words += ["--data", data] if data is not None else []
    return shlex.join([*words, *(["--recipe", recipe] if recipe != "tiny" else [])])


def _first_images(dataset: ItemDataset, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """The first ``count`` held-out images, their labels (0 if unlabelled) and captions (ids if there are none)."""
    items = [dataset[i] for i in range(min(count, len(dataset)))]
    labels = torch.tensor([max(item["label"], 0) for item in items])
    return (torch.stack([item["image"] for item in items]), labels, [item["caption"] or item["id"] for item in items])


@torch.no_grad()
def _compare_reconstructions(
    base: ClassConditionalPipeline,
    vae: AutoencoderDA,
    images: Tensor,
    labels: Tensor,
    names: list[str],
    recorder: FigureRecorder,
) -> tuple[Reconstruction, dict[str, Any]]:
    """Reconstruct held-out images with the base alone and with the upgraded autoencoder."""
    latent = vae.encode(images).latent_dist.mode()  # [N, C + D, h, w]
    z, _ = vae.layout.split(latent)
    own = base.vae.encode(vae.downsample(images)).latent_dist.mode()
    reconstruction = vae.decode(latent).sample.clamp(-1, 1)
    preview, enlarged = vae.decode_base(latent).clamp(-1, 1), upscaled_base(vae, images)
    recorder.add_reconstructions(images[:_SHOWN], preview[:_SHOWN], reconstruction[:_SHOWN], names[:_SHOWN])
    rows = {"input": images, "base, upscaled": enlarged, "reconstruction": reconstruction}
    save_rows(recorder.run_dir / "reconstructions.png", {k: v[: 2 * _SHOWN] for k, v in rows.items()})
    recorder.add_spectra("images", {"Images": images, "Base, upscaled": enlarged, "Reconstruction": reconstruction})
    several = labels.bincount()[labels] > 1  # a probe needs one latent of a class to fit and one to score
    probes: dict[str, Any] = {}
    if len(labels[several].unique()) > 1:
        probes = recorder.add_latents(*vae.layout.split(latent[several]), labels[several])
    figures = {
        f"{name}_{row}": float(values.mean())
        for row, made in (("upgraded", reconstruction), ("base_upscaled", enlarged))
        for name, values in pair_metrics(images, made).items()
    }
    return Reconstruction(**figures, images=len(images)), {"base_latents_equal": torch.equal(z, own), **probes}


@torch.no_grad()
def _compare_samples(
    base: ClassConditionalPipeline,
    upgraded: ClassConditionalPipeline,
    images: Tensor,
    sampled: list[int],
    recipe: UpgradeRecipe,
    recorder: FigureRecorder,
) -> Generation:
    """Sample both pipelines from the same seeds and compare with real images at full resolution."""
    count, seed = recipe.diffusion.loop.validation_images, recipe.diffusion.loop.seed
    made = generate_classes(upgraded, sampled, count, recipe.diffusion.sample, seed=seed)
    small = generate_classes(base, sampled, count, recipe.diffusion.sample, seed=seed)
    names = {number: name for name, number in base.labels.items()}
    captions = [f"{names.get(sampled[i % len(sampled)], 'no class')}, seed {seed + i}" for i in range(count)]
    shown = min(2 * _SHOWN, count)
    recorder.add_samples(small[:shown], made[:shown], captions[:shown])
    rows = {"base, upscaled": upscaled(small[:shown], made.shape[-2:]), "upgraded": made[:shown]}
    save_rows(recorder.run_dir / "samples.png", rows)
    real = PatchSet(seed=seed).update(images)
    distances = [
        list(real.distance(PatchSet(seed=seed).update(x)).values()) for x in (made, upscaled(small, made.shape[-2:]))
    ]
    return Generation(
        swd_finest_upgraded=distances[0][0],
        swd_finest_base_upscaled=distances[1][0],
        swd_levels_upgraded=distances[0],
        swd_levels_base_upscaled=distances[1],
        images=count,
    )


def _compare_cost(
    base: ClassConditionalPipeline, upgraded: ClassConditionalPipeline, recipe: UpgradeRecipe
) -> tuple[ThreeWay[float], ThreeWay[float]]:
    """FLOPs and seconds per image: base, base at full resolution (native), and upgraded."""
    full, batch = recipe.data.resolution, 2
    sample = recipe.diffusion.sample

    def generating(pipe: ClassConditionalPipeline, side: int | None, count: int) -> Callable[[], object]:
        def run() -> object:
            return pipe(
                [0] * count,
                height=side,
                width=side,
                num_inference_steps=sample.num_inference_steps,
                guidance_scale=sample.guidance_scale,
                guidance_interval=sample.guidance_interval,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            )

        return run

    pipes = {"base": (base, None), "native": (base, full), "upgraded": (upgraded, None)}
    for pipe, _ in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    flops = {name: float(count_flops(generating(pipe, side, 1))) for name, (pipe, side) in pipes.items()}
    timed = side_by_side({name: generating(pipe, side, batch) for name, (pipe, side) in pipes.items()}, repeats=5)
    seconds = {name: value / batch for name, value in timed.medians.items()}
    return ThreeWay[float](**flops), ThreeWay[float](**seconds)
