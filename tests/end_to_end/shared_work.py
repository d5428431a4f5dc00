"""Validation, encoding and caching as several processes do them; the first one says what it saw."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from davae.bases.open import load_base
from davae.data import open_dataset
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.upgrade import layout_over
from davae.recipes.read import load_recipe
from davae.runtime.processes import everyone, is_first, start_processes
from davae.training.autoencoder.stage import AutoencoderStage
from davae.training.cache.write import write_cache
from davae.training.diffusion import DiffusionStage
from davae.training.diffusion.inputs import prepare_inputs

IMAGES = 11
HELD_OUT = 5  # so that two processes have different numbers of them


def work(out: Path) -> dict:
    """Everything that is shared out, once; what came of it, in the first process."""
    found = {}
    for base in ("debug", "debug-sd3"):
        recipe = _recipe(base)
        data = recipe.data
        images, held_out = (
            open_dataset(data.path, resolution=data.resolution, hold_out=HELD_OUT, part=part)
            for part in ("train", "held_out")
        )
        pipe = load_base(base)
        torch.manual_seed(0)
        vae = AutoencoderDA.from_base(pipe.vae, scale=2, detail_channels=8)
        vae.set_detail_statistics(torch.zeros(8), torch.ones(8))
        if base == "debug":
            stage = AutoencoderStage(vae, recipe.autoencoder, images, held_out)
            found["autoencoder"] = _validated(stage, out / "autoencoder")
        write_cache(data, vae, load_base(base), out / f"cache-{base}", shard_records=3)
        upgraded = upgrade_pipeline(pipe, vae)
        stage2 = DiffusionStage(
            upgraded,
            layout_over(load_base(base).vae, vae),
            recipe.diffusion,
            prepare_inputs(upgraded, vae, recipe.diffusion, images, held_out),
            before=load_base(base),
        )
        found[f"latents-{base}"] = [float(stage2.dataset[i]["latent"].double().sum()) for i in range(len(images))]
        if base == "debug-sd3":
            kept = stage2.conditions.kept
            found["texts"] = {
                text: sum(float(v.double().sum()) for v in named.values()) for text, named in kept.items()
            }
        found[f"diffusion-{base}"] = _validated(stage2, out / f"diffusion-{base}")
    everywhere = everyone(found)
    for other in everywhere[1:]:  # all know the same latents, not only their own
        assert other["latents-debug"] == everywhere[0]["latents-debug"]
        assert other["texts"] == everywhere[0]["texts"]
    return found


def _recipe(base: str):
    loop = ("validation_images=5", "batch_size=2")
    options = [f"{stage}.loop.{k}" for stage in ("autoencoder", "diffusion") for k in loop]
    return load_recipe(
        "debug",
        [
            f"base={base}",
            f"data.path=procedural:{IMAGES}",
            f"data.hold_out={HELD_OUT}",
            "data.flip=true",
            "diffusion.sample.num_inference_steps=2",
            *options,
        ],
    )


def _validated(stage, samples: Path) -> dict[str, float]:
    stage.modules[0].module.eval()
    with torch.no_grad():
        return stage.validate(samples, 1)


def main(folder: Path) -> None:
    """What one of the processes does."""
    start_processes()
    seen = work(folder)
    if is_first():
        (folder / "seen.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
