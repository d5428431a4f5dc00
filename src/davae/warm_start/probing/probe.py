"""Find where channels are in an undescribed transformer by running it.

1. The layers whose weights grow with the configuration's channel counts are the candidates (`candidates`).
2. Inputs are guessed from the forward's arguments (`guess_inputs`).
3. One latent channel is changed at a time: the features that change at an input layer are that channel's.
4. The output of each head is replaced by the indices of its features: the position of an index in the sample
   shows its channel. Twice as many output as input channels are mean and variance.
5. An order ``(slower) c (faster)`` becomes a pattern, which the self-check then verifies.

The values of the weights do not matter, so a newly initialised model can be probed as well as a trained one.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.errors import WarmStartError
from davae.warm_start.description import ChannelDescription, ChannelPlace
from davae.warm_start.observe import first_tensor, undisturbed
from davae.warm_start.probing.candidates import Candidate, channel_counts, find_candidates
from davae.warm_start.probing.guess_inputs import FORMS, GuessedInputs, guess_inputs, guess_passes, probe_latent

_DIGIT = 128  # integers up to this are exact in every floating-point dtype of weights
_PROBED: dict[str, ChannelDescription] = {}


def probed_description(transformer: ModelMixin) -> ChannelDescription:
    """A description found by running the transformer on a few tokens; cached by configuration.

    Raises:
        WarmStartError: probing fails; names the layer or argument that causes it.
    """
    counts = channel_counts(transformer)
    key = _key(transformer, counts)
    if key not in _PROBED:
        with undisturbed(transformer):
            _PROBED[key] = _probe(transformer, counts)
    return _PROBED[key]


def _probe(transformer: ModelMixin, counts: dict[str, int | None]) -> ChannelDescription:
    candidates = find_candidates(transformer, counts)
    failures: list[WarmStartError] = []
    for inputs in guess_inputs(transformer, _counted(counts)):
        try:
            return _Probe(transformer, counts, candidates, inputs).description()
        except WarmStartError as error:  # the forward may interpret the guess differently
            failures.append(error)
    raise failures[0]


def _key(transformer: ModelMixin, counts: dict[str, int | None]) -> str:
    # Only ratios of the counts, so that a widened transformer has the same key as its original.
    ratios = {name: value and value / (counts[_counted(counts)] or 1) for name, value in counts.items()}
    rest = {k: v for k, v in transformer.config.items() if k not in counts and not k.startswith("_")}
    cls = type(transformer)
    return f"{cls.__module__}.{cls.__qualname__} {json.dumps([ratios, rest], sort_keys=True, default=str)}"


def _counted(counts: dict[str, int | None]) -> str:
    """The key that counts the channels of the input."""
    named = [k for k, v in counts.items() if v]
    return next((k for k in named if k.startswith("in_") or k == "latent_channels"), named[0])


class _Probe:
    """The probing of one transformer with one guess of its inputs."""

    def __init__(
        self, transformer: ModelMixin, counts: dict[str, int | None], candidates: list[Candidate], inputs: GuessedInputs
    ) -> None:
        self.transformer, self.counts = transformer, counts
        self.counted = _counted(counts)
        self.channels = int(transformer.config[self.counted])
        self.candidates, self.inputs = candidates, inputs
        self.latent = probe_latent(transformer, self.inputs)
        self.passes = guess_passes(transformer)

    def description(self) -> ChannelDescription:
        entering = self._entering()
        inputs = tuple(
            ChannelPlace(f"{c.layer}.weight", c.axis, self._pattern(c, entering[c.layer]))
            for c in self.candidates
            if c.takes
        )
        outputs: list[ChannelPlace] = []
        for candidate in self.candidates:
            if not candidate.takes:
                sample, axis, channels = self._leaving(candidate)
                pattern = self._pattern(candidate, channels)
                outputs.append(ChannelPlace(f"{candidate.layer}.weight", candidate.axis, pattern))
                outputs.append(ChannelPlace(f"{candidate.layer}.bias", 0, pattern, optional=True))
        return ChannelDescription(
            inputs=inputs,
            outputs=tuple(outputs),
            dummy_inputs=self.inputs,
            sizes={"p": 1 if self.inputs.form == "tokens" else self.inputs.patch},
            counts=self._counts(),
            sample_pattern=self._sample_pattern(sample, axis),
            sample_axis=axis,
            tokens=self.inputs.tokens,
            packing=2,  # enough positions even if the latent is packed two by two
            passes=self.passes,
            source="probed",
        )

    def _run(self, latent: Tensor, more: Mapping[str, Any]) -> Any:
        generator = torch.Generator().manual_seed(0)
        return self.transformer(**self.inputs(self.transformer, latent, generator), **more)

    # Input layers

    def _entering(self) -> dict[str, Tensor]:
        """For each input layer, the channel of each feature [n], -1 if no channel changes it."""
        plain = self._features(self.latent)
        owners = {name: torch.full((features.shape[0],), -1) for name, features in plain.items()}
        for channel in range(self.channels):
            changed = self.latent.clone()
            changed[:, channel] += 1
            for name, features in self._features(changed).items():
                moved = (features != plain[name]).any(1).cpu()
                if (owners[name][moved] != -1).any():
                    raise WarmStartError(
                        f"layer {name}: one of its input features depends on several latent channels: channels are "
                        "mixed before it, so base and detail cannot be distinguished in its weights"
                    )
                owners[name][moved] = channel
        return owners

    def _features(self, latent: Tensor) -> dict[str, Tensor]:
        """The input of each input layer, features first [n, rest]."""
        names = [c.layer for c in self.candidates if c.takes]
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[nn.Module, tuple, dict], None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                entered = first_tensor((*args, *kwargs.values())).detach()
                axis = -1 if isinstance(module, nn.Linear) else 1
                seen[name] = entered.movedim(axis, 0).flatten(1)
                if len(seen) == len(names):
                    raise _SeenEnough

            return hook

        with contextlib.ExitStack() as hooks:
            for name in names:
                layer = self.transformer.get_submodule(name)
                hooks.callback(layer.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            with contextlib.suppress(_SeenEnough):
                for more in self.passes:
                    self._run(latent, more)
        for name in names:
            if name not in seen:
                raise WarmStartError(f"layer {name} grows with the channel counts but does not run")
        return seen

    # Output layers

    def _leaving(self, head: Candidate) -> tuple[Tensor, int, Tensor]:
        """A sample, its channel axis, and the channel of each feature of the head [n]."""
        numbers = torch.arange(head.features)
        silent, low, high = (
            self._with_head(head, n) for n in (torch.zeros_like(numbers), numbers % _DIGIT + 1, numbers // _DIGIT + 1)
        )
        low, high = (low - silent).abs(), (high - silent).abs()
        arrived = ((high - 1) * _DIGIT + (low - 1)).round().long().cpu()
        exact = bool(((low.round() == low) & (high.round() == high)).all())
        if not exact or arrived.min() < 0 or arrived.max() >= head.features:
            raise WarmStartError(
                f"layer {head.layer}: its output does not reach the model's output unchanged, so the channels of "
                "its rows cannot be determined"
            )
        for axis in (FORMS[self.inputs.form][1], *range(1, arrived.ndim)):
            size = arrived.shape[axis]
            if size % self.channels and (size * 2) % self.channels:
                continue
            owners = self._owners(arrived.movedim(axis, 0).flatten(1), head.features)
            if owners is not None:
                return silent, axis, owners % self.channels if size % self.channels == 0 else owners
        raise WarmStartError(
            f"layer {head.layer}: no axis of the model's output {tuple(silent.shape)} holds the {self.channels} "
            f"channels that the configuration counts"
        )

    def _owners(self, arrived: Tensor, features: int) -> Tensor | None:
        """The row of `arrived` [channels, rest] that contains each feature; None if one is in several."""
        owners = torch.full((features,), -1)
        for channel, row in enumerate(arrived):
            found = row.unique()
            if (owners[found] != -1).any():
                return None
            owners[found] = channel
        return owners

    def _with_head(self, head: Candidate, numbers: Tensor) -> Tensor:
        """The sample when a head outputs the same `numbers` at every position."""
        ran = False

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            nonlocal ran
            ran = True
            shape = [1] * output.ndim
            shape[-1 if isinstance(module, nn.Linear) else 1] = -1
            return numbers.to(output).reshape(shape).expand_as(output).clone()

        handle = self.transformer.get_submodule(head.layer).register_forward_hook(hook)
        try:
            for more in self.passes:
                sample = first_tensor(self._run(self.latent, more)).float()
                if ran:
                    return sample
        finally:
            handle.remove()
        raise WarmStartError(f"layer {head.layer} grows with the channel counts but does not run")

    # From orders to patterns

    def _pattern(self, candidate: Candidate, owners: Tensor) -> str:
        """The order of the features as a pattern ``slower c faster``."""
        n, known = len(owners), owners >= 0
        channels = self.channels
        for faster in range(1, n // channels + 1):
            if n % (channels * faster):
                continue
            order = torch.arange(n) // faster % channels
            if known.any() and torch.equal(order[known], owners[known]):
                slower = n // (channels * faster)
                factors = [str(slower)] * (slower > 1) + ["c"] + [str(faster)] * (faster > 1)
                return " ".join(self.counted if f == "c" else f for f in factors)
        raise WarmStartError(
            f"layer {candidate.layer}: its {n} features hold the {channels} channels in the order "
            f"{owners.tolist()[:16]}, which is not '(slower) c (faster)'"
        )

    def _counts(self) -> dict[str, str | tuple[str, ...]]:
        twice = 2 * self.channels
        return {k: ("2 c", "2 c 2 2") if n == twice else ("c", "c 2 2") for k, n in self.counts.items()}

    def _sample_pattern(self, sample: Tensor, axis: int) -> str:
        factor = sample.shape[axis] // self.channels
        return self.counted if factor == 1 else f"{factor} {self.counted}"


class _SeenEnough(Exception):
    """Ends a forward once every input layer has been seen."""
