"""What the options of :class:`davae.AutoencoderDA` may be."""

from __future__ import annotations

from davae.errors import DavaeError


def check_options(scale: int, space: str, order: str, dropout: float) -> None:
    """Raise a :class:`DavaeError` for a value that does not exist, in the order of the constructor."""
    if scale not in (2, 4, 8):
        raise DavaeError(f"scale must be 2, 4 or 8, not {scale}")
    if space not in ("scaled", "raw"):
        raise DavaeError(f"base_latent_space must be 'scaled' or 'raw', not '{space}'")
    if order not in ("base_first", "detail_first"):
        raise DavaeError(f"decoder_channel_order must be 'base_first' or 'detail_first', not '{order}'")
    if not 0.0 <= dropout < 1.0:
        raise DavaeError(f"detail_dropout must lie in [0, 1), not {dropout}")


def check_detail_channels(detail_channels: int, scale: int) -> None:
    """Raise a :class:`DavaeError` for a number that the down block of the whole ``scale`` cannot make."""
    if detail_channels < 1 or 2 * detail_channels % scale**2:
        raise DavaeError(
            f"detail_channels must be a positive multiple of {scale**2 // 2} for scale {scale}, "
            f"not {detail_channels}"
        )
