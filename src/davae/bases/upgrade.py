"""``davae upgrade`` as a function."""

import dataclasses
from pathlib import Path
from typing import Any

from davae.bases.open import load_base
from davae.latents import LatentLayout
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families.class_fixes import unguarded
from davae.pipelines.saving.opening import load_autoencoder
from davae.pipelines.upgrade import TimestepShift, layout_over
from davae.runtime.places import check_place, claim
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
        self_check: of the warm start.
    """

    pipeline: str
    folder: Path
    scale: int
    pixels_per_latent_position: int
    layout: LatentLayout
    scheduler: dict[str, Any]
    self_check: WarmStartReport

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "pipeline": self.pipeline,
            "folder": str(self.folder),
            "scale": self.scale,
            "pixels_per_latent_position": self.pixels_per_latent_position,
            "channels": {"base": self.layout.base_channels, "detail": self.layout.detail_channels},
            "scheduler": self.scheduler,
            "self_check": {
                **dataclasses.asdict(self.self_check),
                "dtype": str(self.self_check.dtype).removeprefix("torch."),
            },
        }

    def __str__(self) -> str:
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
) -> WrittenUpgrade:
    """Open a pipeline, upgrade it, check the warm start, and save the result.

    Args:
        pipeline: ``tiny``, a pipeline folder, or a name on the hub, see :func:`load_base`.
        autoencoder: folder of an `AutoencoderDA` made from its VAE.
        out: folder for the upgraded pipeline, new or empty: neither a base nor what was tuned is overwritten.
        timestep_shift: see :func:`davae.upgrade_pipeline`.
        variant: of the pipeline's files, see :func:`load_base`.

    Raises:
        DavaeError: one of them cannot be opened, they do not belong together, or ``out`` holds files.
        WarmStartError: the upgraded transformer does not reproduce the base. Nothing is written then.
    """
    check_place(out, "result")
    vae = load_autoencoder(autoencoder)  # first, since errors in it are found quickly
    base = load_base(pipeline, variant=variant)
    upgraded = upgrade_pipeline(base, vae, timestep_shift=timestep_shift)
    layout = layout_over(base.vae, vae)
    with unguarded(upgraded.transformer):
        report = check_warm_start(base.transformer, upgraded.transformer, layout)
    with claim(out, "result") as folder:
        upgraded.save_pretrained(folder)
    return WrittenUpgrade(
        pipeline=type(upgraded).__name__,
        folder=Path(out),
        scale=vae.scale,
        pixels_per_latent_position=vae.spatial_compression,
        layout=layout,
        scheduler={k: v for k, v in upgraded.scheduler.config.items() if "shift" in k or "seq_len" in k},
        self_check=report,
    )
