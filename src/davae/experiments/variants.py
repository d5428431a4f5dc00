"""One variant of an ablation with one seed: trained, unless it was, and measured."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from davae.bases.open import load_recipe_base
from davae.data import ItemDataset
from davae.data.cache import value_hash
from davae.evaluation.features import FeatureNetwork
from davae.evaluation.images import spread_batches
from davae.evaluation.latent_space.separability import linear_probe
from davae.evaluation.metrics.image_set import ImageSet, compare_sets
from davae.evaluation.metrics.names import BASE_ENLARGED, DECODER_ALONE, OF_BASE, UPGRADED, alone, current_way
from davae.evaluation.reconstruction.baselines import compare_reconstructions
from davae.evaluation.reconstruction.details import MEANING
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.saving.opening import load_autoencoder, load_pipeline
from davae.recipes.read import with_later_settings
from davae.recipes.settings import AblationRecipe, BaseRecipe, BaseTransformerSettings, UpgradeRecipe
from davae.runtime.atomic_files import atomic_json, folder_hash
from davae.runtime.pictures import to_bytes
from davae.runtime.pixel_budget import images_together, in_parts
from davae.runtime.places import safe_name
from davae.runtime.resizing import upscaled
from davae.runtime.text_files import read_object
from davae.runtime.weight_files import atomic_tensors
from davae.training.base.train import train_base
from davae.training.cache.write import write_cache
from davae.training.checkpoints.run_directory import read_config, read_metrics
from davae.training.data import open_held_out, open_part
from davae.training.diffusion.inputs import details_seed_of
from davae.training.diffusion.validation import decoded_latents, generate_classes, has_previews, preview
from davae.training.runs.train import train_autoencoder, train_diffusion

logger = logging.getLogger(__name__)
NATIVE = "native, equal tokens"
_BATCH = 32  # images at a time through the metrics


class Autoencoders:
    """Trains and measures the autoencoders of variants."""

    def __init__(self, networks: list[FeatureNetwork], out: Path) -> None:
        self.networks, self.out = networks, out
        self.baselines: dict[str, list[dict[str, float]]] = {}

    def figures(self, name: str, case: UpgradeRecipe, seed: int) -> tuple[dict[str, float], Path]:
        """Metrics of a variant's autoencoder, on all held-out images as its baselines, and its run."""
        autoencoder, trained = _autoencoder(case, self.out)
        rows = self._measured(case, autoencoder)
        measured = dict(rows[UPGRADED])
        measured |= {f"{metric}/{row}": value for row in MEANING for metric, value in rows.get(row, {}).items()}
        return trained | {f"autoencoder_{metric}": value for metric, value in measured.items()}, autoencoder.parent

    def add_baselines(self, cases: Mapping[str, UpgradeRecipe], seed: int) -> None:
        """The decoder alone of each autoencoder of this seed, and once the ways to reconstruct that need no training.

        Args:
            cases: all variants with this seed, by name.
            seed: for the log.
        """
        autoencoders = {name: _autoencoder(case, self.out)[0] for name, case in cases.items()}
        measured = {name: self._measured(cases[name], folder) for name, folder in autoencoders.items()}
        for row, name in _decoders_alone(autoencoders).items():
            self._add(row, measured[name][DECODER_ALONE])
        for row, figures in next(iter(measured.values())).items():
            if row not in (UPGRADED, DECODER_ALONE, *MEANING) and row not in self.baselines:
                self._add(row, figures)

    def _add(self, row: str, figures: Mapping[str, float]) -> None:
        named = {f"autoencoder_{metric}": value for metric, value in figures.items()}
        self.baselines.setdefault(row, []).append(named)

    def real(self, case: UpgradeRecipe) -> dict[str, float]:
        """No samples, so nothing to compare them with."""
        return {}

    def _measured(self, case: UpgradeRecipe, autoencoder: Path) -> dict[str, dict[str, float]]:
        """Figures of every way to reconstruct the held-out images, kept beside the autoencoder.

        What variants have in common, the rows of the base and of the reduced image, is measured with the first of them.
        """
        names = [network.name for network in self.networks]
        file = autoencoder.parent / f"reconstruction-{_short_hash(names)}.json"
        common = {"base": case.base, "data": case.data.model_dump(mode="json"), "scale": case.autoencoder.model.scale}
        shared = self.out / "autoencoders" / f"base-{_short_hash([names, common])}.json"
        if not file.is_file():
            vae, images = load_autoencoder(autoencoder), open_held_out(case.data)
            count = images_together(case.data.resolution, case.data.resolution)
            batches = (
                torch.stack([item["image"] for item in part]) for part in spread_batches(images, len(images), count)
            )
            rows = compare_reconstructions(vae, batches, networks=self.networks, of_base=not shared.is_file()).rows
            figures = {name: row.figures for name, row in rows.items()}
            figures[UPGRADED] |= _probes(vae, images)
            if not shared.is_file():
                atomic_json(shared, {name: row for name, row in figures.items() if name in OF_BASE})
            atomic_json(file, {name: row for name, row in figures.items() if name not in OF_BASE})
        found = read_object(file) | (read_object(shared) if shared.is_file() else {})
        return {current_way(name): row for name, row in found.items()}


