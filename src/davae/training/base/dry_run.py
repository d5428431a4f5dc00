"""Dry runs of base recipes: the transformer on the meta device, its tokens, and what the training costs."""

from __future__ import annotations

import torch

from davae.models import LightningDiTTransformer2DModel
from davae.models.lightningdit import restarted
from davae.planner.architectures import find_architecture
from davae.planner.flops import count_flops
from davae.planner.hours import TRANSFORMER_UTILISATION, find_gpu, hours
from davae.recipes.read import dump_recipe
from davae.recipes.settings import BaseRecipe
from davae.training.base.autoencoder_stage import build_kl
from davae.training.base.train import check_divides

_CLASSES = 1000  # of a transformer from nothing, whose data set need not be here


def dry_run_base(recipe: BaseRecipe, *, gpu: str = "H100") -> str:
    """Check a base recipe without weights and tell what it will do, as YAML: what is found stands in comments.

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
    passes = 4 if loop.gradient_checkpointing else 3  # forward, backward of twice its cost, forward again
    step = passes * batch * _forward_flops(transformer, grid)
    device = find_gpu(gpu)
    needed = hours(step * loop.steps, device, TRANSFORMER_UTILISATION)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    found = [
        what,
        f"image [3, {side}, {side}] -> latent [{config.in_channels}, {grid}, {grid}], patch {config.patch_size} -> "
        f"{tokens} tokens",
        f"transformer: {count / 1e6:.1f}M parameters",
        f"transformer training: {step / 1e12:.3g} TFLOP a step of {batch} images, {needed:.3g} hours of one "
        f"{device.name} for {loop.steps:,} steps",
    ]
    if not (recipe.data.cache or recipe.data.cache_latents):
        encoding = batch * _encoding_flops(recipe, side)
        found.append(f"encoding images as training goes: {encoding / 1e12:.3g} TFLOP a step besides")
    return dump_recipe(recipe) + "\n" + "\n".join(f"# {line}" for line in found)


def _transformer(recipe: BaseRecipe) -> tuple[LightningDiTTransformer2DModel, int, str]:
    """On the meta device, with the compression of its autoencoder and where both come from."""
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
        return (
            model,
            compression,
            f"starts from {architecture.name}, whose autoencoder (f{compression}) is kept",
        )
    shape = recipe.transformer.architecture
    assert recipe.autoencoder is not None and shape is not None  # noqa: PT018 (the recipe's validation)
    autoencoder = recipe.autoencoder.architecture
    compression = 2 ** (len(autoencoder.block_out_channels) - 1)
    with torch.device("meta"):
        model = LightningDiTTransformer2DModel(
            sample_size=max(1, recipe.data.resolution // recipe.downsample // compression),
            in_channels=autoencoder.latent_channels,
            num_classes=_CLASSES,
            **shape.model_dump(),
        )
    return model, compression, f"from nothing: autoencoder (f{compression}), then transformer"


def _encoding_flops(recipe: BaseRecipe, side: int) -> int:
    """Operations of encoding one image."""
    with torch.device("meta"):
        if recipe.start_from is not None:
            vae = find_architecture(recipe.start_from.pipeline).build_vae()
        else:
            assert recipe.autoencoder is not None
            vae = build_kl(recipe.autoencoder.architecture)
        image = torch.empty(1, 3, side, side)
    return count_flops(lambda: vae.eval().encode(image))


def _forward_flops(transformer: LightningDiTTransformer2DModel, grid: int) -> int:
    """Operations of one image's forward."""
    with torch.device("meta"):
        latent, time = torch.empty(1, transformer.config.in_channels, grid, grid), torch.empty(1)
        label = torch.empty(1, dtype=torch.long)
    return count_flops(lambda: transformer.eval()(latent, time, label))
