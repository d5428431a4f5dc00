"""Verify on the module itself that a widened transformer starts as the original.

Three checks, each of which detects what the others cannot:

1. *The weights.* The weights of the detail channels must be zero, and every other weight must equal the
   original's exactly.
2. *The layers in use.* Both models run on the same base latent, with several detail latents. The features
   must agree after each input layer and before each output layer, and the head must give the original's
   values for base channels and exactly zero for detail channels. The first layer that differs is reported.
3. *The same with random channel layers.* A pretrained model may end in zeros (an untrained head), and then
   all outputs agree. So the run is repeated with random numbers added to the original's input and output
   weights, and inserted into the widened model as described: if the description has the channel order wrong,
   outputs now differ. The random weights replace the weights during the call only; neither model is changed.

New zero weights change only the order of summation in the token embedding. How large such a rounding difference
becomes at the output depends on the model's depth, so it is measured: the original runs once more with each
token feature changed by one rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.errors import WarmStartError
from davae.latents import LatentLayout
from davae.warm_start.description import ChannelDescription, layer_names
from davae.warm_start.observe import Trace, largest_difference, relative_difference, run_watched, undisturbed
from davae.warm_start.patterns import split_axis
from davae.warm_start.plain_state import unwrapped
from davae.warm_start.registry import description_of

#: Largest base difference that passes, relative to the largest value: five to nine roundings, in float64 more.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: If rounding differences grow beyond that, this many times the effect of one rounding of the tokens ...
ROUNDINGS = 4
#: ... but never more than this: channels in a wrong order differ by order one.
LARGEST_TOLERANCE = 0.1

BATCH = 2
#: Standard deviations of the detail latents: zero, that of a normalised latent, and far larger.
DETAIL_SCALES = (0.0, 1.0, 100.0)


@dataclass(frozen=True)
class WarmStartReport:
    """What the self-check measured.

    Attributes:
        max_base_difference: largest difference of base outputs, relative to the largest output, with the
            model's own weights.
        max_base_difference_random: the same with random channel layers.
        max_detail_output: largest magnitude of a detail output over all runs.
        tolerance: largest difference of base outputs that passed, the larger of the two runs.
        dtype: least precise dtype of the weights.
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
    original: ModelMixin, widened: ModelMixin, layout: LatentLayout, *, tolerance: float | None = None, seed: int = 0
) -> WarmStartReport:
    """Verify that `widened` gives the original's base outputs and zero details for any detail inputs.

    Neither model is changed, nor is the global random state. Costs about a dozen forwards on a few tokens.

    Args:
        original: the transformer before widening.
        widened: the transformer after widening.
        layout: base and detail channels.
        tolerance: largest relative base difference. None takes `TOLERANCES` of the least precise weight
            dtype and, for outputs, up to `ROUNDINGS` times the effect of one rounding of the tokens if larger.
        seed: of the dummy inputs.

    Raises:
        WarmStartError: the models differ (the layer is named), or nothing can be concluded (with the reason).
    """
    original, widened = unwrapped(original), unwrapped(widened)
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
        raise WarmStartError(f"only one of the two models has {', '.join(sorted(before.keys() ^ after.keys()))}")
    for name, tensor in before.items():
        kept = after[name]
        if name in places:
            kept, detail = places[name].split(kept, sizes, layout)
            if detail.count_nonzero():
                raise WarmStartError(
                    f"layer {places[name].layer} leaks: the new part of {name} is not zero "
                    f"(largest {detail.abs().max():.1e})"
                )
        if not same_values(kept, tensor):
            where = "base channels of " if name in places else ""
            raise WarmStartError(
                f"layer {name.rpartition('.')[0]} does not compute what it did: the {where}{name} differ "
                "from the original's (other values, or channels in another order)"
            )


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal; NaN equals NaN (as in memory that was never written)."""
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _random_channel_weights(
    original: ModelMixin, widened: nn.Module, description: ChannelDescription, layout: LatentLayout, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    # original + R and widened + [R, 0]: errors in the widened weights remain.
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


@dataclass
class Difference:
    """The results of a comparison, and the tolerance it applied to outputs."""

    tolerance: float
    max_base_difference: float = 0.0
    max_detail_output: float = 0.0


class SideBySide:
    """Runs both models on the same base latent and compares them from the input to the output."""

    def __init__(
        self,
        original: ModelMixin,
        widened: ModelMixin,
        description: ChannelDescription,
        layout: LatentLayout,
        dtype: torch.dtype,
        tolerance: float | None,
        seed: int,
    ) -> None:
        self.original, self.widened = original, widened
        self.description, self.layout = description, layout
        self.given_tolerance = tolerance
        self.tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
        self.seed = seed
        self.inputs, self.outputs = layer_names(description.inputs), layer_names(description.outputs)
        if not self.outputs:
            lists = {name: original.get_submodule(name) for name in description.residuals}
            self.outputs = tuple(f"{name}.{i}" for name, layers in lists.items() for i in range(len(layers)))
        self.like = original.get_parameter(description.inputs[0].parameter)  # device and dtype of latents
        self.grid, self.sizes = description.dummy_grid(original), description.resolve_sizes(original)
        self.base = self._latent(layout.base_channels, seed)

    def _latent(self, channels: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((BATCH, channels, *self.grid), generator=generator).to(self.like)

    def run(self, model: ModelMixin, weights: Mapping[str, Tensor], latent: Tensor, *, jitter: bool = False) -> Trace:
        """One forward for each of the description's passes, with some weights replaced for this call."""
        layers = (*self.inputs, *self.outputs)
        jittered = self.inputs if jitter else ()
        traces = []
        for more in self.description.passes:
            generator = torch.Generator().manual_seed(self.seed + 2)  # same conditioning in every run
            try:
                arguments = {**self.description.dummy_inputs(model, latent, generator), **more}
                traces.append(run_watched(model, arguments, weights=weights, layers=layers, jittered=jittered))
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError | WarmStartError):
                    raise
                which = "this" if model is self.original else "the widened"
                raise WarmStartError(
                    f"{which} {type(model).__name__} cannot be run on a small latent {tuple(latent.shape)}, so the "
                    f"warm start cannot be verified ({type(error).__name__}: {error}). Its configuration is one that "
                    "the forward of its class does not support, or one that the description of the class does not "
                    f"cover: run its forward once by hand, then see davae.warm_start.describe"
                ) from error
        return Trace.joined(traces)

    def _said(self, trace: Trace) -> Tensor:
        """The output to compare: the sample, or the input of a ControlNet's last residual layer."""
        return trace.sample if self.description.outputs else trace.entered[self.outputs[-1]][-1]

    def require_sensitivity(self, weights: Mapping[str, Tensor], tolerance: float) -> None:
        """Require that another latent moves the output by over twice the tolerance; else agreement proves nothing."""
        other = self._latent(self.layout.base_channels, self.seed + 3)
        first, second = (self._said(self.run(self.original, weights, latent)) for latent in (self.base, other))
        if not relative_difference(second, first) > 2 * tolerance:
            raise WarmStartError(
                f"{type(self.original).__name__} gives the same output for every latent, even with random "
                f"{', '.join(self.inputs + self.outputs)}: some weights between them are all zero, so "
                "the warm start cannot be verified"
            )

    def compare(self, weights: Mapping[str, Tensor], widened_weights: Mapping[str, Tensor]) -> Difference:
        """The largest differences over all detail latents; a layer that differs is a WarmStartError."""
        before = self.run(self.original, weights, self.base)
        _require_finite(self._said(before))
        result = Difference(self._output_tolerance(weights, before))
        for scale in DETAIL_SCALES:
            detail = scale * self._latent(self.layout.detail_channels, self.seed + 4)
            after = self.run(self.widened, widened_weights, torch.cat([self.base, detail], dim=1))
            kept = self._compare_layers(before, after, scale, result.tolerance)
            if not self.description.outputs:
                result.max_base_difference = max(result.max_base_difference, kept)
                continue
            axis, pattern = self.description.sample_axis, self.description.sample_pattern
            base, new = split_axis(after.sample, axis, pattern, self.sizes, self.layout, name="the model's output")
            difference, largest = relative_difference(base, before.sample), float(new.abs().max())
            self._judge_sample(difference, largest, result.tolerance)
            result.max_base_difference = max(result.max_base_difference, difference)
            result.max_detail_output = max(result.max_detail_output, largest)
        return result

    def _output_tolerance(self, weights: Mapping[str, Tensor], before: Trace) -> float:
        if self.given_tolerance is not None:
            return self.given_tolerance
        moved = self.run(self.original, weights, self.base, jitter=True)
        rounding = max(
            relative_difference(self._said(moved), self._said(before)),
            *(largest_difference(moved.entered, before.entered, name) for name in self.outputs),
        )
        return max(self.tolerance, min(ROUNDINGS * rounding, LARGEST_TOLERANCE))

    def _compare_layers(self, before: Trace, after: Trace, scale: float, output_tolerance: float) -> float:
        """Compare the features of the watched layers; returns the largest difference at the output layers."""
        largest = 0.0
        for name in self.inputs:
            difference = largest_difference(after.left, before.left, name)
            if not difference <= self.tolerance:
                cause = (
                    "its base channels give other features than in the original"
                    if scale == 0
                    else "detail channels reach the tokens"
                )
                raise WarmStartError(self._summary(name, f"{cause} (features differ by {difference:.1e})"))
        for name in self.outputs:
            difference = largest_difference(after.entered, before.entered, name)
            if not difference <= output_tolerance:
                raise WarmStartError(
                    f"the layers between {', '.join(self.inputs)} and {name} leak: {name} receives other "
                    f"features (differing by {difference:.1e}, tolerance {output_tolerance:.0e}) although "
                    "the tokens agree"
                )
            largest = max(largest, difference)
        return largest

    def _judge_sample(self, difference: float, largest_detail: float, tolerance: float) -> None:
        name = ", ".join(self.outputs)
        if largest_detail != 0:
            raise WarmStartError(self._summary(name, f"detail outputs are not zero (largest {largest_detail:.1e})"))
        if not difference <= tolerance:
            raise WarmStartError(
                self._summary(name, f"base outputs differ by {difference:.1e}, tolerance {tolerance:.0e}")
            )

    def _summary(self, name: str, what: str) -> str:
        patterns = {p.pattern for p in self.description.places if p.layer in name.split(", ")}
        return (
            f"layer {name} leaks: {what}. Its weights are where the description of "
            f"{type(self.original).__name__} puts them (pattern '{', '.join(sorted(patterns))}'), so the "
            "description does not fit the layer"
        )


def _require_finite(sample: Tensor) -> None:
    if not sample.isfinite().all():
        raise WarmStartError(
            "the original gives values that are not finite on small random inputs: its weights are damaged, "
            f"or the range of {sample.dtype} is too small; try float32"
        )
