"""Guesses the inputs of an undescribed forward, from the names of its arguments and by trial.

An argument's name determines its kind (`_KINDS`), and the model its number of features: the argument is first
given a unique width, and the weight of the first layer that receives this width shows the right one.
The forms of the latent are tried in turn: an image, tokens, frames, channels last, a list.
"""

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from davae.errors import WarmStartError, first_line
from davae.warm_start.dummy_inputs import Dummy
from davae.warm_start.observe import first_tensor

#: Exceptions that a forward may raise for an input that does not fit.
MISFITS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ArithmeticError)

#: The first pattern found in an argument's name determines its kind.
_KINDS = (
    ("mask", r"mask"),
    ("time", r"^t$|timesteps?$|^time$|^sigmas?$"),
    ("guidance", r"^guidance$"),
    ("pooled", r"pooled"),
    ("label", r"labels?$|^y$"),
    ("shapes", r"^img_shapes$"),
    ("image_ids", r"^(img|image)_ids$"),
    ("text_ids", r"^(txt|text)_ids$"),
    ("size", r"_size$|coords$"),
    ("length", r"lens?$|lengths?$"),
    ("text", r"^encoder_hidden_states$|text|prompt|caption|^cap_|^context|condition"),
)
#: Optional arguments that are passed all the same: conditioning that a model may require.
_GIVEN = {"encoder_hidden_states", "timestep", "timesteps", "class_labels", "context", "t", "y"}
_GIVEN |= {"pooled_projections", "img_ids", "txt_ids", "img_shapes"}
_WIDTHS = (1009, 1013, 1019, 1021, 1031)  # primes, which are unlikely as the width of a layer


def _image(d: Dummy, side: int) -> Tensor:
    return pixel_unshuffle(d.latent, side)  # packed if the configuration counts packed channels


#: Forms of the latent, in the order of trial, and the axis of its channels.
FORMS: dict[str, tuple[Callable[[Dummy, int], Any], int]] = {
    "image": (_image, 1),
    "tokens": (lambda d, side: d.packed(side), 2),
    "frames": (lambda d, side: _image(d, side)[:, :, None], 1),
    "channels last": (lambda d, side: _image(d, side).permute(0, 2, 3, 1)[:, None].contiguous(), 4),
    "list": (lambda d, side: list(_image(d, side)[:, :, None].unbind(0)), 1),
}


@dataclass
class GuessedInputs:
    """Guessed dummy inputs; a `DummyInputs`.

    Attributes:
        latent: the argument that takes the latent.
        form: a key of `FORMS`.
        kinds: the other arguments and their kinds.
        widths: number of features of text and pooled arguments.
        tokens: rows and columns of tokens in the trial.
        patch: rows (and columns) of latent positions per token.
        counted: the configuration key that counts the channels of the latent.
    """

    latent: str
    form: str
    kinds: dict[str, str]
    tokens: tuple[int, int]
    patch: int
    counted: str
    widths: dict[str, int] = field(default_factory=dict)

    def __call__(
        self, transformer: ModelMixin, latent: Tensor, generator: torch.Generator, **options: Any
    ) -> dict[str, Any]:
        """Keyword arguments of ``forward``."""
        d = Dummy(transformer, latent, generator, **options)
        return {self.latent: FORMS[self.form][0](d, self._packing(d))} | {
            name: self._make(d, name, kind) for name, kind in self.kinds.items()
        }

    def _packing(self, d: Dummy) -> int:
        return d.packing(d.config[self.counted])

    def _make(self, d: Dummy, name: str, kind: str) -> Any:
        side = self._packing(d) * (1 if self.form == "tokens" else self.patch)
        axes = len(d.config.get("axes_dims_rope") or d.config.get("axes_dim") or (0, 0, 0))
        makers: dict[str, Callable[[], Any]] = {
            "mask": d.text_mask,
            "time": d.time,
            "step": lambda: d.integers(2),
            "guidance": lambda: torch.full((d.batch,), 3.5, device=d.latent.device),
            "pooled": lambda: d.normal(self.widths[name]),
            "label": lambda: d.integers(2),
            "shapes": lambda: [[(1, *d.grid(side))]] * d.batch,
            "image_ids": lambda: d.positions(side, axes),
            "text_ids": lambda: d.zeros(d.text_tokens, axes),
            "length": lambda: torch.full((d.batch,), d.text_tokens, device=d.latent.device),
            "size": lambda: torch.full((d.batch, 2), 64.0, device=d.latent.device),
            "text": lambda: self._as_listed(d.text(self.widths[name])),
        }
        return makers[kind]()

    def _as_listed(self, text: Tensor) -> Any:
        return list(text.unbind(0)) if self.form == "list" else text


