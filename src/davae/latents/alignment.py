"""Detail alignment: the loss that ties the detail latent to the base latent, its adaptive weight, and the KL term."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.choices import AlignmentForm, Reduction, check_choice
from davae.errors import DavaeError
from davae.latents.layout import LatentLayout

_FLOAT16_SCALE = 4096.0


def _group_edges(channels: int, groups: int) -> list[int]:
    """Edges of ``groups`` groups of consecutive channels, ``round(k * channels / groups)``, halves to even.

    Rounded in float32, as in the official code.
    """
    return [int(edge) for edge in torch.linspace(0, channels, groups + 1).round()]


def grouped_mean(z_d: Tensor, base_channels: int) -> Tensor:
    """Mean of ``z_d`` over groups of consecutive channels (Eq. 3), without parameters.

    With ``D = r C``, base channel ``i`` gets the mean of detail channels ``i r ... i r + r - 1``. If ``C``
    does not divide ``D``, group k spans ``round(k D / C)`` to ``round((k + 1) D / C)``; an empty group gives zeros.

    Args:
        z_d: ``[B, D, h, w]``.
        base_channels: ``C``.

    Returns:
        ``[B, C, h, w]`` in the dtype of ``z_d``.

    Raises:
        DavaeError: either latent has no channels.
    """
    channels = z_d.shape[1]
    if channels < 1 or base_channels < 1:
        raise DavaeError(f"{channels} detail channels have no means for {base_channels} base channels")
    if channels == base_channels:
        return z_d
    if channels % base_channels == 0:
        return z_d.unflatten(1, (base_channels, channels // base_channels)).mean(dim=2)
    edges = _group_edges(channels, base_channels)
    groups = [
        z_d[:, start:end].mean(dim=1) if end > start else torch.zeros_like(z_d[:, 0]) for start, end in pairwise(edges)
    ]
    return torch.stack(groups, dim=1)


def self_similarity(latent: Tensor) -> Tensor:
    """Cosine similarity of every grid position with every other, ``[B, C, h, w]`` to ``[B, h w, h w]``."""
    vectors = F.normalize(latent.flatten(2), dim=1)  # [B, C, hw]
    return vectors.transpose(1, 2) @ vectors


class AlignmentLoss(nn.Module):
    """Distance of the detail latent from the base latent (Eq. 4), always computed in float32.

    * ``mean``: mean squared error between the grouped mean of ``z_d`` and ``z``, the paper's form.
    * ``relational``: mean squared error between the two matrices of cosine similarity among positions. It
      matches the spatial structure and leaves the channels free. Memory grows with ``(h w)^2``.
    * ``projection``: mean squared error between a learned 1x1 convolution of ``z_d`` and ``z``. The
      convolution is initialised to the grouped mean.

    Args:
        layout: channel counts.
        form: one of the three above.

    Raises:
        DavaeError: an unknown form, or a layout without details.
    """

    def __init__(self, layout: LatentLayout, form: AlignmentForm = "mean") -> None:
        super().__init__()
        check_choice(form, AlignmentForm, "alignment form")
        if not layout.detail_channels:
            raise DavaeError("a layout without detail channels has nothing to align")
        self.layout, self.form = layout, form
        self.projection: nn.Conv2d | None = None
        if form == "projection":
            self.projection = nn.Conv2d(layout.detail_channels, layout.base_channels, kernel_size=1)
            unit = torch.eye(layout.detail_channels)[:, :, None, None]  # one detail channel each
            with torch.no_grad():
                self.projection.weight.copy_(grouped_mean(unit, layout.base_channels).transpose(0, 1))
                nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]

    def forward(self, z_d: Tensor, z: Tensor) -> Tensor:
        """Scalar loss of detail latent ``[B, D, h, w]`` against base latent ``[B, C, h, w]``.

        Raises:
            DavaeError: channel counts are not the layout's, or batch or grid differ.
        """
        self.layout.join(z, z_d)  # raises if they do not fit
        with torch.autocast(z.device.type, enabled=False):
            z_d, z = z_d.float(), z.float()
            if self.form == "relational":
                return F.mse_loss(self_similarity(z_d), self_similarity(z))
            if self.projection is not None:
                weight, bias = self.projection.weight.float(), self.projection.bias
                projected = F.conv2d(z_d, weight, None if bias is None else bias.float())
                return F.mse_loss(projected, z)
            return F.mse_loss(grouped_mean(z_d, self.layout.base_channels), z)


def adaptive_weight(reference_loss: Tensor, loss: Tensor, parameter: Tensor, *, maximum: float) -> Tensor:
    """Weight that makes the gradient of ``loss`` as large as that of ``reference_loss`` at one parameter.

    ``|d reference / d parameter| / (|d loss / d parameter| + 1e-4)``, clamped to ``[0, maximum]``, with
    Euclidean norms (as in VQGAN, arXiv 2012.09841). The graph is kept, and no gradient flows through the weight. Under
    float16 autocast the losses are scaled up for it, because gradients of a mean over pixels would underflow.

    Args:
        reference_loss, loss: scalars that both depend on ``parameter``.
        parameter: where the gradients are compared, such as the decoder's last weight.
        maximum: upper bound.

    Returns:
        Detached float32 scalar.
    """
    scale = gradient_scale(parameter.device)
    reference_gradient, gradient = (
        torch.autograd.grad(scale * term, parameter, retain_graph=True)[0] for term in (reference_loss, loss)
    )
    return gradient_ratio(reference_gradient, gradient, maximum=maximum, scale=scale)


def gradient_ratio(reference: Tensor, gradient: Tensor, *, maximum: float, scale: float = 1.0) -> Tensor:
    """``|reference| / (|gradient| + 1e-4)``, clamped to ``[0, maximum]``, from gradients multiplied by ``scale``.

    Returns:
        Detached float32 scalar.

    Raises:
        DavaeError: ``maximum`` is negative or NaN, or ``scale`` is not finite and above 0.
    """
    if not maximum >= 0 or not 0 < scale < math.inf:
        raise DavaeError(f"maximum must be at least 0 and scale above 0, not {maximum} and {scale}")
    ratio = reference.float().norm() / (gradient.float().norm() + 1e-4 * scale)
    return ratio.clamp(0.0, maximum).detach()


def gradient_scale(device: torch.device) -> float:
    """Factor on a loss before ``torch.autograd.grad``: above 1 under float16 autocast, see `adaptive_weight`."""
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return _FLOAT16_SCALE if half else 1.0


def gaussian_kl(mean: Tensor, logvar: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """KL divergence ``KL(N(mean, exp(logvar)) || N(0, 1))``, computed in float32.

    Args:
        mean, logvar: ``[B, D, h, w]``.
        reduction: ``"sum"`` is the divergence itself, ``1/2 sum(mean^2 + var - 1 - logvar)`` over a sample,
            then the mean over the batch. ``"mean"`` is the mean over all elements *without* the factor 1/2,
            as in the official ImageNet training.

    Returns:
        Scalar, in nats.

    Raises:
        DavaeError: an unknown reduction.
    """
    mean, logvar = mean.float(), logvar.float()
    terms = mean.square() + logvar.exp() - 1.0 - logvar  # [B, D, h, w]
    if reduction == "mean":
        return terms.mean()
    if reduction == "sum":
        return 0.5 * terms.flatten(1).sum(dim=1).mean()
    raise DavaeError(f"unknown KL reduction '{reduction}': use 'mean' or 'sum'")
