"""What upgrading, training, saving and planning need to know about a family of pipelines, behind one interface.

Pipelines differ in how they encode prompts, pack latents, count time and sign their prediction. A
:class:`PipelineFamily` hides all of it: latents are ``[B, C + D, h, w]`` in the autoencoder's channels, a level of
noise is ``sigma`` in [0, 1] (flow) or an integer timestep (DDPM), and the prediction is ``noise - data`` (flow) or
the noise (DDPM).

Other differences are attributes or methods here too, with the default that fits most pipelines: how a class determines
the size of an image, where its timestep shift comes from, what must be corrected on an upgraded pipeline. A family
overrides them in its own file.
"""

import difflib
import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.errors import DavaeError
from davae.import_hooks import call_plugins
from davae.models import AutoencoderDA
from davae.models.latent_space import encode, from_model_space, to_model_space
from davae.pipelines.families.class_fixes import check_sizes, fit_base_loras, fit_sizes
from davae.warm_start.plain_state import unwrapped

PROMPTS_TOGETHER = 16
"""Prompts to encode at a time."""

P = TypeVar("P", bound=DiffusionPipeline)
Conditioning = Mapping[str, Tensor]
"""Named tensors whose first axis is the sample."""

logger = logging.getLogger(__name__)


class PipelineFamily(ABC):
    """Pipelines whose transformer is called in the same way.

    A subclass defines how prompts are encoded (``_encode``) and how the transformer is called (``_predict``).

    Attributes:
        pipelines: names of the pipeline classes; the first makes images from text (or classes) alone.
        kind: ``"flow"`` or ``"ddpm"``, see :meth:`predict`.
        conditioned_on: ``"text"`` or ``"class"``.
        lora_targets: name suffixes of the modules that get a LoRA by default.
        text_length: tokens that a prompt is padded to; the pipeline's own default.
        longest_text: largest number of tokens that the pipeline takes; None for no limit.
        reads_shift: the pipeline applies the autoencoder's ``shift_factor``.
        packed: the pipeline packs two by two latent positions into a token.
        trainable: prompts can be encoded and the transformer called, see :class:`UpgradeOnlyFamily`.
        sizes: how the classes determine image sizes: ``"derived"`` from the autoencoder; ``"fixed"``, 8 pixels per
            latent position with any autoencoder; ``"listed"``, rounded to the nearest of a list made for the base.
        edits_images: every pipeline of the family takes an image, although its call has no ``strength``.
        extra_text_tokens: text tokens of the transformer besides those of the padded prompt.
        shift_rule: how the classes derive a dynamic timestep shift, as the predicate of a sentence on the class; None
            if they derive it from the scheduler's configuration and the number of tokens.
        shift_reads_pixels: that rule uses the size in pixels, so it cannot give the base's shift at equal tokens.
        follow_transformer: parts that are further transformers of the base, and in a tuned pipeline the tuned one.
    """

    pipelines: ClassVar[tuple[str, ...]]
    kind: ClassVar[Literal["flow", "ddpm"]] = "flow"
    conditioned_on: ClassVar[Literal["text", "class"]] = "text"
    lora_targets: ClassVar[tuple[str, ...]]
    text_length: ClassVar[int] = 256
    longest_text: ClassVar[int | None] = None
    reads_shift: ClassVar[bool] = True
    packed: ClassVar[bool] = False
    trainable: ClassVar[bool] = True
    sizes: ClassVar[Literal["derived", "fixed", "listed"]] = "derived"
    edits_images: ClassVar[bool] = False
    extra_text_tokens: ClassVar[int] = 0
    shift_rule: ClassVar[str | None] = None
    shift_reads_pixels: ClassVar[bool] = False
    follow_transformer: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The text-to-image (or class-to-image) pipeline's class name."""
        return self.pipelines[0]

    # Prompts

    def check_length(self, max_length: int | None) -> None:
        """Check the number of tokens that prompts are padded to.

        Raises:
            DavaeError: the pipeline takes fewer tokens.
        """
        if self.longest_text is not None and (max_length or 0) > self.longest_text:
            raise DavaeError(
                f"diffusion.prompts.max_length is {max_length}, but {self.name} takes at most {self.longest_text} "
                f"tokens: set it to {self.longest_text} or less"
            )

    @torch.no_grad()
    def encode_prompts(
        self, pipe: DiffusionPipeline, prompts: Sequence[str], *, max_length: int | None = None
    ) -> dict[str, Tensor]:
        """The transformer's conditioning for each prompt, from the pipeline's own encoders.

        An empty prompt gives what the pipeline uses as "no prompt" in classifier-free guidance, which in some
        families is not the encoding of an empty text. No prompts at all are a DavaeError.

        Args:
            pipe: a pipeline of this family.
            prompts: one text per sample; names of classes in a class-conditional family.
            max_length: tokens that prompts are cut or padded to; None means :attr:`text_length`.

        Returns:
            Tensors by name, with the prompt as first axis and every prompt padded to the same length, so that encodings
            of different calls can be concatenated.
        """
        if not prompts:
            raise DavaeError("there are no prompts to encode")
        length = max_length or self.text_length
        found: dict[bool, dict[str, Tensor]] = {}
        places: dict[bool, list[int]] = {False: [], True: []}
        for i, prompt in enumerate(prompts):
            places[not prompt].append(i)
        for empty, where in places.items():
            if where:
                found[empty] = self._encode(pipe, [prompts[i] for i in where], length, empty)
        order = torch.tensor(places[False] + places[True]).argsort()
        names = next(iter(found.values())).keys()
        joined = {n: torch.cat([found[e][n] for e in (False, True) if e in found]) for n in names}
        return {name: value[order.to(value.device)] for name, value in joined.items()}

    def tell_cut_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str], max_length: int | None = None) -> int:
        """The number of prompts with more tokens than the pipeline uses; a warning is logged unless it is 0.

        Counted with the pipeline's last tokenizer, whose encoder takes the longest text. A family whose pipeline cuts
        no prompts raises a DavaeError instead.
        """
        tokenizers = [part for name, part in sorted(pipe.components.items()) if name.startswith("tokenizer") and part]
        if not tokenizers or not prompts:
            return 0
        length = min(max_length or self.text_length, tokenizers[-1].model_max_length)
        found = tokenizers[-1](list(prompts), truncation=False, verbose=False).input_ids
        cut = sum(len(tokens) > length for tokens in found)
        if cut:
            text = "%d of %d prompts have more than %d tokens: the rest of each is ignored"
            logger.warning(text, cut, len(prompts), length)
        return cut

    @abstractmethod
    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        """Encode prompts, which are either all empty or all not empty."""

    # Latents

    @torch.no_grad()
    def latents_of(self, vae: ModelMixin, images: Tensor, *, details_seed: int | None = None) -> Tensor:
        """Encode images ``[B, 3, H, W]`` in [-1, 1] to ``[B, C + D, h, w]``, scaled as the transformer takes them.

        The mode of a VAE's posterior is taken, or with ``details_seed`` a draw of the details (see
        :func:`davae.models.latent_space.encode`).
        """
        return to_model_space(vae, encode(vae, images, details_seed=details_seed), shifted=self.reads_shift)

    def raw_base(self, base_vae: ModelMixin, base: Tensor) -> Tensor:
        """Convert base latents ``[B, C, h, w]`` from the transformer's scale to the base VAE's, for decoding."""
        return from_model_space(base_vae, base)

    # The transformer

    def predict(
        self,
        transformer: ModelMixin,
        noisy: Tensor,
        level: Tensor,
        conditioning: Conditioning,
        *,
        guidance: float = 3.5,
    ) -> Tensor:
        """The transformer's prediction, in davae's order of channels and sign.

        Args:
            transformer: of this family; may carry adapters.
            noisy: ``[B, C + D, h, w]``.
            level: ``[B]``: ``sigma``, the share of noise in [0, 1] (flow), or the timestep (DDPM).
            conditioning: from :meth:`encode_prompts`.
            guidance: scale for a guidance-distilled transformer; others ignore it.

        Returns:
            ``[B, C + D, h, w]``: ``noise - data`` for flow, the noise for DDPM (without a learned variance).
        """
        return self.predict_with_variance(transformer, noisy, level, conditioning, guidance=guidance)[0]

    def predict_with_variance(
        self,
        transformer: ModelMixin,
        noisy: Tensor,
        level: Tensor,
        conditioning: Conditioning,
        *,
        guidance: float = 3.5,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`predict`, and the learned variance in the same shape; None if the transformer learns none."""
        floating = {k: v.to(noisy.dtype) if v.is_floating_point() else v for k, v in conditioning.items()}
        predicted = self._predict(transformer, noisy, level, floating, guidance)
        channels = noisy.shape[1]
        learned = predicted[:, channels:] if predicted.shape[1] == 2 * channels else None
        return predicted[:, :channels], learned

    @abstractmethod
    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        """:meth:`predict` with the conditioning in the dtype of ``noisy``; a learned variance may follow."""

    def idle_layers(self, transformer: ModelMixin) -> list[str]:
        """Names of the layers of a transformer whose output nothing uses; they never get a gradient.

        Such are the last steps of a text stream that ends with it. They are neither trained nor adapted.
        """
        return []

    def tokens(self, transformer: ModelMixin, latent: Tensor) -> int:
        """Number of image tokens of a latent ``[B, C + D, h, w]`` in the transformer."""
        patch = 2 if self.packed else int(transformer.config.patch_size)
        return (latent.shape[-2] // patch) * (latent.shape[-1] // patch)

    # Schedules

    def timestep_shift(self, pipe: DiffusionPipeline, tokens: int) -> float:
        """The shift of the noise levels in training: the one that the pipeline samples with at this token count.

        ``sigma <- shift sigma / (1 + (shift - 1) sigma)``. A scheduler with dynamic shifting derives it from the
        number of image tokens; others have it in their configuration.
        """
        return scheduler_shift(pipe.scheduler.config, tokens)

    def shift_line_factor(self, *, native: bool, scale: int, channels: tuple[int, int]) -> float:
        """The factor for the token counts of a dynamic shift (:data:`SHIFT_LINE`) in an upgraded pipeline.

        Args:
            native: use the schedule of the full resolution, not the one of the number of tokens.
            scale: ``s``.
            channels: of the base latent and of the upgraded one.
        """
        return 1.0 / scale**2 if native else 1.0

    # Upgraded pipelines

    def mend(self, pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:  # noqa: B027  most families need nothing
        """Correct what the class of an upgraded pipeline assumes about latents, apart from sizes; idempotent.

        It is not saved, so it is repeated after every upgrade and every loading.

        Args:
            pipe: changed in place.
            vae: the pipeline's autoencoder.
        """

    def join_parts(self, pipe: DiffusionPipeline) -> None:
        """Let the parts of :attr:`follow_transformer` be the transformer, in a pipeline to be tuned or a tuned one."""
        pipe.register_modules(**dict.fromkeys(self.follow_transformer, pipe.transformer))

    # Samples

    @torch.no_grad()
    def sample(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        generators: Sequence[torch.Generator],
        max_length: int | None = None,
        embeddings: Mapping[str, Conditioning] | None = None,
    ) -> Tensor:
        """Images of prompts, ``[B, 3, H, W]`` in [-1, 1], with one generator per image, as one batch.

        For an image-to-image or inpainting pipeline, the text-to-image pipeline is built from its parts.

        Args:
            embeddings: conditioning of each prompt and of the empty one, tensors without batch axis, from
                :meth:`encode_prompts`; the pipeline then needs no text encoders. By default it encodes the prompts.
        """
        if not any(cls.__name__ == self.name for cls in type(pipe).__mro__):
            pipe = fit_to_autoencoder(getattr(diffusers, self.name)(**pipe.components))
        arguments = self._call_arguments(list(prompts), height, width, guidance_scale, max_length)
        if embeddings is not None:
            arguments = {k: v for k, v in arguments.items() if k not in ("prompt", "negative_prompt")}
            if "negative_prompt" in inspect.signature(type(pipe).__call__).parameters:
                arguments["negative_prompt"] = None  # by default the empty prompt in PixArt
            arguments |= self._embedded(pipe, [embeddings[prompt] for prompt in prompts], embeddings[""])
        return self._images(pipe, num_inference_steps, generators, arguments)

    @staticmethod
    def _images(
        pipe: DiffusionPipeline,
        num_inference_steps: int,
        generators: Sequence[torch.Generator],
        arguments: dict[str, Any],
    ) -> Tensor:
        """One call of the pipeline without a progress bar: ``[B, 3, H, W]`` in [-1, 1] on the CPU."""
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            **arguments, num_inference_steps=num_inference_steps, generator=list(generators), output_type="pt"
        ).images
        return images.float().cpu() * 2 - 1

    def _embedded(
        self, pipe: DiffusionPipeline, conditioning: Sequence[Conditioning], empty: Conditioning
    ) -> dict[str, Tensor]:
        """Arguments of the pipeline's call in place of prompts: embeddings, and those of no prompt for guidance."""
        transformer, known = pipe.transformer, inspect.signature(type(pipe).__call__).parameters
        found = {name: torch.stack([one[name] for one in conditioning]) for name in empty}
        found |= {
            f"negative_{name}": value.expand(len(conditioning), *value.shape)
            for name, value in empty.items()
            if f"negative_{name}" in known
        }
        return {
            name: value.to(transformer.device, transformer.dtype if value.is_floating_point() else None)
            for name, value in found.items()
        }

    def _call_arguments(
        self, prompts: list[str], height: int, width: int, guidance_scale: float, max_length: int | None
    ) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, without those that all pipelines share."""
        arguments = {
            "prompt": prompts,
            "height": height,
            "width": width,
            "guidance_scale": guidance_scale,
            "max_sequence_length": max_length or self.text_length,
        }
        return arguments | ({"use_resolution_binning": False} if self.sizes == "listed" else {})


class UpgradeOnlyFamily(PipelineFamily):
    """Pipelines that can be upgraded, saved and planned, but not trained: their calls are not defined here."""

    pipelines: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ()
    trainable = False

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        raise _untrainable(type(pipe).__name__)

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        raise _untrainable(f"pipeline of a {type(transformer).__name__}")


SHIFT_LINE = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""The line ``mu(n)`` of a dynamic shift through two points (token count, ``mu``); the defaults of pipelines."""


def scheduler_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The timestep shift that a flow-matching scheduler applies at a number of image tokens.

    With dynamic shifting ``mu`` grows linearly from ``base_shift`` at ``base_image_seq_len`` tokens to
    ``max_shift`` at ``max_image_seq_len``, and the shift is ``exp(mu)`` (or ``mu`` if ``time_shift_type``
    is "linear"). Otherwise it is ``flow_shift`` (multistep solvers) or ``shift``, and 1 without either.
    """
    if config.get("use_dynamic_shifting"):
        low, high, at_low, at_high = (config.get(key, value) for key, value in SHIFT_LINE.items())
        mu = at_low + (at_high - at_low) * (tokens - low) / (high - low)
        return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
    for key in ("flow_shift", "shift"):
        if config.get(key):
            return float(config[key])
    return 1.0


_FAMILIES: dict[str, PipelineFamily] = {}
_UNKNOWN = UpgradeOnlyFamily()


def register_family(family: PipelineFamily) -> PipelineFamily:
    """Register the pipelines of a family; returns the family.

    Raises:
        DavaeError: one of its class names belongs to another family.
    """
    for name in family.pipelines:
        if _FAMILIES.setdefault(name, family) is not family:
            raise DavaeError(f"{name} already belongs to the family of {_FAMILIES[name].name}")
    return family


def registered_pipelines() -> list[str]:
    """Names of the pipeline classes that can be trained."""
    return sorted(name for name, family in _FAMILIES.items() if family.trainable)


def find_family(pipe: DiffusionPipeline | type[DiffusionPipeline] | str) -> PipelineFamily:
    """The family of a pipeline, given as object, class or class name, whether it can be trained or not.

    It is the family that names the class or its nearest ancestor; without one, a family with all the defaults. Families
    of plug-ins (``davae.families``) are known too.
    """
    call_plugins("davae.families")
    if isinstance(pipe, str):
        cls = getattr(diffusers, pipe, None)
        names = [pipe, *(parent.__name__ for parent in getattr(cls, "__mro__", ()))]
    else:
        cls = pipe if isinstance(pipe, type) else type(pipe)
        names = [parent.__name__ for parent in cls.__mro__]
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), _UNKNOWN)


def family_of(pipe: DiffusionPipeline | type[DiffusionPipeline] | str) -> PipelineFamily:
    """:func:`find_family` for a pipeline to be trained.

    Raises:
        DavaeError: no family can train it; names the most similar known class, and how to add a family.
    """
    if (why := why_untrainable(pipe)) is not None:
        raise why
    return find_family(pipe)


def why_untrainable(
    pipe: DiffusionPipeline | type[DiffusionPipeline] | str, transformer: Mapping[str, Any] | None = None
) -> DavaeError | None:
    """Why stage 2 cannot train a pipeline, for those who go on without: no family can, or its weights are quantised.

    Args:
        pipe: the pipeline, its class, or the class's name.
        transformer: the configuration that its transformer is saved with, if it is known.
    """
    if not find_family(pipe).trainable:
        cls = pipe if isinstance(pipe, type | str) else type(pipe)
        return _untrainable(cls if isinstance(cls, str) else cls.__name__)
    quantised = (transformer or {}).get("quantization_config")
    if not quantised:
        return None
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
    return DavaeError(
        f"the base's transformer is saved with quantised weights ({method or 'quantization_config'}), which cannot be "
        "widened: take the pipeline that it was quantised from. diffusion.tune.quantization=8bit or 4bit quantises it "
        "for the training, and the upgraded pipeline can be quantised like any other"
    )


def _untrainable(name: str) -> DavaeError:
    near = difflib.get_close_matches(name, registered_pipelines(), n=1)
    return DavaeError(
        f"davae does not know how to train a {name}{f' (did you mean {near[0]}?)' if near else ''}. Known "
        f"are {', '.join(registered_pipelines())}. Add it with davae.pipelines.families.register_family("
        "YourFamily()), a PipelineFamily that defines how prompts are encoded and the transformer is called"
    )


def fit_to_autoencoder(pipe: P) -> P:
    """Make ``height`` and ``width`` of a pipeline with an :class:`AutoencoderDA` mean full resolution; idempotent.

    Also lets it load LoRAs of the base, and applies :meth:`PipelineFamily.mend`. Called by :func:`upgrade_pipeline`
    and :func:`davae.load_pipeline`. Pipelines without such an autoencoder are not changed.

    Args:
        pipe: changed in place.

    Returns:
        The same pipeline.
    """
    vae = unwrapped(getattr(pipe, "vae", None))
    if isinstance(vae, AutoencoderDA):
        fit_sizes(pipe, vae)
        check_sizes(pipe, vae)
        if isinstance(transformer := unwrapped(getattr(pipe, "transformer", None)), ModelMixin):
            fit_base_loras(transformer, vae.layout)
            find_family(pipe).mend(pipe, vae)
    return pipe


def embedded_guidance(transformer: ModelMixin, noisy: Tensor, guidance: float) -> Tensor | None:
    """The guidance scale of each sample, float32 ``[B]``, as a transformer distilled from guidance takes it; None for
    others.
    """
    if not transformer.config.guidance_embeds:
        return None
    return noisy.new_full((len(noisy),), guidance, dtype=torch.float32)


def pack(latent: Tensor) -> Tensor:
    """``[B, C, h, w]``, h and w even, to tokens ``[B, h/2 * w/2, C * 4]``, row by row, channel slowest in a token."""
    batch, channels, height, width = latent.shape
    if height % 2 or width % 2:
        raise DavaeError(f"a latent of {height} x {width} cannot be packed two by two: choose a size with even sides")
    split = latent.view(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`: ``[B, h/2 * w/2, C * 4]`` to ``[B, C, h, w]``."""
    batch, _, features = tokens.shape
    split = tokens.view(batch, height // 2, width // 2, features // 4, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)
