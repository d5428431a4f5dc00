"""What the options of :class:`davae.AutoencoderDA` may be."""

from __future__ import annotations

from davae.choices import ChannelOrder, LatentSpace, Scale, check_choice
from davae.errors import DavaeError


def check_options(scale: int, space: str, order: str, dropout: float) -> None:
    """Raise a :class:`DavaeError` for a value that does not exist, in the order of the constructor."""
    check_choice(scale, Scale, "scale")
    check_choice(space, LatentSpace, "base_latent_space")
    check_choice(order, ChannelOrder, "decoder_channel_order")
    if not 0.0 <= dropout < 1.0:
        raise DavaeError(f"detail_dropout must lie in [0, 1), not {dropout}")


def check_detail_channels(detail_channels: int, scale: int) -> None:
    """Raise a :class:`DavaeError` for a number that the down block of the whole ``scale`` cannot make."""
    if detail_channels < 1 or 2 * detail_channels % scale**2:
        raise DavaeError(
            f"detail_channels must be a positive multiple of {scale**2 // 2} for scale {scale}, "
            f"not {detail_channels}"
        )
