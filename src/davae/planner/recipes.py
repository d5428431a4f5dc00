"""Dry runs: a recipe's real architecture on the meta device, its checks, and the plan of its cost."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from davae.errors import DavaeError
from davae.pipelines.families import find_family, why_untrainable
from davae.planner.architectures import Architecture, find_architecture
from davae.planner.plan import Plan, plan
from davae.planner.stages import AutoencoderRun, DiffusionRun, autoencoder_stage, target_counts
from davae.planner.text import inference_line, notes, stage_line
from davae.recipes.loop import LoopSettings, OptimizerSettings
from davae.recipes.read import dump_recipe, load_recipe, parse_recipe, recipe_names
from davae.recipes.settings import UpgradeRecipe
from davae.recipes.yaml_text import parse_yaml
from davae.warm_start import description_of

Stage = Literal["autoencoder", "diffusion"]


def dry_run(recipe: UpgradeRecipe, stage: Stage) -> str:
    """Check a recipe without weights; returns it as YAML with what was found in comments.

    Raises:
        DavaeError: the base is unknown, sizes do not fit, or LoRA targets match nothing.
    """
    architecture = find_architecture(recipe.base)
    if stage == "autoencoder" and not architecture.transformer:
        return "\n".join([dump_recipe(recipe), *(f"# {line}" for line in _autoencoder_alone(recipe, architecture))])
    made = recipe_plan(recipe, architecture)
    found = [
        f"base: {made.base} ({made.pipeline})",
        *_shapes(recipe, architecture, made),
        *(_layers(recipe, architecture, made) if stage == "diffusion" else []),
        *_data(recipe, stage),
        "plan",
        inference_line(made),
        stage_line(made, stage),
        *notes(made),
    ]
    return dump_recipe(recipe) + "\n" + "\n".join(f"# {line}" for line in found)


def recipe_plan(recipe: UpgradeRecipe, architecture: Architecture | None = None) -> Plan:
    """The plan of a recipe."""
    architecture = architecture or find_architecture(recipe.base)
    return plan(
        architecture,
        resolution=max(recipe.data.resolutions),
        scale=recipe.autoencoder.model.scale,
        detail_channels=_detail_channels(recipe),
        autoencoder=_autoencoder_run(recipe),
        diffusion=_diffusion_run(recipe, architecture),
    )


def plan_upgrade(
    base: str | None = None,
    *,
    resolution: int | None = None,
    scale: int | None = None,
    detail_channels: tuple[int, ...] | None = None,
    gpu: str = "H100",
    batch: int = 1,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    cpu: bool = False,
) -> Plan:
    """:func:`davae.planner.plan.plan` with the training of a recipe.

    Args:
        base, resolution, scale: by default the recipe's; without a recipe 1024 pixels at scale 2.
        recipe: name or file; by default the bundled recipe for this base, resolution and scale, if there is
            one, else the planner's defaults.
        overrides: ``section.key=value``, of the recipe.
        cpu: memory of a training on a CPU.

    Raises:
        DavaeError: an unknown base, GPU or recipe, sizes that do not fit, or neither a base nor a recipe.
    """
    given = _upgrade_recipe(recipe, overrides) if recipe else None
    if base is None and given is None:
        raise DavaeError("name a base to plan for (davae plan NAME), or a recipe (davae plan --recipe NAME)")
    if overrides and given is None:
        raise DavaeError(f"{overrides[0]} changes a recipe: name it with --recipe")
    if given is not None:
        base, resolution = base or given.base, resolution or given.data.resolution
        scale = scale or given.autoencoder.model.scale
    architecture = find_architecture(str(base))
    resolution, scale = resolution or 1024, scale or 2
    settings = given or _bundled_for(architecture.name, resolution, scale)
    runs: dict[str, AutoencoderRun | DiffusionRun] = {}
    if settings is not None:
        runs = {"autoencoder": _autoencoder_run(settings), "diffusion": _diffusion_run(settings, architecture)}
    elif targets := find_family(architecture.pipeline).lora_targets:
        steps = DiffusionRun(steps=20_000, batch_size=6, gradient_accumulation=16, lora_targets=targets)
        runs = {"diffusion": steps}
    runs = {name: replace(run, cpu=cpu) for name, run in runs.items()}
    details: int | tuple[int, ...] | None = detail_channels
    if details is None and settings is not None and settings.autoencoder.model.scale == scale:
        details = _detail_channels(settings)
    return plan(
        architecture,
        resolution=resolution,
        scale=scale,
        detail_channels=details,
        gpu=gpu,
        batch=batch,
        **runs,  # type: ignore[arg-type]
    )


_FULL_BELOW = 3e8
"""Parameters of a transformer that is tuned in full; larger ones get LoRA."""


def new_recipe(
    base: str, *, data: str = "images", resolution: int | None = None, scale: int = 2, steps: int = 20_000
) -> str:
    """A recipe for a pipeline, as YAML with comments: what depends on it, and schedules that follow ``steps``.

    Args:
        base: a pipeline's folder, its name on the hub, or that of a bundled configuration.
        data: the recipe's ``data.path``.
        resolution: side of the full image in pixels; by default the base's own, times ``scale``.
        scale: of the upgrade.
        steps: of each stage.

    Raises:
        DavaeError: the base is unknown, has no transformer or cannot be trained, or sizes do not fit.
    """
    architecture = find_architecture(base)
    architecture.require_transformer()
    if (why := why_untrainable(architecture.pipeline, architecture.transformer)) is not None:
        raise why
    family = find_family(architecture.pipeline)
    native = int(architecture.transformer.get("sample_size") or 0) * architecture.base_compression
    resolution = resolution or (architecture.resolution or native or 1024) * scale
    made = plan(architecture, resolution=resolution, scale=scale)
    text = family.conditioned_on == "text"
    lora = bool(family.lora_targets) and made.parameters["transformer"] > _FULL_BELOW
    values = {
        "base": json.dumps(base),
        "pipeline": made.pipeline,
        "data": json.dumps(data),
        "told": "with captions in .txt files beside them or in metadata.jsonl"
        if text
        else "in a folder for each class",
        "resolution": resolution,
        "scale": scale,
        "tokens": made.tokens["upgraded"],
        "details": made.detail_channels,
        "steps": steps,
        "tune": "lora\n    lora: {rank: 64, alpha: 64}\n    frozen_dtype: bfloat16" if lora else "full",
        "often": max(1, steps // 10),
    }
    found = NEW_RECIPE.format(**values)
    recipe = parse_recipe(parse_yaml(found, base), f"the recipe for {base}")
    assert isinstance(recipe, UpgradeRecipe)
    cost = recipe_plan(recipe, architecture)
    lines = [inference_line(cost), stage_line(cost, "autoencoder"), stage_line(cost, "diffusion")]
    return "".join(f"# {line.strip()}\n" for line in lines) + found


NEW_RECIPE = """\
description: {pipeline} at {resolution} pixels, {tokens} tokens an image
base: {base}

