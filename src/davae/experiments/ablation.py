"""``davae ablate``: what each part of the method contributes.

Every variant is trained with every seed. Variants that differ only in the diffusion stage share the autoencoder of
the same seed. Finished work is not repeated, so the same command continues an interrupted ablation.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from davae.bases.open import load_recipe_base
from davae.data.cache import value_hash
from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork, open_network
from davae.evaluation.generation.image_run import contents_hash
from davae.evaluation.metrics.image_set import ImageSet, compare_sets
from davae.pipelines.saving.opening import load_pipeline
from davae.recipes.checks import check_settings
from davae.recipes.read import load_variant
from davae.recipes.settings import AblationRecipe, UpgradeRecipe
from davae.runtime.atomic_files import atomic_json, folder_hash
from davae.runtime.pictures import to_bytes
from davae.runtime.places import check_place, safe_name
from davae.runtime.processes import claimed_by_first
from davae.runtime.text_files import read_object
from davae.runtime.weight_files import atomic_tensors
from davae.training.checkpoints.run_directory import environment
from davae.training.data import open_held_out, open_part
from davae.training.diffusion.validation import generate_classes
from davae.training.runs.train import train_autoencoder, train_diffusion

logger = logging.getLogger(__name__)
_STANDS_ON = "what it stands on, the weights of a base or the images,"
_BATCH = 32  # images at a time through the metrics


@dataclass(frozen=True)
class Spread:
    """A metric over the seeds: its mean, sample standard deviation (0 for one seed) and values."""

    mean: float
    std: float
    values: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of one or more values."""
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0, values)


@dataclass(frozen=True)
class Ablation:
    """Results of an ablation.

    Attributes:
        seeds: finished so far, the same for every variant.
        samples: number of images behind each generation metric.
        variants: spread by variant and metric. Metrics of the autoencoder begin with ``autoencoder_``; the others are
            losses on held-out images, and distances of samples to them (:mod:`davae.evaluation.metrics.names`).
        real: the same distances for as many training images (of the first variant's data), a reference that models
            are not expected to beat.
        environment: versions and hardware.
    """

    seeds: list[int]
    samples: int
    variants: dict[str, dict[str, Spread]]
    real: dict[str, float]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def ablate(recipe: AblationRecipe, out: Path) -> Ablation:
    """Train and measure every variant with every seed; continues an interrupted call.

    Writes ``out/ablation.json`` after every seed; runs are in ``out/autoencoders`` and ``out/runs``.

    Raises:
        DavaeError: a variant is not a class-conditional upgrade recipe, or ``out`` holds another ablation.
    """
    cases = {
        (name, seed): load_variant(recipe, name, seed) for name in recipe.variants for seed in recipe.seeds
    }  # read all before training any
    for case in cases.values():
        check_settings(case, "autoencoder")
        check_settings(case, "diffusion")
    check_place(out, "ablation")
    networks = [] if recipe.features is None else [open_network(recipe.features)]
    with claimed_by_first(out, "ablation"):
        return _ablate(recipe, cases, networks, out)


def _ablate(
    recipe: AblationRecipe, cases: dict[tuple[str, int], UpgradeRecipe], networks: list[FeatureNetwork], out: Path
) -> Ablation:
    _check_same(recipe, cases, out)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in recipe.variants}
    first = next(iter(cases.values()))
    held_out: dict[str, ImageSet] = {}  # variants may differ in their data

    def distances(case: UpgradeRecipe, images: Tensor) -> dict[str, float]:
        key = case.data.model_dump_json()
        if key not in held_out:
            held_out[key] = ImageSet(networks).extend(real_images(case, "held_out").split(_BATCH))
        return compare_sets(ImageSet(networks).extend(images.split(_BATCH)), held_out[key]).figures

    real = distances(first, real_images(first, "train", recipe.samples))
    for seed in recipe.seeds:  # outer loop: a complete comparison after every seed
        for name in recipe.variants:
            case = cases[name, seed]
            folder = out / "runs" / safe_name(name) / f"seed-{seed}"
            trained = _trained(case, folder, out, f"{name}, seed {seed}")
            made = generated_images(case, folder / "pipeline", recipe.samples, folder)
            figures[name].append({**trained, **distances(case, made)})
        result = Ablation(
            seeds=list(recipe.seeds[: recipe.seeds.index(seed) + 1]),
            samples=recipe.samples,
            variants={n: _spreads(found) for n, found in figures.items()},
            real=real,
            environment=environment(),
        )
        atomic_json(out / "ablation.json", result.to_json())
    return result


