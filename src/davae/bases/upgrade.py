"""``davae upgrade`` as a function."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from davae.bases.open import TEXT_ENCODERS, load_base, load_recipe_base
from davae.latents import LatentLayout
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families.class_fixes import unguarded
from davae.pipelines.saving.opening import load_autoencoder
from davae.pipelines.upgrade import TimestepShift, layout_over
from davae.recipes.settings import UpgradeRecipe
from davae.runtime.atomic_files import atomic_json, save_whole
from davae.runtime.devices import named_dtype
from davae.runtime.places import check_place, claim
from davae.runtime.text_files import read_object
from davae.warm_start import WarmStartReport, check_warm_start


@dataclasses.dataclass(frozen=True)
class WrittenUpgrade:
    """What was written.

    Attributes:
        pipeline: class of the pipeline.
        folder: where it is.
        scale: of the image over the base's, at the same number of tokens.
        pixels_per_latent_position: compression per side.
        layout: channels of the base and of the details.
        scheduler: the part of its configuration that the timestep shift follows from.
        self_check: of the warm start; None without details, where the transformer is the base's own.
    """

    pipeline: str
    folder: Path
    scale: int
    pixels_per_latent_position: int
    layout: LatentLayout
    scheduler: dict[str, Any]
    self_check: WarmStartReport | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "pipeline": self.pipeline,
            "folder": str(self.folder),
            "scale": self.scale,
            "pixels_per_latent_position": self.pixels_per_latent_position,
            "channels": {"base": self.layout.base_channels, "detail": self.layout.detail_channels},
            "scheduler": self.scheduler,
            "self_check": None
            if self.self_check is None
            else {**dataclasses.asdict(self.self_check), "dtype": str(self.self_check.dtype).removeprefix("torch.")},
        }

    def __str__(self) -> str:
        if self.self_check is None:
            return (
                f"{self.pipeline} with its own {self.layout.base_channels} latent channels and transformer, decoded "
                f"{self.scale} times larger: {self.folder}"
            )
        return (
            f"{self.self_check}\n"
            f"{self.pipeline} with {self.layout.base_channels} + {self.layout.detail_channels} latent channels, images "
            f"{self.scale} times larger from the same tokens: {self.folder}"
        )


def write_upgraded(
    pipeline: str,
    autoencoder: str | Path,
    out: str | Path,
    *,
    timestep_shift: TimestepShift = "base",
    variant: str | None = None,
    dtype: str | None = None,
    details: bool = True,
) -> WrittenUpgrade:
    """Open a pipeline, upgrade it, check the warm start, and save the result.

    Only one large part is in memory at a time, in the precision in which it is written.

    Args:
        pipeline: ``tiny``, a pipeline folder, or a name on the hub, see :func:`load_base`.
        autoencoder: folder of an `AutoencoderDA` made from its VAE.
        out: folder for the upgraded pipeline, new or empty: neither a base nor what was tuned is overwritten.
        timestep_shift: see :func:`davae.upgrade_pipeline`.
        variant: of the pipeline's files, see :func:`load_base`.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default each part as it was saved.
        details: False leaves them out: the base's own transformer, untuned, and the joint decoder as an upscaler
            (:meth:`davae.AutoencoderDA.without_details`).

    Raises:
        DavaeError: one of them cannot be opened, they do not belong together, or ``out`` holds files.
        WarmStartError: the upgraded transformer does not reproduce the base. Nothing is written then.
    """
    check_place(out, "result")
    vae = load_autoencoder(autoencoder)  # first, since errors in it are found quickly
    if not details:
        vae = vae.without_details()
    open_base = partial(load_base, pipeline, variant=variant, dtype="parts" if dtype is None else named_dtype(dtype))
    base = open_base(without=(TEXT_ENCODERS,))
    upgraded = upgrade_pipeline(base, vae, timestep_shift=timestep_shift, copy=False)
    layout = layout_over(base.vae, vae)
    report = None
    if layout.detail_channels:
        with unguarded(upgraded.transformer):
            report = check_warm_start(base.transformer, upgraded.transformer, layout)
    with claim(out, "result") as folder:
        upgraded.save_pretrained(folder)
        kind, scheduler = type(upgraded).__name__, dict(upgraded.scheduler.config)
        del base, upgraded
        _write_text_encoders(folder, open_base)
    return WrittenUpgrade(
        pipeline=kind,
        folder=Path(out),
        scale=vae.scale,
        pixels_per_latent_position=vae.spatial_compression,
        layout=layout,
        scheduler={k: v for k, v in scheduler.items() if "shift" in k or "seq_len" in k},
        self_check=report,
    )


def write_text_encoders(recipe: UpgradeRecipe, folder: Path) -> None:
    """Complete a pipeline that was saved without its text encoders with those of the recipe's base.

    They are opened and written one at a time.

    Args:
        recipe: names the base.
        folder: of the saved pipeline, changed in place.
    """
    _write_text_encoders(folder, lambda **options: load_recipe_base(recipe, **options))


def _write_text_encoders(folder: Path, open_base: Callable[..., Any]) -> None:
    description = folder / "model_index.json"
    index = read_object(description)
    for name in [name for name in index if name.startswith("text_encoder")]:
        others = [other for other in index if other.startswith("text_encoder") and other != name]
        base = open_base(without=("vae", "transformer", *others))
        encoder = getattr(base, name)
        if encoder is None:
            continue
        save_whole(encoder, folder / name)
        index[name] = list(base.config[name])
        del base, encoder
    atomic_json(description, index)
