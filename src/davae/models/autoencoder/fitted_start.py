"""Initial values for the new blocks of an autoencoder, fitted to images in closed form: no training, no guess.

:mod:`davae.latents.detail_fit` fits two linear maps. Both blocks hold them exactly, because the base's layers at its
latent are single convolutions and a convolution composed with a linear map is one:

* down: the base's last convolution, whose kernel at each of the ``s x s`` features of a cell lies within
  ``(s + 2) x (s + 2)`` of them, then the map from full-size latent to details;
* up: the base decoder's first convolution, before the shuffle, of the full-size latent that is estimated in the nine
  cells it sees.

With ``D = s^2 C``, no detail dropout and a base that does not bound its latent, the result is the base VAE at full
size, but for the outermost ring of the latent where the base has an offset that its zero padding lacks (a
``shift_factor``, a post-quant convolution's bias).
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.errors import DavaeError
from davae.latents.detail_fit import LatentMoments, fit_details, fit_estimate
from davae.models.autoencoder.autoencoder_da import AutoencoderDA
from davae.models.autoencoder.residual_sampling import down_block
from davae.models.autoencoder.warm_blocks import (
    START_LOGVAR,
    before_shuffle,
    folded_up_block,
    is_detail_first,
    set_up_block,
)
from davae.models.base_adapters.adapter import Convolution
from davae.runtime.pixel_budget import in_parts
from davae.runtime.processes import everyone


@torch.no_grad()
def fit_start(vae: AutoencoderDA, images: Iterable[Tensor], *, aligned_channels: int | None = None) -> None:
    """Fit the down and the up block of a new autoencoder to images; a hundred are enough.

        vae = davae.AutoencoderDA.from_base(pipe.vae, scale=2, detail_channels=48)
        davae.fit_start(vae, images)

    The down block becomes one strided convolution (``down_method="stride"`` in the config). On several processes each
    gives its share of the images, and all get the same blocks. All ranks must call this.

    Args:
        vae: made by :meth:`AutoencoderDA.from_base` and not trained; its last level is changed in place.
        images: batches ``[B, 3, H, W]`` in [-1, 1], or one batch, ``H`` and ``W`` multiples of ``s * f``.
        aligned_channels: how many channels of the levels below the details are aligned with; by default the base's.

    Raises:
        DavaeError: no image, an image of another size or with values that are not finite, a detail encoder that is no
            longer the base's, or a base whose layers at the latent are not single convolutions.
    """
    head, stem = _head(vae), _stem(vae)
    _check_untrained(vae)
    aligned = aligned_channels or vae.layout.base_channels
    moments = _measured(vae, images, aligned)
    details = fit_details(moments, vae.own_layout.detail_channels)
    zeroed = vae.config.detail_dropout if vae.config.absent_details == "zero" else 0.0
    estimate, offset = fit_estimate(moments, details, zeroed)
    _set_down_block(vae, _at_each_feature(head, vae.factor), details)
    wanted = _of_estimate(_before_one_shuffle(stem, vae.factor, vae.scale // vae.factor), estimate, offset)
    if is_detail_first(vae):
        wanted = Convolution(wanted.weight.roll(vae.own_layout.detail_channels, dims=1), wanted.bias)
    set_up_block(vae.up, wanted)


def _of_estimate(conv: Convolution, estimate: Tensor, offset: Tensor) -> Convolution:
    """A 3x3 convolution ``[F, n_y, 3, 3]`` of what is estimated of the nine cells it sees: ``[F, n_p + D, 3, 3]``."""
    seen = conv.weight.double().flatten(1).cpu()
    weight = (seen @ estimate).unflatten(1, (-1, 3, 3))
    return Convolution(weight.to(conv.weight), conv.bias + (seen @ offset).to(conv.bias))


def _measured(vae: AutoencoderDA, images: Iterable[Tensor], aligned: int) -> LatentMoments:
    """Moments of the latents of all processes' images."""
    cells, prefix = vae.factor**2, vae.own_layout.base_channels
    below = vae.below
    source = prefix if below is None else below.own_layout.detail_channels
    channels = {"prefix": prefix, "target": aligned, "source": source * cells, "full": prefix * cells}
    moments = LatentMoments(channels)
    for batch in [images] if isinstance(images, Tensor) else images:
        for part in in_parts(batch):
            moments.update(_latents(vae, part.to(vae.device, vae.dtype), aligned))
    moments.sums = torch.stack(everyone(moments.sums)).sum(dim=0)
    return moments


def _latents(vae: AutoencoderDA, images: Tensor, aligned: int) -> Mapping[str, Tensor]:
    """The four latents of :mod:`davae.latents.detail_fit`, each ``[B, n, h, w]``, of images ``[B, 3, H, W]``."""
    prefix = vae.encode_prefix(images)
    if vae.below is None:
        raw = vae.adapter.encode(vae.base, images)
        source, full = vae.alignment_target(raw), vae.decoded_prefix(raw)
    else:
        source = vae.below.encode_own_details(images).mean
        full = vae.below.own_layout.join(vae.below.decoded_prefix(vae.below.encode_prefix(images)), source)
    return {
        "prefix": vae.decoded_prefix(prefix),
        "target": vae.alignment_target(prefix[:, :aligned]),
        "source": F.pixel_unshuffle(source, vae.factor),
        "full": F.pixel_unshuffle(full, vae.factor),
    }


