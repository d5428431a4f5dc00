"""Proof, on the real module, that a widened transformer starts as the original.

Three looks, each able to see what the others cannot:

1. *The weights.* Every weight that is not the detail channels' must equal the original's, and the detail
   channels' must be zero: exact, layer by layer.
2. *The layers in place.* Both models run on the same base latent, with several detail latents. After each
   input layer the features must agree, before each output layer too, and the head must give the original's
   values for base channels and exactly zero for detail channels. What is wrong shows at the first layer that
   differs.
3. *The same with random channel layers.* A pretrained model may end in zeros (an untrained head), and then
   everything agrees with everything. So the run is repeated with random numbers added to the original's input
   and output weights, put into the widened model where the description says: if the description has the
   channel order wrong, outputs now differ. The random weights live in the call alone; neither model is
   touched.

New zero weights change nothing but the order of summation in the token embedding. What such a rounding may
become at the output depends on the model's depth, so it is measured: the original runs once more with its
tokens moved by one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.latents import LatentLayout
from davae.warm_start.channel_places import ChannelDescription, layer_names
from davae.warm_start.errors import WarmStartError
from davae.warm_start.observe import undisturbed
from davae.warm_start.registry import description_of
from davae.warm_start.side_by_side import SideBySide


@dataclass(frozen=True)
class WarmStartReport:
    """What the self-check measured.

    Attributes:
        max_base_difference: largest difference of base outputs, relative to the largest output, with the
            weights as they are.
        max_base_difference_random: the same with random channel layers.
        max_detail_output: largest magnitude of a detail output over all runs.
        tolerance: what the base differences of outputs were held against, the larger of the two runs.
        dtype: coarsest dtype of the weights.
        latent: shape of the dummy base latent, [B, C, h, w].
        layers: input and output layers that were widened.
    """

    max_base_difference: float
    max_base_difference_random: float
    max_detail_output: float
    tolerance: float
    dtype: torch.dtype
    latent: tuple[int, ...]
    layers: tuple[str, ...]

    def __str__(self) -> str:
        zero = "exactly 0" if self.max_detail_output == 0 else f"at most {self.max_detail_output:.1e}"
        dtype, latent = str(self.dtype).removeprefix("torch."), " x ".join(map(str, self.latent))
        return (
            f"warm start verified: base outputs differ by {self.max_base_difference:.1e} "
            f"({self.max_base_difference_random:.1e} with random {', '.join(self.layers)}; tolerance "
            f"{self.tolerance:.0e}), detail outputs are {zero} for random detail inputs "
            f"({dtype}, latent {latent})"
        )


def check_warm_start(
    original: ModelMixin,
    widened: ModelMixin,
    layout: LatentLayout,
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> WarmStartReport:
    """Verify that `widened` gives the original's base outputs and zero detail, whatever the detail inputs.

    Neither model is changed, nor is the global random state. Costs a few forwards on a handful of tokens.

    Args:
        original: the transformer before.
        widened: the transformer after.
        layout: base and detail channels.
        tolerance: largest relative base difference. None takes `TOLERANCES` of the coarsest weight dtype, and
            for outputs what one rounding of the tokens does, where that is more.
        seed: of the dummy inputs.

    Raises:
        WarmStartError: names the layer that leaks, or says why nothing can be concluded.
    """
    description = description_of(original).fitted(original, layout.base_channels)
    _compare_weights(original, widened, description, layout)

    dtype = max({p.dtype for p in original.parameters()}, key=lambda d: torch.finfo(d).eps)
    runner = SideBySide(original, widened, description, layout, dtype, tolerance, seed)
    with undisturbed(original), undisturbed(widened):
        own = runner.compare({}, {})
        random, random_widened = _random_channel_weights(original, widened, description, layout, seed)
        awake = runner.compare(random, random_widened)
        runner.require_sensitivity(random, awake.tolerance)
    return WarmStartReport(
        max_base_difference=own.max_base_difference,
        max_base_difference_random=awake.max_base_difference,
        max_detail_output=max(own.max_detail_output, awake.max_detail_output),
        tolerance=max(own.tolerance, awake.tolerance),
        dtype=dtype,
        latent=tuple(runner.base.shape),
        layers=layer_names(description.places),
    )


def _compare_weights(
    original: ModelMixin, widened: nn.Module, description: ChannelDescription, layout: LatentLayout
) -> None:
    sizes = description.resolve_sizes(original)
    places = {place.parameter: place for place in description.places}
    before, after = _named_tensors(original), _named_tensors(widened)
    if before.keys() != after.keys():
        raise WarmStartError(
            f"only one of the two models has {', '.join(sorted(before.keys() ^ after.keys()))}"
        )
    for name, tensor in before.items():
        kept = after[name]
        if name in places:
            kept, detail = places[name].split(kept, sizes, layout)
            if detail.count_nonzero():
                raise WarmStartError(
                    f"layer {places[name].layer} leaks: the new part of {name} is not zero "
                    f"(largest {detail.abs().max():.1e})"
                )
        if kept.shape != tensor.shape or not torch.equal(kept, tensor):
            where = "base channels of " if name in places else ""
            raise WarmStartError(
                f"layer {name.rpartition('.')[0]} does not compute what it did: the {where}{name} differ "
                "from the original's (other values, or channels in another order)"
            )


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _random_channel_weights(
    original: ModelMixin, widened: nn.Module, description: ChannelDescription, layout: LatentLayout, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    # original + R and widened + [R, 0]: whatever else the widened weights hold stays in.
    generator = torch.Generator().manual_seed(seed + 1)
    sizes = description.resolve_sizes(original)
    before, after = dict(original.named_parameters()), dict(widened.named_parameters())
    random, random_widened = {}, {}
    for place in description.places:
        name = place.parameter
        if name not in before:
            continue
        noise = torch.randn(before[name].shape, generator=generator)
        noise = (noise / noise[0].numel() ** 0.5).to(before[name])  # by the fan-in: outputs of order one
        random[name] = before[name] + noise
        random_widened[name] = after[name] + place.widen(noise, sizes, layout)
    return random, random_widened