def _decoders_alone(autoencoders: Mapping[str, Path]) -> dict[str, str]:
    """Rows for the decoders alone, with the first variant of each autoencoder that has details.

    Args:
        autoencoders: folders by variant; variants may share one.
    """
    found: dict[Path, str] = {}
    for name, folder in autoencoders.items():
        if read_object(folder / "config.json").get("detail_dropout", 0) < 1:
            found.setdefault(folder, name)
    only = len(found) == 1 and DECODER_ALONE not in autoencoders
    return {DECODER_ALONE if only else alone(name): name for name in found.values()}


class Pipelines:
    """Trains and measures the pipelines of variants."""

    def __init__(self, recipe: AblationRecipe, networks: list[FeatureNetwork], out: Path) -> None:
        self.recipe, self.networks, self.out = recipe, networks, out
        self.baselines: dict[str, list[dict[str, float]]] = {}
        self._held_out: dict[str, ImageSet] = {}  # variants may differ in their data

    def figures(self, name: str, case: UpgradeRecipe, seed: int) -> tuple[dict[str, float], Path]:
        """Metrics of a variant's pipeline, and its run."""
        folder = self.out / "runs" / safe_name(name) / f"seed-{seed}"
        trained = _trained(case, folder, self.out)
        return trained | self._distances_of_samples(case, folder), folder

    def add_baselines(self, cases: Mapping[str, UpgradeRecipe], seed: int) -> None:
        """The base's samples of this seed, enlarged and decoded by each decoder alone; the native fine-tune, if wanted.

        Args:
            cases: all variants with this seed, by name.
            seed: of the native fine-tune.
        """
        trained = {name: _autoencoder(case, self.out) for name, case in cases.items()}
        rows = {BASE_ENLARGED: next(iter(cases))} | _decoders_alone(
            {name: folder for name, (folder, _) in trained.items()}
        )
        for row, name in rows.items():
            case, (autoencoder, figures) = cases[name], trained[name]
            larger = row != BASE_ENLARGED
            folder, measured = self.out / "base", f"psnr_{'no_details' if larger else 'base_upscaled'}"
            images = base_images(case, autoencoder if larger else None, self.recipe.samples, folder)
            found = self._distances(case, images, folder)
            if not isinstance(case.autoencoder.model.detail_channels, list):  # of nested ones only the last is left out
                found["autoencoder_psnr"] = figures[f"autoencoder_{measured}"]
            self.baselines.setdefault(row, []).append(found)
        if self.recipe.native:
            case = next(iter(cases.values()))
            logger.info("ablation: %s, seed %d", NATIVE, seed)
            folder = self.out / "native" / f"seed-{seed}"
            train_native(case, folder)
            self.baselines.setdefault(NATIVE, []).append(self._distances_of_samples(case, folder))

    def real(self, case: UpgradeRecipe) -> dict[str, float]:
        """The distances of training images to the held-out ones."""
        return self._distances(case, real_images(case, "train", self.recipe.samples), self.out)

    def _distances_of_samples(self, case: UpgradeRecipe, folder: Path) -> dict[str, float]:
        """Distances of the samples, and under ``preview_`` of what the base makes of their base channels, enlarged."""
        made = generated_images(case, folder / "pipeline", self.recipe.samples, folder)
        found = self._distances(case, made["images"], folder)
        if "previews" in made:
            previews = self._distances(case, made["previews"], folder)
            found |= {f"preview_{metric}": value for metric, value in previews.items()}
        return found

    def _distances(self, case: UpgradeRecipe, images: Tensor, folder: Path) -> dict[str, float]:
        """Distances of images to the held-out ones, kept in ``folder`` by what was measured."""
        data, networks = case.data.model_dump_json(), [network.name for network in self.networks]
        asked = [hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest(), data, networks]
        file = folder / f"distances-{_short_hash(asked)}.json"
        if not file.is_file():
            if data not in self._held_out:
                held_out = real_images(case, "held_out")
                self._held_out[data] = ImageSet(self.networks).extend(held_out.split(_BATCH))
            found = ImageSet(self.networks).extend(images.split(_BATCH))
            atomic_json(file, compare_sets(found, self._held_out[data]).figures)
        return read_object(file)


