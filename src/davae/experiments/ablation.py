"""``davae ablate``: what each part of the method contributes.

Every variant is trained with every seed. Variants that differ only in the diffusion stage share the autoencoder of
the same seed. Finished work is not repeated, so the same command continues an interrupted ablation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from davae.bases.open import is_pipeline, load_recipe_autoencoder, load_recipe_base
from davae.data.cache import value_hash
from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork, open_network
from davae.evaluation.generation.image_run import contents_hash
from davae.experiments.variants import Autoencoders, Pipelines, curve_of
from davae.recipes.checks import check_settings
from davae.recipes.read import load_variant, with_later_settings
from davae.recipes.settings import AblationRecipe, UpgradeRecipe
from davae.runtime.atomic_files import atomic_json
from davae.runtime.places import check_place
from davae.runtime.processes import claimed_by_first
from davae.runtime.text_files import read_object
from davae.training.checkpoints.foundations import model_hash
from davae.training.checkpoints.run_directory import environment
from davae.training.data import open_part

logger = logging.getLogger(__name__)
_STANDS_ON = "what it stands on, the weights of a base or the images,"


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
            losses on held-out images, and distances of samples to them (:mod:`davae.evaluation.metrics.names`), with
            ``preview_`` in front those of what the base makes of their base channels, enlarged.
        baselines: the same of other ways to an image: the base enlarged, the decoder alone of each autoencoder, the
            native fine-tune, further ways to reconstruct.
        curves: spread by variant, metric and step, of what the trainings' validations measured.
        real: the same distances for as many training images (of the first variant's data), a reference that models
            are not expected to beat; empty if only autoencoders are trained.
        environment: versions and hardware.
    """

    seeds: list[int]
    samples: int
    variants: dict[str, dict[str, Spread]]
    baselines: dict[str, dict[str, Spread]]
    curves: dict[str, dict[str, dict[int, Spread]]]
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
        for stage in ("autoencoder",) if recipe.autoencoder_only else ("autoencoder", "diffusion"):
            check_settings(case, stage)
    check_place(out, "ablation")
    networks = [] if recipe.features is None else [open_network(recipe.features)]
    with claimed_by_first(out, "ablation"):
        return _ablate(recipe, cases, networks, out)


def _ablate(
    recipe: AblationRecipe, cases: dict[tuple[str, int], UpgradeRecipe], networks: list[FeatureNetwork], out: Path
) -> Ablation:
    _check_same(recipe, cases, out)
    measure = Autoencoders(networks, out) if recipe.autoencoder_only else Pipelines(recipe, networks, out)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in recipe.variants}
    curves: dict[str, list[dict[int, dict[str, float]]]] = {name: [] for name in recipe.variants}
    first = next(iter(cases.values()))
    for seed in recipe.seeds:  # outer loop: a complete comparison after every seed
        for name in recipe.variants:
            logger.info("ablation: %s, seed %d", name, seed)
            found, run = measure.figures(name, cases[name, seed], seed)
            figures[name].append(found)
            curves[name].append(curve_of(run))
        measure.add_baselines({name: cases[name, seed] for name in recipe.variants}, seed)
        result = Ablation(
            seeds=list(recipe.seeds[: recipe.seeds.index(seed) + 1]),
            samples=recipe.samples,
            variants={n: _spreads(found) for n, found in figures.items()},
            baselines={n: _spreads(found) for n, found in measure.baselines.items()},
            curves={n: _spread_curves(runs) for n, runs in curves.items()},
            real=measure.real(first),
            environment=environment(),
        )
        atomic_json(out / "ablation.json", result.to_json())
    return result


def _spread_curves(runs: list[dict[int, dict[str, float]]]) -> dict[str, dict[int, Spread]]:
    """Spread by metric and step over the seeds, of the steps that all have."""
    found: dict[str, dict[int, Spread]] = {}
    for step in [step for step in runs[0] if all(step in run for run in runs)]:
        for name, spread in _spreads([run[step] for run in runs]).items():
            found.setdefault(name, {})[step] = spread
    return found


def _check_same(recipe: AblationRecipe, cases: dict[tuple[str, int], UpgradeRecipe], out: Path) -> None:
    """Refuse to continue with other settings, another base or other images than those of the finished runs."""
    file, asked = out / "ablation.recipe.json", recipe.model_dump(mode="json")
    asked["stands_on"] = _foundations(cases.values())
    if file.is_file():
        before = with_later_settings(read_object(file))
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
            found[base] = _base_hash(case)
        if data not in found:
            squares = case.data.model_copy(update={"buckets": False})  # sizes change no stamp
            stamps = {**open_part(squares, "train").stamps(), **open_part(squares, "held_out").stamps()}
            found[data] = value_hash({name: [stamp.partition(",")[0], *of] for name, (stamp, *of) in stamps.items()})
    return found


def _base_hash(case: UpgradeRecipe) -> str:
    """A hash of the base's weights; the base may be an autoencoder by itself."""
    if is_pipeline(case.base, case.base_revision):
        return contents_hash(load_recipe_base(case))
    return model_hash(load_recipe_autoencoder(case))


def _spreads(found: list[dict[str, float]]) -> dict[str, Spread]:
    names = [name for name in found[0] if all(name in one for one in found)]
    return {name: Spread.of([one[name] for one in found]) for name in names}