def _check_same(recipe: AblationRecipe, cases: dict[tuple[str, int], UpgradeRecipe], out: Path) -> None:
    """Refuse to continue with other settings, another base or other images than those of the finished runs."""
    file, asked = out / "ablation.recipe.json", recipe.model_dump(mode="json")
    asked["stands_on"] = _foundations(cases.values())
    if file.is_file():
        before = read_object(file)
        before.setdefault("stands_on", asked["stands_on"])  # an earlier version did not note it
        differing = [k for k in asked if k not in ("seeds", "description", "features") and asked[k] != before.get(k)]
        if differing:
            names = [_STANDS_ON if k == "stands_on" else k for k in differing]
            raise DavaeError(f"{out} holds another ablation ({', '.join(names)} differ): choose another --out")
    atomic_json(file, asked)


def _foundations(cases: Iterable[UpgradeRecipe]) -> dict[str, str]:
    """Hashes of the bases' weights and of the images, by what the recipes call them."""
    found: dict[str, str] = {}
    for case in cases:
        base, data = f"{case.base} {case.base_revision or ''}".strip(), case.data.model_dump_json()
        if base not in found:
            found[base] = contents_hash(load_recipe_base(case))
        if data not in found:
            stamps = {**open_part(case.data, "train").stamps(), **open_part(case.data, "held_out").stamps()}
            found[data] = value_hash({name: [stamp.partition(",")[0], *of] for name, (stamp, *of) in stamps.items()})
    return found


def _trained(recipe: UpgradeRecipe, folder: Path, out: Path, progress: str) -> dict[str, float]:
    """Validation metrics of both stages, trained unless finished; the pipeline is in ``folder/pipeline``."""
    done = folder / "result.json"
    if not done.is_file():
        logger.info("ablation: %s", progress)
        autoencoder, figures = _autoencoder(recipe, out)
        trained = train_diffusion(recipe, folder, autoencoder)
        figures |= {k: v for k, v in trained.metrics.items() if k.startswith("held_out_")}
        atomic_json(done, figures)
    return read_object(done)


def _autoencoder(recipe: UpgradeRecipe, out: Path) -> tuple[Path, dict[str, float]]:
    """The autoencoder of these settings, trained unless another variant did, and its metrics."""
    settings = recipe.model_dump(mode="json")
    asked = {key: settings[key] for key in ("base", "data", "autoencoder")}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    folder = out / "autoencoders" / key
    done = folder / "result.json"
    if not done.is_file():
        trained = train_autoencoder(recipe, folder)
        atomic_json(done, {f"autoencoder_{k}": v for k, v in trained.metrics.items()})
    return folder / "autoencoder", read_object(done)


def _spreads(found: list[dict[str, float]]) -> dict[str, Spread]:
    names = [name for name in found[0] if all(name in one for one in found)]
    return {name: Spread.of([one[name] for one in found]) for name in names}


def real_images(recipe: UpgradeRecipe, part: Literal["train", "held_out"], count: int | None = None) -> Tensor:
    """The first ``count`` images (by default all) of a part of the data, ``[N, 3, H, W]`` in [-1, 1]."""
    images = open_part(recipe.data, "train") if part == "train" else open_held_out(recipe.data)
    return torch.stack([images[i]["image"] for i in range(min(len(images), count or len(images)))])


def generated_images(recipe: UpgradeRecipe, pipeline: Path, count: int, folder: Path) -> Tensor:
    """Samples ``[count, 3, H, W]`` in [-1, 1], rounded to 8 bits, cycling through the held-out images' classes.

    They are stored in ``folder``, in a file named by a hash of pipeline, count and settings, and read from it if it
    exists.
    """
    made_with = [
        folder_hash(pipeline),
        count,
        recipe.diffusion.sample.model_dump(mode="json"),
        recipe.diffusion.loop.seed,
    ]
    file = folder / f"samples-{value_hash(made_with).removeprefix('sha256:')[:12]}.safetensors"
    if not file.is_file():
        pipe = load_pipeline(pipeline)
        held_out = open_held_out(recipe.data)
        labels = sorted({held_out[i]["label"] for i in range(len(held_out))} - {-1})
        known = dict(pipe.labels)
        numbers = [known[held_out.classes[label]] for label in labels if held_out.classes[label] in known]
        made = generate_classes(pipe, numbers or [0], count, recipe.diffusion.sample, seed=recipe.diffusion.loop.seed)
        atomic_tensors(file, {"images": to_bytes(made).to(torch.uint8)})
    return load_file(file)["images"].float() / 127.5 - 1
