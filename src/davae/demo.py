"""The whole method on the embedded base, or stage 1 over any other on photographs: samples, figures, one report."""

import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.bases.open import EVERYTHING, built_in, is_pipeline, load_recipe_autoencoder, load_recipe_base
from davae.benchmark import count_flops, peak_memory_bytes, side_by_side
from davae.data import ItemDataset
from davae.errors import DavaeError
from davae.evaluation import PatchSet
from davae.evaluation.metrics.names import BASE_ENLARGED, BASE_NATIVE, DECODER_ALONE, REDUCED, SHIPPED, UPGRADED
from davae.evaluation.metrics.psnr_ssim import pair_metrics
from davae.evaluation.reconstruction.baselines import all_reconstructions
from davae.evaluation.upscalers import Upscaler, open_upscalers
from davae.latents import token_count
from davae.models import AutoencoderDA
from davae.models.base_adapters.adapter import adapter_of
from davae.models.latent_space import encode, native_reconstruction
from davae.pipelines import ClassConditionalPipeline, load_pipeline, upgrade_pipeline
from davae.pipelines.saving.opening import load_autoencoder
from davae.recipes.data import is_procedural
from davae.recipes.read import demo_recipe, load_recipe
from davae.recipes.settings import UpgradeRecipe
from davae.report import (
    STAGES,
    Alignment,
    EachWay,
    FigureRecorder,
    Generation,
    Reconstruction,
    Summary,
    WarmStart,
    build_report,
    usual_run,
)
from davae.runtime.devices import computes_bfloat16
from davae.runtime.package_files import TINY, TINY_UPGRADED
from davae.runtime.pictures import save_rows
from davae.runtime.pixel_budget import in_parts
from davae.runtime.places import claim
from davae.runtime.progress import Phases, Progress
from davae.runtime.resizing import upscaled
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
    "autoencoder.loop.steps=40",
    "autoencoder.loop.validation_images=24",
    "diffusion.loop.steps=40",
    "diffusion.loss.detail_warmup_steps=10",
    "diffusion.loop.validation_images=24",
    "diffusion.sample.num_inference_steps=12",
)
_HALF = ("autoencoder.loop.precision=bf16", "diffusion.loop.precision=bf16")
_SHOWN = 6  # reconstructions and samples that the report shows
_SAMPLED_TOGETHER = 6
_ROWS = {UPGRADED, DECODER_ALONE, BASE_ENLARGED, BASE_NATIVE, REDUCED, SHIPPED}
_SHIPPED_SIDE = 128  # of what the shipped upgrade makes
_ROUNDS = 3  # of timing