data:
  path: {data}        # {told}
  resolution: {resolution}
  hold_out: 0.05              # share of the images that validation measures on
  workers: null               # one per processor, at most 8

autoencoder:                  # davae train autoencoder --recipe THIS.yaml
  model:
    scale: {scale}
    detail_channels: {details}
  reconstruction:
    l1_weight: 1.0
    laplacian_weight: 1.0
  optimizer:
    learning_rate: 1.0e-4
    betas: [0.9, 0.99]
    lr_scheduler: cosine
    lr_warmup_steps: 0.05     # below 1: a share of loop.steps
    lr_end: 1.0e-5
  loop:
    steps: {steps}
    batch_size: 2             # images at a time: memory
    gradient_accumulation: 8
    max_grad_norm: 1.0
    precision: bf16           # "no" without a GPU
    gradient_checkpointing: true
    validate_every: {often}
    checkpoint_every: {often}

diffusion:                    # davae train diffusion --recipe THIS.yaml
  tune:
    mode: {tune}
  loss:
    detail_warmup_steps: 0.4  # the details' loss fades in over this share of the steps
  optimizer:
    learning_rate: 1.0e-4
    lr_warmup_steps: 0.02
  loop:
    steps: {steps}
    batch_size: 2
    gradient_accumulation: 16
    max_grad_norm: 1.0
    ema_decay: 0.999
    precision: bf16
    gradient_checkpointing: true
    validate_every: {often}
    validate_at_start: true   # what the start is worth
    checkpoint_every: {often}