def guess_inputs(transformer: ModelMixin, counted: str) -> Iterator[GuessedInputs]:
    """Every guess that the forward accepts, most likely first; `counted` is the key that counts latent channels.

    A forward may accept a guess but interpret it differently (an image as wide as a token has features), so the
    caller has to check it.

    Raises:
        WarmStartError: an argument of unknown kind, or the forward accepts no guess.
    """
    first, *others = _arguments(transformer)
    required = {p.name: _kind(p) for p in others if p.default is p.empty}
    given = {p.name: _kind(p) for p in others if p.default is p.empty or _wanted(transformer, p)}
    message: list[str] = []
    taken = False
    for form, tokens, kinds in itertools.product(FORMS, ((2, 4), (4, 4)), _choices(given, required)):
        guess = GuessedInputs(first.name, form, kinds, tokens, _patch(transformer), counted)
        failure = _fit_widths(transformer, guess)
        if failure is None:
            taken = True
            yield guess
        else:
            message.append(f"as {form}: {failure}")
    if not taken:
        raise WarmStartError(
            f"its forward accepted none of the inputs guessed from its arguments ({first.name}, "
            f"{', '.join(given)}): {message[0]}"
        )


def _arguments(transformer: ModelMixin) -> list[inspect.Parameter]:
    forward = inspect.signature(type(transformer).forward)
    found = [p for p in forward.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(found) < 2:
        raise WarmStartError("its forward has no named argument for the latent")
    return found[1:]


def _kind(argument: inspect.Parameter) -> str:
    for kind, pattern in _KINDS:
        if re.search(pattern, argument.name):
            return kind
    raise WarmStartError(f"its forward needs '{argument.name}', whose kind cannot be guessed from its name")


def _wanted(transformer: ModelMixin, argument: inspect.Parameter) -> bool:
    if argument.name == "guidance":
        return bool(transformer.config.get("guidance_embeds"))
    return argument.name in _GIVEN


def _choices(*kinds: dict[str, str]) -> list[dict[str, str]]:
    """Each set of arguments with times as real numbers, then as integer steps, without repetitions."""
    stepped = [{name: "step" if k == "time" else k for name, k in choice.items()} for choice in kinds]
    choices = [*kinds, *stepped]
    return [choice for i, choice in enumerate(choices) if choice not in choices[:i]]


def _patch(transformer: ModelMixin) -> int:
    patch = transformer.config.get("patch_size") or transformer.config.get("all_patch_size") or 4
    return int(max(patch) if isinstance(patch, (tuple, list)) else patch)


def guess_passes(transformer: ModelMixin) -> tuple[dict[str, Any], ...]:
    """Arguments that select layers: those whose values the configuration lists as ``all_<name>``."""
    named = [p.name for p in _arguments(transformer) if transformer.config.get(f"all_{p.name}")]
    if not named:
        return ({},)
    values = zip(*(transformer.config[f"all_{name}"] for name in named), strict=True)
    return tuple(dict(zip(named, chosen, strict=True)) for chosen in values)


def _fit_widths(transformer: ModelMixin, guess: GuessedInputs) -> str | None:
    """Run until every width is known; None if the forward accepts the guess, otherwise why not."""
    unknown = [name for name, kind in guess.kinds.items() if kind in ("text", "pooled")]
    markers = dict(zip(unknown, _WIDTHS, strict=False))
    guess.widths.update(markers)
    for _ in range(len(unknown) + 1):
        seen: dict[int, int] = {}
        try:
            arguments = guess(transformer, probe_latent(transformer, guess), _generator())
            with _noting_widths(transformer, seen):
                sample = first_tensor(transformer(**arguments, **guess_passes(transformer)[0]))
            batch = len(arguments[guess.latent])
            return None if len(sample) == batch else f"{batch} samples went in and {len(sample)} came out"
        except MISFITS as error:
            learned = {name: seen[marker] for name, marker in markers.items() if marker in seen}
            if not learned:
                return f"{type(error).__name__}: {first_line(error)}"
            guess.widths.update(learned)
            markers = {name: marker for name, marker in markers.items() if name not in learned}
    return "the widths of its conditioning could not be determined"


@contextlib.contextmanager
def _noting_widths(transformer: nn.Module, seen: dict[int, int]) -> Iterator[None]:
    """Record, for each marked width that a layer receives, the width that its weight needs."""

    def note(module: nn.Module, args: tuple) -> None:
        for value in args:
            weight = getattr(module, "weight", None)
            marked = isinstance(value, Tensor) and value.ndim and value.shape[-1] in _WIDTHS
            if marked and isinstance(weight, Tensor):
                seen.setdefault(value.shape[-1], weight.shape[-1])

    with contextlib.ExitStack() as hooks:
        for module in transformer.modules():
            hooks.callback(module.register_forward_pre_hook(note).remove)
        yield


def probe_latent(transformer: ModelMixin, guess: GuessedInputs) -> Tensor:
    """A random latent [2, C, h, w] with the configuration's channels."""
    side = 1 if guess.form == "tokens" else guess.patch
    shape = (2, transformer.config[guess.counted], guess.tokens[0] * side, guess.tokens[1] * side)
    return torch.randn(shape, generator=_generator()).to(next(transformer.parameters()))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
