"""Training a base pipeline: an autoencoder, unless one is given, then a class-conditional transformer on it."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from davae.bases.open import load_base_autoencoder
from davae.data import Mirrored
from davae.data.cache import weights_hash
from davae.data.images.protocol import ItemDataset
from davae.data.in_memory import ImagesInMemory, MixedScales, Prepared
from davae.errors import DavaeError
from davae.latents import LatentLayout, latent_affine
from davae.models import LightningDiTTransformer2DModel
from davae.models.latent_space import compression_of, encode, open_autoencoder
from davae.models.lightningdit import restarted
from davae.pipelines import ClassConditionalPipeline, load_pipeline
from davae.planner.architectures import find_architecture
from davae.planner.memory import count_flops
from davae.planner.plan import TRANSFORMER_UTILISATION, find_gpu, hours
from davae.recipes.read import dump_recipe
from davae.recipes.settings import BaseRecipe, DiffusionSettings
from davae.runtime.atomic_files import save_whole
from davae.runtime.places import check_place
from davae.runtime.processes import claimed_by_first, is_first, loader_workers, start_processes, wait_for_everyone
from davae.runtime.resizing import reduced
from davae.training.base.autoencoder_stage import BaseAutoencoderStage, build_kl, set_factors
from davae.training.cache.write import open_cache
from davae.training.checkpoints.checkpoint import checkpoints
from davae.training.checkpoints.foundations import model_hash
from davae.training.checkpoints.run_directory import RunDirectory, data_facts
from davae.training.data import check_divides, open_part
from davae.training.diffusion import DiffusionStage
from davae.training.diffusion.inputs import prepare_inputs
from davae.training.diffusion.objective import channel_prefixes
from davae.training.loop.loop import TrainResult, train
from davae.training.statistics import measure_latents

logger = logging.getLogger(__name__)


def check_halves(recipe: BaseRecipe, out: Path) -> None:
    """Refuse, before images and weights are opened, what is no training of this recipe in ``out``."""
    check_place(out, "base run")
    plain = recipe.model_dump(mode="json")
    for half, others in (("autoencoder", BaseAutoencoderStage), ("transformer", DiffusionStage)):
        if (out / half / "config.yaml").is_file():
            RunDirectory(out / half, plain, other_sections=others.other_sections)


def train_base(recipe: BaseRecipe, out: Path, base: DiffusionPipeline | None = None) -> TrainResult:
    """Train a base pipeline into ``out/pipeline`` (runs ``out/autoencoder`` and ``out/transformer``).

    The same call continues an interrupted training. With ``data.cache_latents`` the latents stay in memory, and while
    the autoencoder is trained the images too. With ``data.cache`` and a ``base``, latents are read from that folder.
    Otherwise images are read, and encoded, on demand.

    Args:
        recipe: what to train.
        out: the folder.
        base: the pipeline of ``recipe.start_from``; its autoencoder is kept and only the transformer is trained.
    """
    check_halves(recipe, out)
    with claimed_by_first(out, "base run"):
        return _train_base(recipe, out, base)


def _train_base(recipe: BaseRecipe, out: Path, base: DiffusionPipeline | None) -> TrainResult:
    plain = recipe.model_dump(mode="json")
    data = recipe.data
    given = _given_autoencoder(recipe) if base is None else base.vae
    if given is None:
        assert recipe.autoencoder is not None
        channels = recipe.autoencoder.architecture.latent_channels
    else:
        channels = given.config.latent_channels
    channel_prefixes(recipe.transformer.loss, channels)  # refused before anything is trained
    full: ItemDataset
    images: ItemDataset
    if data.cache and base is not None:
        full = images = open_cache(data, base.vae, base)
    else:
        full, images = _training_images(recipe, keep=data.cache_latents and given is None)
    held_out = ImagesInMemory(open_part(data, "held_out"), partial(reduced, factor=recipe.downsample))
    foundations = {}
    if base is not None:
        pipeline = native_pipeline(recipe, base)
        foundations["the pipeline's transformer"] = weights_hash(base.transformer)
    elif given is not None:
        foundations["the pretrained autoencoder"] = model_hash(given)
        pipeline = _new_pipeline(recipe, normalised(given, recipe, out, images), images.classes)
    else:
        pipeline = _new_pipeline(recipe, _trained_autoencoder(recipe, out, full, images, held_out), images.classes)
    settings = DiffusionSettings(**{k: getattr(recipe.transformer, k) for k in _SHARED_SECTIONS})
    layout = LatentLayout(pipeline.vae.config.latent_channels, 0)
    inputs = prepare_inputs(
        pipeline,
        pipeline.vae,
        settings,
        images,
        held_out,
        cache_latents=data.cache_latents and not data.cache,
        workers=loader_workers(data.workers),
        timeout_s=data.timeout_s,
    )
    diffusion = DiffusionStage(pipeline, layout, settings, inputs)
    diffusion.section = "transformer"
    diffusion.foundations = {"the autoencoder": model_hash(pipeline.vae), **foundations}
    diffusion.facts = data_facts(data, held_out)
    result = train(diffusion, out / "transformer", plain)
    assert result is not None
    if is_first():  # the result on disk has the averaged weights, the pipeline in memory the last ones
        averaged = load_pipeline(result.result)
        averaged.to(getattr(torch, recipe.save_dtype))
        save_whole(averaged, out / "pipeline")
    wait_for_everyone()
    return result


def native_pipeline(recipe: BaseRecipe, base: DiffusionPipeline) -> ClassConditionalPipeline:
    """The initial pipeline of a native fine-tune: the base at the recipe's resolution, with ``start_from``'s options.

    Raises:
        DavaeError: the base is not class-conditional, or the resolution is not a multiple of compression times patch.
    """
    start = recipe.start_from
    assert start is not None
    if not isinstance(base, ClassConditionalPipeline):
        raise DavaeError(
            f"start_from.pipeline is a {type(base).__name__}; only a ClassConditionalPipeline can be "
            "fine-tuned at its own compression"
        )
    unit = base.vae_scale_factor * (start.patch_size or base.transformer.config.patch_size)
    side = recipe.data.resolution // recipe.downsample
    check_divides(side, unit)
    torch.manual_seed(recipe.transformer.loop.seed)
    transformer = restarted(
        base.transformer, sample_size=side // base.vae_scale_factor, patch_size=start.patch_size, qk_norm=start.qk_norm
    )
    parts = {"vae": base.vae, "scheduler": base.scheduler, "id2label": base.config.id2label}
    return ClassConditionalPipeline(transformer=transformer, **parts)


def _training_images(recipe: BaseRecipe, *, keep: bool) -> tuple[ItemDataset, ItemDataset]:
    """The training images at full and at the base's resolution; kept in memory if ``keep``, else read on demand."""
    found = open_part(recipe.data, "train")
    if not keep:
        if recipe.downsample == 1:
            return found, found
        return found, Prepared(found, partial(_reduced_item, factor=recipe.downsample))
    full = ImagesInMemory(found.unmirrored())
    small = full
    if recipe.downsample > 1:
        small = ImagesInMemory(full, partial(reduced, factor=recipe.downsample))
    return (Mirrored(full, found.seed), Mirrored(small, found.seed)) if found.flip else (full, small)


