"""Config entries from which unmodified diffusers pipelines read the upgraded autoencoder's sizes."""

from typing import Any

from davae.errors import DavaeError
from davae.latents import LatentLayout

# All of these are derived from the base by the constructor.
DERIVED_KEYS = frozenset(
    {"in_channels", "out_channels", "latent_channels", "block_out_channels", "encoder_block_out_channels"}
    | {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
    | {"batch_norm_eps", "patch_size", "z_dim", "temperal_downsample"}
)


def derived_config(
    base: Any, further: dict[str, Any], layout: LatentLayout, *, scale: int, compression: int
) -> dict[str, Any]:
    """The entries of an upgraded autoencoder's config beyond its own settings.

    Pipelines compute the compression as ``2 ** (len(block_out_channels) - 1)``, so that list is given
    ``log2(s f) + 1`` entries; only its length has a meaning.

    Args:
        base: config of the base.
        further: entries that only pipelines of this kind of base read.
        layout: channels of the base's latent and of the details that this level adds.
        scale: ``s``.
        compression: ``s * f``.

    Raises:
        DavaeError: ``s * f`` is not a power of two.
    """
    levels = compression.bit_length()
    if compression != 2 ** (levels - 1):
        raise DavaeError(f"the spatial compression {compression} is not a power of two")
    shift = base.get("shift_factor")
    derived: dict[str, Any] = {
        "in_channels": base.get("in_channels", 3),
        "out_channels": base.get("out_channels", 3),
        "latent_channels": layout.channels,
        "scaling_factor": base.get("scaling_factor", 1.0),
        "shift_factor": shift,
        "sample_size": _times(base.get("sample_size"), scale),
        "force_upcast": base.get("force_upcast", False),
        "block_out_channels": base.get("block_out_channels") or [1],
        **further,
    }
    mean, std = base.get("latents_mean"), base.get("latents_std")
    if mean is not None and std is not None:
        # On the details, (x - mean) * scaling / std and (x - shift) * scaling are then the same.
        derived["latents_mean"] = [*mean, *[shift or 0.0] * layout.detail_channels]
        derived["latents_std"] = [*std, *[1.0] * layout.detail_channels]
    if base.get("temperal_downsample") is not None:  # video autoencoders: one entry per level
        derived["z_dim"] = layout.channels
        derived["temperal_downsample"] = (list(base["temperal_downsample"]) + [False] * levels)[: levels - 1]
    for key in ("block_out_channels", "encoder_block_out_channels"):
        if key in derived:
            widths = list(derived[key])
            derived[key] = (widths + [widths[-1]] * levels)[:levels]
    return derived


def _times(size: Any, scale: int) -> Any:
    if size is None:
        return None
    return [side * scale for side in size] if isinstance(size, (list, tuple)) else size * scale
