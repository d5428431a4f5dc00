"""What a training would only find out at its end, found before its start: no torch, no weights, no images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from davae.errors import DavaeError
from davae.recipes.data import is_on_hub
from davae.recipes.dc_ae import DcAeRecipe
from davae.recipes.loop import LoopSettings, OptimizerSettings
from davae.recipes.settings import AutoencoderSettings, BaseRecipe, ReconstructionSettings, UpgradeRecipe

_PACKAGES = {"comet_ml": "comet-ml"}
"""What pip calls a tracker's package, where it differs."""
_DIFFUSION = ("held_out_total", "held_out_base", "held_out_detail", "held_out_variance", "swd/finest")


def check_settings(recipe: UpgradeRecipe | BaseRecipe | DcAeRecipe, section: str) -> None:
    """Refuse settings of a stage that only a later step, or the last one, would refuse.

    Args:
        recipe: what is trained.
        section: the stage's: ``autoencoder``, ``diffusion``, ``transformer``, or ``phase1`` to ``phase3``.

    Raises:
        DavaeError: a metric that is not measured, or a package or a file that is not there.
    """
    settings = getattr(recipe, section)
    if settings is None:
        return
    check_trackers(settings.loop, section)
    _check_packages(settings.optimizer, section)
    _check_best_metric(recipe, section, settings.loop)
    reconstruction: ReconstructionSettings | None = getattr(settings, "reconstruction", None)
    if reconstruction is not None:
        _check_backbones(reconstruction, section)


def check_start(start: str | None, key: str) -> None:
    """Refuse a folder to start from that is not there. What may be a name on the hub is looked up later.

    Args:
        start: as in the recipe.
        key: the setting.

    Raises:
        DavaeError: there is nothing.
    """
    if start is None or Path(start).expanduser().exists() or is_on_hub(start):
        return
    raise DavaeError(f"{key}: there is no folder {start}; give a finished run, or the folder of its result")


def check_trackers(loop: LoopSettings, section: str) -> None:
    """Refuse a tracker whose package is not installed: it would log nothing, and say nothing.

    Raises:
        DavaeError: names the package.
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


def _check_packages(optimizer: OptimizerSettings, section: str) -> None:
    if optimizer.kind == "adamw8bit" and not _is_installed("bitsandbytes"):
        raise DavaeError(
            f"{section}.optimizer.kind=adamw8bit needs bitsandbytes, which is not installed: "
            f"`pip install bitsandbytes`, or set {section}.optimizer.kind=adamw"
        )


def _check_backbones(settings: ReconstructionSettings, section: str) -> None:
    """LPIPS and DINO say the rest themselves, once they are read."""
    for weight, key in ((settings.lpips_weight, "lpips_backbone"), (settings.dino_weight, "dino_backbone")):
        place = getattr(settings, key)
        if weight and place is not None and not Path(place).expanduser().exists():
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
    """What a stage measures, by the names in ``metrics.jsonl``.

    Some depend on the base: only transformers that predict variances have ``held_out_variance``.
    """
    settings = getattr(recipe, section)
    if section in ("diffusion", "transformer"):
        return [
            name for name in _DIFFUSION if section == "diffusion" or name not in ("held_out_base", "held_out_detail")
        ]
    if isinstance(recipe, DcAeRecipe):
        return [f"{name}_{side}" for side in recipe.measure.resolutions for name in ("psnr", "ssim", "spectrum_db")]
    if not isinstance(settings, AutoencoderSettings):
        return ["psnr"]
    channels = settings.model.detail_channels
    lower = [f"psnr_level{n}_upscaled" for n in range(1, len(channels) if isinstance(channels, list) else 1)]
    return ["psnr", "psnr_base_upscaled", "psnr_no_details", *lower, "alignment", "alignment_relative"]