_DECODES = (AutoencoderKL, AutoencoderDC, AutoencoderTiny)


def _given_autoencoder(recipe: BaseRecipe) -> ModelMixin | None:
    """The autoencoder that a recipe names; None if it trains one.

    Raises:
        DavaeError: it cannot be opened, is of a class that class-conditional pipelines do not decode with, or its
            compression does not divide the images.
    """
    name, shape = recipe.pretrained_autoencoder, recipe.transformer.architecture
    if name is None:
        return None
    vae = load_base_autoencoder(name)
    if not isinstance(vae, _DECODES):
        known = ", ".join(known.__name__ for known in _DECODES)
        raise DavaeError(
            f"pretrained_autoencoder is a {type(vae).__name__} ({name}): a class-conditional pipeline decodes with "
            f"{known}"
        )
    assert shape is not None  # the recipe's validation
    check_divides(recipe.data.resolution // recipe.downsample, compression_of(vae) * shape.patch_size)
    return vae


def normalised(vae: ModelMixin, recipe: BaseRecipe, out: Path, images: ItemDataset) -> ModelMixin:
    """A pretrained autoencoder with the scaling that its configuration states, or else with a measured one.

    What is measured is scaling and shift factor by which the latents of ``images`` have mean 0 and variance 1. They are
    kept with the autoencoder in ``out/autoencoder/vae``: a transformer that has begun stands on them. All ranks must
    call this.
    """
    shift, scale = latent_affine(vae.config, vae.config.latent_channels)
    if shift.any() or (scale != 1).any():
        return vae
    folder = out / "autoencoder" / "vae"
    if not (_is_saved(folder) and checkpoints(out / "transformer" / "checkpoints")):
        workers, timeout_s = loader_workers(recipe.data.workers), recipe.data.timeout_s
        vae.eval().to(start_processes().device)
        measured = measure_latents(
            images, partial(encode, vae), vae.config.latent_channels, workers=workers, timeout_s=timeout_s
        )
        set_factors(vae.to("cpu"), measured)
        if is_first():
            save_whole(vae, folder)
        wait_for_everyone()
    return open_autoencoder(folder)


def _trained_autoencoder(
    recipe: BaseRecipe, out: Path, full: ItemDataset, images: ItemDataset, held_out: ImagesInMemory
) -> ModelMixin:
    """Train the autoencoder, unless its result exists."""
    shape = recipe.transformer.architecture
    assert recipe.autoencoder is not None and shape is not None  # noqa: PT018 (the recipe's validation)
    compression = 2 ** (len(recipe.autoencoder.architecture.block_out_channels) - 1)
    check_divides(recipe.data.resolution // recipe.downsample, compression * shape.patch_size)
    reduce = partial(reduced, factor=recipe.downsample)
    vae_folder = out / "autoencoder" / "vae"
    plain = recipe.model_dump(mode="json")
    begun = checkpoints(out / "transformer" / "checkpoints")  # it stands on the autoencoder and knows its weights
    if not _is_saved(vae_folder) or (not begun and checkpoints(out / "autoencoder" / "checkpoints")):
        workers, timeout_s = loader_workers(recipe.data.workers), recipe.data.timeout_s
        kept = full.unmirrored()
        if workers and isinstance(kept, ImagesInMemory):
            kept.read_all(workers, timeout_s)
        mixed = MixedScales(full, reduce, recipe.full_resolution_crops, recipe.autoencoder.loop.seed)
        stage = BaseAutoencoderStage(recipe.autoencoder, mixed, images, held_out, workers=workers, timeout_s=timeout_s)
        stage.facts = data_facts(recipe.data, full)
        train(stage, out / "autoencoder", plain)
    elif (out / "autoencoder" / "config.yaml").is_file():
        run = RunDirectory(out / "autoencoder", plain, other_sections=BaseAutoencoderStage.other_sections)
        unused = [change for change in run.changed() if change.startswith("autoencoder.")]
        if unused:
            logger.warning("%s is finished and stays as it is, without %s", run.path, "; ".join(unused))
    return open_autoencoder(vae_folder)


def _new_pipeline(recipe: BaseRecipe, vae: ModelMixin, classes: Sequence[str]) -> ClassConditionalPipeline:
    """A random transformer on an autoencoder."""
    shape = recipe.transformer.architecture
    assert shape is not None  # the recipe's validation
    torch.manual_seed(recipe.transformer.loop.seed)
    transformer = LightningDiTTransformer2DModel(
        sample_size=recipe.data.resolution // recipe.downsample // compression_of(vae),
        in_channels=vae.config.latent_channels,
        num_classes=len(classes),
        **shape.model_dump(),
    )
    return ClassConditionalPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        id2label=dict(enumerate(classes)),
    )


def _is_saved(model: Path) -> bool:
    """Whether a model's folder is complete; earlier versions could leave part of it."""
    weights = model / SAFETENSORS_WEIGHTS_NAME
    if not ((model / "config.json").is_file() and weights.is_file()):
        return False
    try:
        with safe_open(weights, "pt"):  # compares the file's length with its header
            return True
    except SafetensorError:
        return False


_SHARED_SECTIONS = ("timesteps", "loss", "optimizer", "loop", "sample")


def _reduced_item(item: dict[str, Any], factor: int) -> dict[str, Any]:
    return {**item, "image": reduced(item["image"][None], factor)[0]}


_CLASSES = 1000  # assumed for a new transformer, whose data set need not be present


def dry_run_base(recipe: BaseRecipe) -> str:
    """Check a base recipe without loading weights; returns it as YAML, with sizes and costs as comments.

    Raises:
        DavaeError: the pipeline to start from is unknown, or sizes do not fit.
    """
    transformer, compression, what = _transformer(recipe)
    config, loop = transformer.config, recipe.transformer.loop
    side = recipe.data.resolution // recipe.downsample
    check_divides(side, compression * config.patch_size)
    grid = side // compression
    tokens = (grid // config.patch_size) ** 2
    batch = loop.batch_size * loop.gradient_accumulation
    passes = 4 if loop.gradient_checkpointing else 3  # forward, backward (twice its cost), recomputed forward
    step = passes * batch * _forward_flops(transformer, grid)
    device = find_gpu("H100")
    needed = hours(step * loop.steps, device, TRANSFORMER_UTILISATION)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    found = [
        what,
        f"image [3, {side}, {side}] -> latent [{config.in_channels}, {grid}, {grid}], patch {config.patch_size} -> "
        f"{tokens} tokens",
        f"transformer: {count / 1e6:.1f}M parameters",
        f"transformer training: {step / 1e12:.3g} TFLOP per step of {batch} images, {needed:.3g} hours on one "
        f"{device.name} for {loop.steps:,} steps",
    ]
    if not (recipe.data.cache or recipe.data.cache_latents):
        encoding = batch * _encoding_flops(recipe, side)
        found.append(f"encoding images during training: {encoding / 1e12:.3g} TFLOP more per step")
    return dump_recipe(recipe) + "\n" + "\n".join(f"# {line}" for line in found)


def _transformer(recipe: BaseRecipe) -> tuple[LightningDiTTransformer2DModel, int, str]:
    """The transformer on the meta device, its autoencoder's compression, and a line on where both come from."""
    start = recipe.start_from
    if start is not None:
        architecture = find_architecture(start.pipeline)
        compression = architecture.base_compression
        side = recipe.data.resolution // recipe.downsample
        model = restarted(
            architecture.build_transformer(),
            sample_size=max(1, side // compression),
            patch_size=start.patch_size,
            qk_norm=start.qk_norm,
        )
        return (model, compression, f"starts from {architecture.name}, whose autoencoder (f{compression}) is kept")
    shape = recipe.transformer.architecture
    assert shape is not None  # the recipe's validation
    vae = _autoencoder_on_meta(recipe)
    compression = compression_of(vae)
    with torch.device("meta"):
        model = LightningDiTTransformer2DModel(
            sample_size=max(1, recipe.data.resolution // recipe.downsample // compression),
            in_channels=vae.config.latent_channels,
            num_classes=_CLASSES,
            **shape.model_dump(),
        )
    given = recipe.pretrained_autoencoder
    if given is not None:
        what = f"transformer from scratch, on the autoencoder (f{compression}) of {given}, which is kept"
    else:
        what = f"from scratch: autoencoder (f{compression}), then transformer"
    return model, compression, what


def _autoencoder_on_meta(recipe: BaseRecipe) -> ModelMixin:
    """The autoencoder of a transformer from scratch, without weights."""
    if recipe.pretrained_autoencoder is not None:
        return find_architecture(recipe.pretrained_autoencoder).build_vae()
    assert recipe.autoencoder is not None  # the recipe's validation
    with torch.device("meta"):
        return build_kl(recipe.autoencoder.architecture)


def _encoding_flops(recipe: BaseRecipe, side: int) -> int:
    """FLOPs of encoding one image."""
    with torch.device("meta"):
        if recipe.start_from is not None:
            vae = find_architecture(recipe.start_from.pipeline).build_vae()
        else:
            vae = _autoencoder_on_meta(recipe)
        image = torch.empty(1, 3, side, side)
    return count_flops(lambda: vae.eval().encode(image))


def _forward_flops(transformer: LightningDiTTransformer2DModel, grid: int) -> int:
    """FLOPs of one image's forward pass."""
    with torch.device("meta"):
        latent, time = torch.empty(1, transformer.config.in_channels, grid, grid), torch.empty(1)
        label = torch.empty(1, dtype=torch.long)
    return count_flops(lambda: transformer.eval()(latent, time, label))