"""


def _upgrade_recipe(name: str, overrides: Sequence[str]) -> UpgradeRecipe:
    settings = load_recipe(name, overrides)
    if not isinstance(settings, UpgradeRecipe):
        raise DavaeError(f"recipe '{name}' does not upgrade a base: there is nothing to plan")
    return settings


def _bundled_for(base: str, resolution: int, scale: int) -> UpgradeRecipe | None:
    for name in recipe_names():
        recipe = load_recipe(name)
        if not isinstance(recipe, UpgradeRecipe):
            continue
        fits = (recipe.data.resolution, recipe.autoencoder.model.scale) == (resolution, scale)
        if recipe.base == base and fits:
            return recipe
    return None


def _detail_channels(recipe: UpgradeRecipe) -> int | tuple[int, ...]:
    channels = recipe.autoencoder.model.detail_channels
    return tuple(channels) if isinstance(channels, list) else channels


def _autoencoder_run(recipe: UpgradeRecipe) -> AutoencoderRun:
    settings = recipe.autoencoder
    return AutoencoderRun(
        **_loop(settings.loop, settings.optimizer),  # type: ignore[arg-type]
        gan=settings.reconstruction.gan.weight > 0,
        lpips=any(terms.lpips_weight for terms in (settings.reconstruction, settings.decoder_alone) if terms),
        detail_encoder=settings.train_detail_encoder,
        base_target=settings.target == "base",
        fitted_start=settings.model.start == "fitted" and settings.start_from is None,
    )


def _diffusion_run(recipe: UpgradeRecipe, architecture: Architecture) -> DiffusionRun:
    settings = recipe.diffusion
    tune = settings.tune
    targets = tune.lora.targets or find_family(architecture.pipeline).lora_targets
    mode = tune.mode
    if mode == "lora" and not targets:
        if why_untrainable(architecture.pipeline) is None:
            raise DavaeError(
                f"davae has no usual LoRA targets for {architecture.pipeline}: set diffusion.tune.lora.targets"
            )
        mode = "new_channels"  # which every transformer has; the plan says that it cannot be trained
    return DiffusionRun(
        **_loop(settings.loop, settings.optimizer),  # type: ignore[arg-type]
        mode=mode,
        lora_rank=tune.lora.rank,
        lora_targets=tuple(targets),
        frozen_dtype=tune.frozen_dtype,
        cached=bool(recipe.data.cache or recipe.data.cache_latents),
        prompt_length=settings.prompts.max_length,
        quantization=tune.quantization,
        offload_blocks=tune.offload_blocks,
    )


_OPTIMIZER_BYTES = {"adamw8bit": 2.0, "paged_adamw8bit": 2.0, "adafactor": 0.1, "prodigy": 16.0}
"""Of the state per trained parameter, where it is not two float32 numbers; Muon has one for matrices."""


def _loop(loop: LoopSettings, optimizer: OptimizerSettings) -> dict[str, object]:
    return {
        "steps": loop.steps,
        "batch_size": loop.batch_size,
        "gradient_accumulation": loop.gradient_accumulation,
        "precision": loop.precision,
        "gradient_checkpointing": loop.gradient_checkpointing,
        "ema": loop.ema_decay is not None and not loop.offload_ema,
        "validation_images": loop.validation_images,
        "optimizer_bytes": _OPTIMIZER_BYTES.get(optimizer.kind, 8.0),
    }


def _shapes(recipe: UpgradeRecipe, architecture: Architecture, made: Plan) -> list[str]:
    side = made.resolution // made.compression["upgraded"]
    channels = made.base_channels + made.detail_channels
    return [
        f"image [3, {made.resolution}, {made.resolution}] -> latent [{channels}, {side}, {side}]: "
        f"{made.base_channels} base and {made.detail_channels} detail channels, compression "
        f"{made.compression['upgraded']} -> {made.tokens['upgraded']} tokens",
        f"autoencoder: {made.parameters['autoencoder'] / 1e6:.1f}M parameters over the base's "
        f"{made.parameters['base autoencoder'] / 1e6:.1f}M; transformer: "
        f"{made.parameters['transformer'] / 1e6:.1f}M, widened {made.parameters['widened transformer'] / 1e6:.1f}M",
    ]


def _autoencoder_alone(recipe: UpgradeRecipe, architecture: Architecture) -> list[str]:
    """What is found about stage 1 on an autoencoder by itself."""
    vae = architecture.build_autoencoder(recipe.autoencoder.model.scale, _detail_channels(recipe))
    resolution = max(recipe.data.resolutions)
    layout, side = vae.layout, resolution // vae.spatial_compression
    cost = autoencoder_stage(architecture, vae, resolution, _autoencoder_run(recipe))
    return [
        f"base: {architecture.source}",
        f"image [3, {resolution}, {resolution}] -> latent [{layout.channels}, {side}, {side}]: "
        f"{layout.base_channels} base and {layout.detail_channels} detail channels, compression "
        f"{vae.spatial_compression}",
        *_data(recipe, "autoencoder"),
        f"autoencoder: {cost.trained_parameters / 1e6:.0f}M trainable parameters, {cost.memory_bytes / 1e9:.3g} GB at "
        f"batch {recipe.autoencoder.loop.batch_size}",
    ]


def _layers(recipe: UpgradeRecipe, architecture: Architecture, made: Plan) -> list[str]:
    widened = architecture.build_transformer(made.detail_channels)
    named = dict(widened.named_parameters())
    lines = ["widened layers"]
    for place in description_of(widened).fitted(widened, made.base_channels + made.detail_channels).places:
        if place.parameter in named:
            lines.append(f"  {place.parameter} {list(named[place.parameter].shape)}")
    if recipe.diffusion.tune.mode == "lora":
        run = _diffusion_run(recipe, architecture)
        lines.append(f"LoRA of rank {run.lora_rank}, layers by target")
        lines += [f"  {t}: {n}" for t, n in target_counts(widened, run.lora_targets).items()]
    return lines


def _data(recipe: UpgradeRecipe, stage: Stage) -> list[str]:
    data = recipe.data
    lines = []
    if data.path.split(":")[0] == "procedural":
        lines.append(f"data: {data.path}, rendered by davae")
    elif Path(data.path).exists():
        lines.append(f"data: {data.path} is there")
    else:
        lines.append(
            f"data: {data.path} is not here; expected is a folder of images (captions in .txt files beside them or "
            "in metadata.jsonl), WebDataset shards, or a data set's name: set data.path=..."
        )
    if len(data.resolutions) > 1:
        lines.append(f"batches of {' or '.join(map(str, data.resolutions))} pixels, planned at the largest")
    if stage == "diffusion" and data.cache:
        there = Path(data.cache).is_dir()
        lines.append(f"cache: {data.cache} {'is there' if there else 'is not here; `davae cache` writes it'}")
    return lines