def run_demo(
    out: Path | str = "runs/demo",
    *,
    seed: int = 0,
    quick: bool = False,
    data: str | None = None,
    base: str | None = None,
    recipe: str | None = None,
    upscalers: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Train both stages on a base, compare, and write ``out/report.html``.

    Over a base that cannot be sampled by class (an autoencoder alone, a pipeline that takes prompts) stage 1 is trained
    and reconstructions are compared. An interrupted demo continues when it is run again.

    Args:
        out: run directory.
        seed: of both training stages, the samples and the metrics.
        quick: few steps of each stage, to show that everything works, not how well.
        data: images to use instead of the procedural scenes: anything that ``davae train`` takes.
        base: an autoencoder or a pipeline, a folder or a name on the hub, instead of the recipe's; needs ``data``.
        recipe: an upgrade recipe by name or file; by default ``tiny``, with ``base`` ``taesd3-photos``.
        upscalers: by name, what enlarges the base's images beside it, see
            :func:`davae.evaluation.upscalers.open_upscaler`.
        overrides: of the recipe, ``section.key=value``.

    Returns:
        Path of the report.

    Raises:
        DavaeError: the recipe, the base, the data or an upscaler is invalid, or ``out`` holds another run.
    """
    out = Path(out)
    given = {"--quick": quick or None, "--data": data, "--base": base, "--recipe": recipe}
    options = [word for key, value in given.items() if value is not None for word in (key, value) if word is not True]
    options += [word for name, place in (upscalers or {}).items() for word in ("--upscaler", f"{name}={place}")]
    command = shlex.join(["davae", "demo", "--out", str(out), "--seed", str(seed), *map(str, options), *overrides])
    settings, cannot = _settings(seed, quick, data, base, recipe, overrides)
    if taken := _ROWS & set(upscalers or {}):
        raise DavaeError(f"--upscaler {min(taken)}=...: the report has a row of that name already, choose another")
    opened = open_upscalers(upscalers or {})
    with claim(out, "demo"):
        _Demo(out, settings, cannot, opened).run(command, quick=quick)
    return build_report(out)


def _settings(
    seed: int, quick: bool, data: str | None, base: str | None, recipe: str | None, overrides: Sequence[str]
) -> tuple[UpgradeRecipe, str]:
    """The resolved recipe, and why its base cannot be sampled, empty if it can."""
    name = recipe or demo_recipe(base)
    if base is not None and data is None and not any(override.startswith("data.path=") for override in overrides):
        raise DavaeError("--base is tried on images of your own: name their folder with --data")
    if not isinstance(load_recipe(name), UpgradeRecipe):
        raise DavaeError(f"recipe '{name}' is not an upgrade of a base pipeline, which the demo needs")
    given = [f"autoencoder.loop.seed={seed}", f"diffusion.loop.seed={seed}", *(_QUICK if quick else ())]
    given += _HALF if computes_bfloat16() else ()
    given += [f"data.path={data}"] if data is not None else []
    given += [f"base={base}"] if base is not None else []
    settings = load_recipe(name, [*given, *overrides])
    assert isinstance(settings, UpgradeRecipe)
    outline, cannot = None, ""
    if not is_pipeline(settings.base, settings.base_revision):
        cannot = f"{settings.base} is an autoencoder alone, so nothing was generated: that takes a pipeline over it"
    else:
        outline = load_recipe_base(settings, without=EVERYTHING)
        if not isinstance(outline, ClassConditionalPipeline):
            cannot = (
                f"{settings.base} takes prompts, so nothing was generated: its transformer is tuned on captions by "
                "davae train diffusion"
            )
    if base is not None:
        given += _fitting(settings, None if cannot else outline)
        settings = load_recipe(name, [*given, *overrides])
        assert isinstance(settings, UpgradeRecipe)
    return settings, cannot


def _fitting(recipe: UpgradeRecipe, pipe: Any) -> list[str]:
    """Overrides that fit a recipe to its base: three times its channels, and the size that its transformer makes."""
    vae = load_recipe_autoencoder(recipe)
    adapter = adapter_of(vae)
    if adapter is None:
        raise DavaeError(f"--base {recipe.base}: davae has no adapter for {type(vae).__name__}; see docs/pipelines.md")
    found = [f"autoencoder.model.detail_channels={3 * adapter.latent_layout(vae).channels}"]
    if pipe is not None:
        side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        found.append(f"data.resolution={side * recipe.autoencoder.model.scale}")
    return found


class _Demo:
    """One run.

    Args:
        out: its folder.
        settings: the resolved recipe.
        cannot: why the base cannot be sampled, empty if it can.
        upscalers: of the base's images, by name.
    """

    def __init__(self, out: Path, settings: UpgradeRecipe, cannot: str, upscalers: Mapping[str, Upscaler]) -> None:
        self.out, self.settings, self.cannot, self.upscalers = out, settings, cannot, upscalers
        self.held_out = open_held_out(settings.data)  # fails before any training if there are none
        names = list(self.held_out.classes) or ["images"]
        comparable = not cannot and settings.base == TINY and is_procedural(settings.data.path)
        self.shipped = built_in(TINY_UPGRADED) if comparable and settings.data.resolution == _SHIPPED_SIDE else None
        self.recorder = FigureRecorder(out, classes=names, curves=STAGES[:1] if cannot else STAGES)

    def run(self, command: str, *, quick: bool) -> None:
        """Everything but the report."""
        out, settings, began = self.out, self.settings, time.perf_counter()
        with Phases("demo", _expected(settings, generates=not self.cannot)) as phases:
            pipe = None if self.cannot else load_recipe_base(settings)
            phases.begin("autoencoder")
            stage1 = train_autoencoder(settings, out / "autoencoder")
            vae = load_autoencoder(stage1.result).eval()
            generated: dict[str, Any] = {}
            if pipe is not None:
                phases.begin("diffusion")
                warm = check_warm_start(pipe.transformer, upgrade_pipeline(pipe, vae).transformer, vae.layout)
                stage2 = train_diffusion(settings, out / "diffusion", stage1.result)
                upgraded = load_pipeline(stage2.result)
                differences = {name: getattr(warm, name) for name in WarmStart.model_fields}
                generated["warm_start"] = WarmStart(**differences)
            phases.begin("reconstruction")
            images, labels, names = _first_images(self.held_out, settings.autoencoder.loop.validation_images)
            reconstruction, alignment = self._reconstructions(vae, images, labels, names)
            if pipe is not None:
                phases.begin("samples")
                alone = upgrade_pipeline(pipe, vae.without_details())
                classes = list(self.held_out.classes)
                known = ClassMap(classes, pipe)
                drift = stage2.metrics.get("preview_drift")
                generated["generation"] = self._samples(pipe, alone, upgraded, images, known.known, drift)
                generated["unlabelled"] = known.known == [known.null]
                generated["unknown_classes"] = [c for c, n in zip(classes, known.numbers) if n == known.null]
            phases.begin("cost")
            if pipe is None:
                flops, seconds = _cost_of_a_round_trip(vae, images[:1])
            else:
                flops, seconds = _cost_of_an_image(pipe, alone, upgraded, settings)
            self.recorder.write()

        full, small, f = settings.data.resolution, settings.data.resolution // vae.scale, vae.base_compression
        logged = [line for line in read_metrics(out / "autoencoder" / "metrics.jsonl") if "alignment" in line]
        facts = environment()
        over = "" if settings.base == TINY else f"over {settings.base}, "
        Summary(
            title=f"davae {over}on {'its own pictures' if is_procedural(settings.data.path) else settings.data.path}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            hardware={k: v for k, v in facts.items() if isinstance(v, str | int | None) and k != "command"},
            image_size=EachWay[int](base=small, native=full, decoder_alone=full, upgraded=full),
            tokens=EachWay[int](
                base=token_count(small, small, spatial_compression=f),
                native=token_count(full, full, spatial_compression=f),
                decoder_alone=token_count(small, small, spatial_compression=f),
                upgraded=token_count(full, full, spatial_compression=vae.spatial_compression),
            ),
            flops_per_image=flops,
            seconds_per_image=seconds,
            reconstruction=reconstruction,
            alignment=Alignment(
                **alignment, loss=stage1.metrics.get("alignment"), loss_start=logged[0]["alignment"] if logged else None
            ),
            not_generated=self.cannot,
            quick=quick,
            phases=phases.seconds,
            wall_seconds=time.perf_counter() - began,
            peak_memory_bytes=peak_memory_bytes(),
            settings=settings.model_dump(mode="json"),
            skipped=stage1.skipped.entries,
            **generated,
        ).write(out)

    @torch.no_grad()
    def _reconstructions(
        self, vae: AutoencoderDA, images: Tensor, labels: Tensor, names: list[str]
    ) -> tuple[Reconstruction, dict[str, Any]]:
        """Reconstruct held-out images with the base alone and with the upgraded autoencoder."""
        base = load_recipe_autoencoder(self.settings)
        beside = {} if self.shipped is None else {SHIPPED: self.shipped.vae}
        latents, equal = [], True
        rows: dict[str, list[Tensor]] = {}
        with Progress("reconstruction", len(images)) as progress:
            for part in in_parts(images):
                latents.append(vae.encode(part).latent_dist.mode())  # [n, C + D, h, w]
                own = encode(base, vae.downsample(part))
                equal &= torch.equal(vae.layout.split(latents[-1])[0], own)
                for name, made in all_reconstructions(vae, part, beside, self.upscalers).items():
                    rows.setdefault(name, []).append(made)
                for _ in part:
                    progress.advance()
        others = [*beside, *self.upscalers]
        whole, latent = {name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(latents)
        self.recorder.add_reconstructions(
            images[:_SHOWN],
            vae.decode_base(latent[:_SHOWN]).clamp(-1, 1),
            whole[UPGRADED][:_SHOWN],
            names[:_SHOWN],
            alone=whole[DECODER_ALONE][:_SHOWN] if DECODER_ALONE in whole else None,
            others={name: whole[name][:_SHOWN] for name in others},
            native=whole[BASE_NATIVE][:_SHOWN] if self.cannot else None,
        )
        equal_tokens = [row for row in (BASE_ENLARGED, DECODER_ALONE, UPGRADED, *others) if row in whole]
        shown = {"input": images} | {row: whole[row] for row in [*equal_tokens, *([BASE_NATIVE] * bool(self.cannot))]}
        save_rows(self.out / "reconstructions.png", {k: v[: 2 * _SHOWN] for k, v in shown.items()})
        lines = {"Images": images} | {row.capitalize(): whole[row] for row in equal_tokens}
        self.recorder.add_spectra("images", lines)
        several = labels.bincount()[labels] > 1  # a probe needs one latent of a class to fit and one to score
        probes: dict[str, Any] = {}
        if len(labels[several].unique()) > 1:
            probes = self.recorder.add_latents(*vae.layout.split(latent[several]), labels[several])
        keys = {UPGRADED: "upgraded", DECODER_ALONE: "decoder_alone", BASE_ENLARGED: "base_upscaled"}
        keys |= {BASE_NATIVE: "base_native", REDUCED: "reduced"}
        means = {
            row: {name: float(values.mean()) for name, values in pair_metrics(images, made).items()}
            for row, made in whole.items()
        }
        figures = {f"{name}_{key}": mean for row, key in keys.items() for name, mean in means.get(row, {}).items()}
        rebuilt = Reconstruction(**figures, others={row: means[row] for row in others}, images=len(images))
        return rebuilt, {"base_latents_equal": equal, **probes}

    @torch.no_grad()
    def _samples(
        self,
        base: ClassConditionalPipeline,
        alone: ClassConditionalPipeline,
        upgraded: ClassConditionalPipeline,
        images: Tensor,
        sampled: list[int],
        drift: float | None,
    ) -> Generation:
        """Sample the pipelines from the same seeds and compare with real images at full resolution."""
        stage = self.settings.diffusion
        count, seed = stage.loop.validation_images, stage.loop.seed
        with Progress("samples", (3 if self.shipped is None else 4) * count) as progress:

            def samples(pipe: ClassConditionalPipeline) -> Tensor:
                made = []
                for first in range(0, count, _SAMPLED_TOGETHER):
                    positions = range(first, min(first + _SAMPLED_TOGETHER, count))
                    made.append(generate_classes(pipe, sampled, count, stage.sample, seed=seed, positions=positions))
                    for _ in positions:
                        progress.advance()
                return torch.cat(made)

            made, small, larger = samples(upgraded), samples(base), samples(alone)
            others = {} if self.shipped is None else {SHIPPED: samples(self.shipped)}
        names = {number: name for name, number in base.labels.items()}
        captions = [f"{names.get(sampled[i % len(sampled)], 'no class')}, seed {seed + i}" for i in range(count)]
        shown = min(2 * _SHOWN, count)
        size, seeds = (made.shape[-2], made.shape[-1]), range(seed, seed + count)
        others |= {name: upscaler(small, size, seeds=seeds) for name, upscaler in self.upscalers.items()}
        beside = {name: images[:shown] for name, images in others.items()}
        self.recorder.add_samples(small[:shown], made[:shown], captions[:shown], alone=larger[:shown], others=beside)
        enlarged = upscaled(small, made.shape[-2:])
        rows = {BASE_ENLARGED: enlarged, DECODER_ALONE: larger, UPGRADED: made} | others
        save_rows(self.out / "samples.png", {name: row[:shown] for name, row in rows.items()})
        real = PatchSet(seed=seed).update(images)
        distances = {name: list(real.distance(PatchSet(seed=seed).update(x)).values()) for name, x in rows.items()}
        apart = (small[len(sampled) :] - small[: -len(sampled)]).square().mean().sqrt()  # one class, two seeds
        return Generation(
            swd_finest_upgraded=distances[UPGRADED][0],
            swd_finest_base_upscaled=distances[BASE_ENLARGED][0],
            swd_finest_decoder_alone=distances[DECODER_ALONE][0],
            swd_levels_upgraded=distances[UPGRADED],
            swd_levels_base_upscaled=distances[BASE_ENLARGED],
            swd_levels_decoder_alone=distances[DECODER_ALONE],
            swd_levels_others={name: distances[name] for name in others},
            preview_drift=drift,
            seeds_apart=float(apart) if count > len(sampled) else None,
            images=count,
        )


def _expected(recipe: UpgradeRecipe, *, generates: bool) -> dict[str, float]:
    """Seconds that each phase may take: a recorded run's, else those of the demo without options by the work in it."""
    found = usual_run(recipe.model_dump(mode="json"))
    if found is not None and found.phases:
        return found.phases
    plain = load_recipe(demo_recipe(None))
    assert isinstance(plain, UpgradeRecipe)
    recorded = usual_run(plain.model_dump(mode="json"))
    assert recorded is not None
    usual, work = _work(plain), _work(recipe)
    if not generates:
        work["cost"] = 0.1 * usual["cost"] * (recipe.data.resolution / plain.data.resolution) ** 2  # without sampling
    return {
        phase: 4 + work[phase] / usual[phase] * seconds
        for phase, seconds in recorded.phases.items()
        if generates or phase not in ("diffusion", "samples")
    }


def _work(recipe: UpgradeRecipe) -> dict[str, float]:
    """What each phase's time is proportional to: images, or images in steps, times pixels."""
    stage1, stage2, pixels = recipe.autoencoder.loop, recipe.diffusion.loop, recipe.data.resolution**2
    sampling = recipe.diffusion.sample.num_inference_steps * pixels
    besides = recipe.autoencoder.statistics_images / 4
    besides += recipe.autoencoder.start_images / 2 if recipe.autoencoder.model.start == "fitted" else 0
    return {
        "autoencoder": (stage1.steps * stage1.batch_size + besides) * pixels,
        "diffusion": stage2.steps * stage2.batch_size * pixels,
        "reconstruction": stage1.validation_images * pixels,
        "samples": stage2.validation_images * sampling,
        "cost": sampling,
    }


def _first_images(dataset: ItemDataset, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """The first ``count`` held-out images, their labels (0 if unlabelled) and captions (ids if there are none)."""
    items = [dataset[i] for i in range(min(count, len(dataset)))]
    labels = torch.tensor([max(item["label"], 0) for item in items])
    return (torch.stack([item["image"] for item in items]), labels, [item["caption"] or item["id"] for item in items])


def _side_by_side(
    ways: dict[str, Callable[[], object]], single: dict[str, Callable[[], object]], batch: int = 1
) -> tuple[EachWay[float], EachWay[float]]:
    """FLOPs of ``single`` images, and seconds per image in batches.

    Args:
        ways: what to time, by the fields of the results.
        single: the same for one image.
        batch: images that a call of ``ways`` makes.
    """
    with Progress("cost", len(ways) * (_ROUNDS + 2)) as progress:

        def counted(run: Callable[[], object]) -> object:
            made = run()
            progress.advance()
            return made

        flops = {name: float(count_flops(partial(counted, run))) for name, run in single.items()}
        timed = side_by_side({name: partial(counted, run) for name, run in ways.items()}, repeats=_ROUNDS)
    return EachWay[float](**flops), EachWay[float](**{name: value / batch for name, value in timed.medians.items()})


def _cost_of_an_image(
    base: ClassConditionalPipeline,
    alone: ClassConditionalPipeline,
    upgraded: ClassConditionalPipeline,
    recipe: UpgradeRecipe,
) -> tuple[EachWay[float], EachWay[float]]:
    """FLOPs and seconds per image: base, base at full resolution (native), its decoder alone, and upgraded."""
    full, batch, sample = recipe.data.resolution, 2, recipe.diffusion.sample

    def generating(pipe: ClassConditionalPipeline, side: int | None, count: int) -> Callable[[], object]:
        return lambda: pipe(
            [0] * count,
            height=side,
            width=side,
            num_inference_steps=sample.num_inference_steps,
            guidance_scale=sample.guidance_scale,
            guidance_interval=sample.guidance_interval,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )

    pipes = {"base": (base, None), "native": (base, full), "decoder_alone": (alone, None), "upgraded": (upgraded, None)}
    for pipe, _ in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    ways, single = (
        {name: generating(pipe, side, count) for name, (pipe, side) in pipes.items()} for count in (batch, 1)
    )
    return _side_by_side(ways, single, batch)


@torch.no_grad()
def _cost_of_a_round_trip(vae: AutoencoderDA, images: Tensor) -> tuple[EachWay[float], EachWay[float]]:
    """FLOPs and seconds of encoding and decoding an image: base, at full size (native), decoder alone, and upgraded."""
    alone = vae.without_details()
    ways: dict[str, Callable[[], object]] = {
        "base": lambda: vae.decode_base(vae.encode_base(images)),
        "native": lambda: native_reconstruction(vae, images),
        "decoder_alone": lambda: alone.decode(alone.encode(images).latent_dist.mode()),
        "upgraded": lambda: vae.decode(vae.encode(images).latent_dist.mode()),
    }
    return _side_by_side(ways, ways)