def _check_untrained(vae: AutoencoderDA) -> None:
    encoder = vae.adapter.detail_encoder(vae.base).state_dict()
    changed = [name for name, value in vae.detail_encoder.state_dict().items() if not torch.equal(value, encoder[name])]
    if changed:
        raise DavaeError(
            f"this autoencoder's detail encoder is not the base's any more ({changed[0]} differs): fit_start is the "
            "start of a training. Make a new one with AutoencoderDA.from_base"
        )


def _head(vae: AutoencoderDA) -> Convolution:
    """Last features to the source latent: of kernel ``t + 2`` and stride ``t``, the factor of the level below or 1."""
    if vae.below is not None:
        head = folded_down_block(vae.below)
        details = vae.below.own_layout.detail_channels
        return Convolution(head.weight[:details], head.bias[:details])
    head_or_none = vae.adapter.encoder_head(vae.base)
    if head_or_none is None:
        raise _unknown_layer(vae, "encoder_head")
    shift, scale = vae.base_affine(head_or_none.weight.device)
    return head_or_none.then(torch.diag(scale), -shift * scale)


def _stem(vae: AutoencoderDA) -> Convolution:
    """The full latent to first features, before the shuffle of the level below if there is one."""
    if vae.below is not None:
        return folded_up_block(vae.below.up, vae.below.own_layout, detail_first=is_detail_first(vae.below))
    stem = vae.adapter.decoder_stem(vae.base)
    if stem is None:
        raise _unknown_layer(vae, "decoder_stem")
    shift, scale = vae.base_affine(stem.weight.device)
    return stem.after(torch.diag(1.0 / scale), shift)


def _unknown_layer(vae: AutoencoderDA, method: str) -> DavaeError:
    return DavaeError(
        f"{type(vae.adapter).__name__}.{method} names no convolution, so no start can be fitted to this base: write "
        "that method, or take start=random"
    )


def folded_down_block(vae: AutoencoderDA) -> Convolution:
    """The down block as one convolution of kernel ``s + 2`` and stride ``s``: ``[2 D, F, s + 2, s + 2]``."""
    block = vae.down
    assert block.conv.bias is not None
    conv = Convolution(block.conv.weight.detach().float(), block.conv.bias.detach().float())
    if block.method == "stride":
        return conv
    folded, s = _at_each_feature(conv, block.factor), block.factor
    if block.shortcut_proj is not None:
        shortcut = block.shortcut_proj.weight.detach().float()[:, :, 0, 0]
    else:
        each = block.conv.in_channels * s * s // block.out_channels
        shortcut = torch.eye(block.out_channels).repeat_interleave(each, dim=1).to(folded.weight) / each
    folded.weight[:, :, 1:-1, 1:-1] += shortcut.unflatten(1, (-1, s, s))
    return folded


def _at_each_feature(conv: Convolution, factor: int) -> Convolution:
    """A convolution of kernel ``t + 2`` and stride ``t`` followed by an unshuffle by ``f`` as one of stride ``f t``.

    Returns:
        ``[out f^2, in, f t + 2, f t + 2]``.
    """
    out, channels, kernel = conv.weight.shape[:3]
    stride = kernel - 2
    result = conv.weight.new_zeros(out, factor, factor, channels, factor * stride + 2, factor * stride + 2)
    for row in range(factor):
        for column in range(factor):
            top, left = row * stride, column * stride
            result[:, row, column, :, top : top + kernel, left : left + kernel] = conv.weight
    return Convolution(result.flatten(0, 2), conv.bias.repeat_interleave(factor * factor))


def _before_one_shuffle(conv: Convolution, factor: int, inner: int) -> Convolution:
    """A 3x3 convolution on the shuffled grid, with a shuffle by ``t`` after it, as one in front of a single shuffle.

    Args:
        conv: ``[F t^2, in, 3, 3]`` on the grid that is ``f`` times finer.
        factor, inner: ``f`` and ``t``.

    Returns:
        ``[F (f t)^2, in f^2, 3, 3]``.
    """

    def of_one_shuffle(values: Tensor) -> Tensor:  # [F t t f f, ...]: cell row f, then row t within it
        return values.unflatten(0, (-1, inner, inner, factor, factor)).movedim((3, 4), (1, 3)).flatten(0, 4)

    weight = before_shuffle(conv.weight.float().cpu(), factor)
    bias = conv.bias.float().cpu().repeat_interleave(factor * factor)
    return Convolution(of_one_shuffle(weight), of_one_shuffle(bias))


def _set_down_block(vae: AutoencoderDA, source: Convolution, details: Tensor) -> None:
    """A strided convolution to ``details`` of the source latent, with a small variance."""
    before, count = vae.down.conv, vae.own_layout.detail_channels
    if vae.config.down_method != "stride":
        vae.down = down_block(before.in_channels, count, vae.scale, "stride").to(before.weight)
        vae.down.requires_grad_(before.weight.requires_grad)
        vae.register_to_config(down_method="stride")
    made = source.then(details.to(source.weight), torch.zeros_like(source.bias[:1]))
    vae.down.conv.weight.zero_()
    vae.down.conv.weight[:count].copy_(made.weight)
    assert vae.down.conv.bias is not None
    vae.down.conv.bias[:count].copy_(made.bias)
    vae.down.conv.bias[count:] = START_LOGVAR