def _short_hash(value: Any) -> str:
    """Part of a name: what was made with these values."""
    return value_hash(value).removeprefix("sha256:")[:12]


@torch.no_grad()
def _probes(vae: AutoencoderDA, images: ItemDataset) -> dict[str, float]:
    """Accuracy of linear probes of base, detail and structured latents over the images' classes, if they have any.

    A probe needs one latent of a class to fit and one to score: classes of a single image are left out.
    """
    items = [images[i] for i in range(len(images))]
    labels = torch.tensor([item["label"] for item in items])
    several = (labels[:, None] == labels).sum(dim=1) > 1
    items, labels = [item for item, kept in zip(items, several) if kept], labels[several]
    if not items or int(labels.min()) < 0 or len(labels.unique()) < 2:
        return {}
    parts = in_parts(torch.stack([item["image"] for item in items]))
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
    z, details = vae.layout.split(latents)
    named = {"base": z, "detail": details, "structured": latents}
    return {f"probe/{name}": linear_probe(part, labels).mean for name, part in named.items()}


def curve_of(run: Path) -> dict[int, dict[str, float]]:
    """Metrics of a run's validations by step."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "learning_rate" not in line]
    return {line["step"]: {k: v for k, v in line.items() if k != "step" and isinstance(v, float)} for line in lines}


def train_native(case: UpgradeRecipe, out: Path) -> Path:
    """Fine-tune the base at full size in as many tokens as its upgrade, by the settings of the upgrade's stage 2.

    Args:
        case: the upgrade.
        out: the run; finished work in it is not repeated.

    Returns:
        The pipeline's folder.
    """
    folder = out / "pipeline"
    if not folder.is_dir():
        base, stage = load_recipe_base(case), case.diffusion.model_dump()
        recipe = {
            "kind": "base",
            "description": f"native fine-tune of {case.base}",
            "data": case.data.model_dump(),
            "start_from": {
                "pipeline": case.base,
                "patch_size": case.autoencoder.model.scale * base.transformer.config.patch_size,
            },
            "transformer": {key: stage[key] for key in BaseTransformerSettings.model_fields if key in stage},
        }
        train_base(BaseRecipe.model_validate(recipe), out, base)
    return folder


def _trained(recipe: UpgradeRecipe, folder: Path, out: Path) -> dict[str, float]:
    """Validation metrics of both stages, trained unless finished; the pipeline is in ``folder/pipeline``."""
    done = folder / "result.json"
    if not done.is_file():
        autoencoder, figures = _autoencoder(recipe, out)
        trained = train_diffusion(_from_cache(recipe, autoencoder), folder, autoencoder)
        figures |= {k: v for k, v in trained.metrics.items() if k.startswith(("held_out_", "preview_"))}
        atomic_json(done, figures)
    return read_object(done)


def _from_cache(recipe: UpgradeRecipe, autoencoder: Path) -> UpgradeRecipe:
    """With ``data.cache_latents`` latents are encoded once for all variants of an autoencoder, and lie beside it."""
    if not recipe.data.cache_latents:
        return recipe
    kept: dict[str, Any] = {
        "text_length": recipe.diffusion.prompts.max_length,
        "details_seed": details_seed_of(recipe.diffusion),
    }
    folder = autoencoder.parent / f"cache-{_short_hash(kept)}"
    open_base = partial(load_recipe_base, recipe, without=("vae", "transformer"))
    write_cache(recipe.data, load_autoencoder(autoencoder), open_base(), folder, reopen=open_base, **kept)
    data = recipe.data.model_copy(update={"cache": str(folder), "cache_latents": False})
    return recipe.model_copy(update={"data": data})


def _autoencoder(recipe: UpgradeRecipe, out: Path) -> tuple[Path, dict[str, float]]:
    """The autoencoder of these settings, trained unless another variant did, and its metrics."""
    folder = _autoencoder_folder(recipe.model_dump(mode="json"), out / "autoencoders")
    done = folder / "result.json"
    if not done.is_file():
        trained = train_autoencoder(recipe, folder)
        atomic_json(done, {f"autoencoder_{k}": v for k, v in trained.metrics.items()})
    return folder / "autoencoder", read_object(done)


def _autoencoder_folder(settings: dict[str, Any], place: Path) -> Path:
    """The run of these settings, which an earlier version may have named without settings that were added since."""
    asked = {key: settings[key] for key in ("base", "data", "autoencoder")}
    folder = place / _short_hash(asked)
    if not folder.is_dir():
        for file in sorted(place.glob("*/config.yaml")):
            known = with_later_settings(read_config(file) or {})
            if all(known.get(key) == value for key, value in asked.items()):
                return file.parent
    return folder


def real_images(recipe: UpgradeRecipe, part: Literal["train", "held_out"], count: int | None = None) -> Tensor:
    """The first ``count`` images (by default all) of a part of the data, ``[N, 3, R, R]`` in [-1, 1].

    They are squares at ``data.resolution``, without buckets and the sets of other resolutions.
    """
    squares, side = recipe.data.model_copy(update={"buckets": False}), recipe.data.resolution
    images = open_part(squares, "train") if part == "train" else open_held_out(squares)
    found = (images[i]["image"] for i in range(len(images)))
    return torch.stack(list(islice((image for image in found if image.shape[-1] == side), count)))


def generated_images(recipe: UpgradeRecipe, pipeline: Path, count: int, folder: Path) -> dict[str, Tensor]:
    """Samples, cycling through the held-out images' classes: ``images``, and of an upgraded pipeline ``previews``.

    Both are ``[count, 3, H, W]`` in [-1, 1], rounded to 8 bits; previews are what the base decodes from the base
    channels of the same latents, enlarged bicubically. They are stored in ``folder``, in a file named by a hash of
    pipeline, count and settings, and read from it if it exists.
    """
    made_with = [
        folder_hash(pipeline),
        count,
        recipe.diffusion.sample.model_dump(mode="json"),
        recipe.diffusion.loop.seed,
    ]
    file = folder / f"samples-{_short_hash(made_with)}.safetensors"
    return _kept(file, lambda: _samples(recipe, load_pipeline(pipeline), count))


def base_images(recipe: UpgradeRecipe, autoencoder: Path | None, count: int, folder: Path) -> Tensor:
    """The base's own samples as :func:`generated_images` makes them, at full resolution.

    Args:
        recipe: names the base, the classes and how to sample.
        autoencoder: whose joint decoder decodes them without details; None enlarges the base's images bicubically.
        count: how many.
        folder: for the file they are kept in.
    """
    made_with = [
        None if autoencoder is None else folder_hash(autoencoder),
        *(recipe.base, recipe.base_revision, count, recipe.diffusion.sample.model_dump(mode="json")),
        *(recipe.diffusion.loop.seed, recipe.data.model_dump(mode="json")),
    ]

    def make() -> dict[str, Tensor]:
        base, side = load_recipe_base(recipe), recipe.data.resolution
        if autoencoder is not None:
            base = upgrade_pipeline(base, load_autoencoder(autoencoder).without_details())
        made = _samples(recipe, base, count)["images"]
        return {"images": made if autoencoder is not None else upscaled(made, (side, side))}

    file = folder / f"samples-{_short_hash(made_with)}.safetensors"
    return _kept(file, make)["images"]


@torch.no_grad()
def _samples(recipe: UpgradeRecipe, pipe: DiffusionPipeline, count: int) -> dict[str, Tensor]:
    held_out = open_held_out(recipe.data)
    labels = sorted({held_out[i]["label"] for i in range(len(held_out))} - {-1})
    known = dict(pipe.labels)
    numbers = [known[held_out.classes[label]] for label in labels if held_out.classes[label] in known]
    with decoded_latents(pipe.vae) as latents:
        images = generate_classes(pipe, numbers or [0], count, recipe.diffusion.sample, seed=recipe.diffusion.loop.seed)
    if not has_previews(pipe.vae):
        return {"images": images}
    previews = torch.cat([upscaled(preview(pipe.vae, z), images.shape[-2:]) for z in latents])
    return {"images": images, "previews": previews}


def _kept(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Images in [-1, 1], rounded to 8 bits: those of the file, which is made if it does not exist."""
    if not file.is_file():
        atomic_tensors(file, {name: to_bytes(images).to(torch.uint8) for name, images in make().items()})
    return {name: images.float() / 127.5 - 1 for name, images in load_file(file).items()}
