"""Both training stages with random weights, built from a configuration alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn
from torch.autograd import grad

from davae.benchmark.official_stage import ALIGNMENT, OfficialStage, official_model, official_reconstruction
from davae.benchmark.variants import text_encoders_of
from davae.choices import Precision, Scale
from davae.data.images.protocol import Item, ItemDataset
from davae.diffusion.loss import FlowLoss
from davae.diffusion.noise import DdpmProcess, FlowProcess, NoiseProcess
from davae.errors import DavaeError
from davae.latents import LatentLayout, gradient_ratio, gradient_scale
from davae.models import AutoencoderDA
from davae.models.base_adapters.blocks import with_plain_blocks
from davae.pipelines.families import PipelineFamily, family_of
from davae.pipelines.sampling.speed import order_channels_last
from davae.planner.architectures import Architecture, build, widened_config
from davae.planner.plan import default_detail_channels
from davae.recipes.loop import LoopSettings, OptimizerSettings
from davae.recipes.settings import (
    AlignmentSettings,
    AutoencoderModelSettings,
    AutoencoderSettings,
    DiffusionSettings,
    FlowLossSettings,
    GanSettings,
    ReconstructionSettings,
    TuneSettings,
)
from davae.training.autoencoder.adaptive_weights import Decoded, Measure
from davae.training.autoencoder.losses import MAX_ADAPTIVE_GAN, GanLoss
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.autoencoder.stage import AutoencoderStage
from davae.training.diffusion.objective import DiffusionObjective
from davae.training.diffusion.tuning import select_trained
from davae.training.stage import Stage, TrainedModule
from davae.warm_start import dummy_arguments

Form = Literal["plain", "fast", "fast, cached"]
FORMS: tuple[Form, ...] = ("plain", "fast", "fast, cached")
ADAPTIVE = AlignmentSettings(adaptive=True)
_GAN_WEIGHT = 0.1
_BATCHES = 2  # of distinct images
_FROM_TRANSFORMER = {  # a transformer's argument -> its name in a family's conditioning
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "encoder_hidden_states_mask": "prompt_embeds_mask",
}


@dataclass(frozen=True)
class StepSettings:
    """Settings of the benchmarked step.

    Attributes:
        resolution: side of the full image in pixels.
        scale, detail_channels: of the upgrade.
        batch: images per step.
        gan: include the adversarial term, with an adaptive weight.
        tune: which weights of the transformer are trained.
        precision: as in ``loop.precision``.
        compile: as in ``loop.compile``; ignored in the plain form.
        official: train the autoencoder with the losses of the official SD3 code (see
            :mod:`davae.benchmark.official_stage`).
        lpips: VGG-16 file of an LPIPS term in the official losses.
        learning_rate, eps: of AdamW.
    """

    resolution: int
    scale: Scale = 2
    detail_channels: int | None = None
    batch: int = 4
    gan: bool = False
    tune: Literal["full", "lora"] = "full"
    precision: Precision = "no"
    compile: bool = False
    official: bool = False
    lpips: str | None = None
    learning_rate: float = 1e-4
    eps: float = 1e-8

    def details(self, architecture: Architecture) -> int:
        """``D``, by default the planner's."""
        return self.detail_channels or default_detail_channels(architecture.base_channels, self.scale)

    def loop(self, form: Form) -> LoopSettings:
        """The loop's settings for one form."""
        return LoopSettings(
            steps=1_000_000,
            batch_size=self.batch,
            precision=self.precision,
            ema_decay=0.999,
            max_grad_norm=1.0,
            compile=self.compile and form != "plain",
            channels_last=form != "plain",
            report_to=[],
        )

    def optimizer(self) -> OptimizerSettings:
        """AdamW's settings."""
        return OptimizerSettings(learning_rate=self.learning_rate, eps=self.eps)


def autoencoder_stage(architecture: Architecture, settings: StepSettings, form: Form) -> AutoencoderStage:
    """The autoencoder stage, adaptive or with the official losses; weights and images are the same in every form.

    Raises:
        DavaeError: the resolution is not a multiple of compression times patch.
    """
    details = settings.details(architecture)
    if settings.official:
        model, alignment = official_model(settings.scale, details), ALIGNMENT
        reconstruction = official_reconstruction(settings.lpips)
    else:
        model, alignment = AutoencoderModelSettings(scale=settings.scale, detail_channels=details), ADAPTIVE
        reconstruction = ReconstructionSettings(gan=GanSettings(weight=_GAN_WEIGHT if settings.gan else 0.0))
    vae = _autoencoder(architecture, settings, **model.model_dump(exclude={"scale", "detail_channels"}))
    images = RandomImages(_BATCHES * settings.batch, settings.resolution)
    recipe = AutoencoderSettings(
        model=model,
        alignment=alignment,
        reconstruction=reconstruction,
        optimizer=settings.optimizer(),
        loop=settings.loop(form),
        train_detail_encoder=not settings.official,
        target="base" if settings.official else "image",
    )
    if form == "plain":
        with_plain_blocks(vae)
    with _seeded():
        stage: type[AutoencoderStage] = AutoencoderStage
        if form == "plain":
            stage = OfficialStage if settings.official else SeparatePassesStage
        return stage(vae, recipe, images, images, cache_latents=form == "fast, cached")


class DiffusionBenchStage(Stage):
    """The diffusion stage; weights, latents and noise are the same in every form.

    Uncached forms encode images and prompts in every step; the transformer gets the same random embeddings in all.

    Args:
        architecture: what to build.
        settings: of the step.
        form: ``plain``, ``fast``, or ``fast, cached``.

    Raises:
        DavaeError: the pipeline cannot be trained, or the resolution is not a multiple of compression times patch.
    """

    name = "diffusion"

    def __init__(self, architecture: Architecture, settings: StepSettings, form: Form) -> None:
        family = family_of(architecture.pipeline)
        self.loop = settings.loop(form)
        self.vae = _autoencoder(architecture, settings).requires_grad_(False)
        layout = self.vae.layout
        with _seeded():
            widening = widened_config(architecture.build_transformer(), layout)
            wide = {**architecture.transformer, **widening}
            transformer = build(wide, device="cpu")
            recipe = DiffusionSettings(
                tune=TuneSettings(mode=settings.tune), optimizer=settings.optimizer(), loop=self.loop
            )
            rates = select_trained(transformer, family, layout, recipe)
        side = settings.resolution // self.vae.spatial_compression
        latent = torch.zeros(1, layout.channels, side, side)
        images = RandomImages(
            _BATCHES * settings.batch, settings.resolution, _conditioning(architecture, transformer, latent)
        )
        cached = form == "fast, cached"
        self.text = None if cached else text_encoders_of(architecture)

        def encode(x: Tensor) -> Tensor:
            return family.latents_of(self.vae, x)

        self.dataset = RandomLatents(images, encode) if cached else images
        if form != "plain":
            order_channels_last(self.vae)
        objective = _WithText(family, transformer, layout, _process(family, layout), FlowLossSettings(), encode=encode)
        objective.encode_text = None if self.text is None else self.text.encode
        named = {f"transformer.{name}": rate for name, rate in rates.items()}
        self.modules = [TrainedModule("model", objective, recipe.optimizer, named)]

    def to(self, device: torch.device) -> None:
        """Move the autoencoder and the text encoders."""
        self.vae.to(device)
        if self.text is not None:
            self.text.to(device)

    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """Measure nothing: the weights are random."""
        return {}

    def export(self, out: Path) -> Path:
        """Write nothing: the weights are random."""
        return out


class _WithText(DiffusionObjective):
    """The stage's loss, preceded by encoding of prompts unless it is cached."""

    encode_text: Callable[[int], None] | None = None

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        if self.encode_text is not None:
            self.encode_text(len(batch["label"]))
        return super().forward(batch, step)


def _autoencoder(architecture: Architecture, settings: StepSettings, **options: Any) -> AutoencoderDA:
    details = settings.details(architecture)
    with _seeded():
        base = build(architecture.vae, device="cpu")
        vae = AutoencoderDA.from_base(base, scale=settings.scale, detail_channels=details, **options)
    unit = vae.spatial_compression * architecture.patch
    if settings.resolution % unit:
        raise DavaeError(f"{settings.resolution} pixels are not a multiple of {unit} (compression x patch)")
    return vae


def _process(family: PipelineFamily, layout: LatentLayout) -> NoiseProcess:
    if family.kind == "ddpm":
        return DdpmProcess(layout, diffusers.DDPMScheduler().config)
    return FlowProcess(FlowLoss(layout))


def _conditioning(architecture: Architecture, transformer: nn.Module, latent: Tensor) -> dict[str, Tensor] | None:
    """Random embeddings of one prompt, under the family's names; ``None`` for a class-conditional transformer."""
    text = {"text_tokens": architecture.text_tokens} if architecture.text_tokens else {}
    arguments = dummy_arguments(transformer, latent, torch.Generator().manual_seed(0), **text)
    found = {name: arguments[key][0] for key, name in _FROM_TRANSFORMER.items() if key in arguments}
    return found or None


@contextmanager
def _seeded() -> Iterator[None]:
    """Context in which torch's generator has seed 0; the caller's random state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class RandomImages(ItemDataset):
    """Smooth random images ``[3, side, side]`` in [-1, 1], the same every time; one class, empty captions.

    Args:
        count: number of images.
        side: in pixels.
        conditioning: embeddings that every item gets as those of its caption.
    """

    def __init__(self, count: int, side: int, conditioning: Mapping[str, Tensor] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, max(2, side // 8), max(2, side // 8), generator=generator)
        images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
        self.images = (images * 2 - 1).clamp(-1, 1)
        self.conditioning, self.classes = conditioning, ["anything"]

    def __len__(self) -> int:
        return len(self.images)

    def id(self, index: int) -> str:
        """The image's number."""
        return str(index)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index``, the same in each epoch."""
        item = {"image": self.images[index], "label": 0, "caption": "", "id": self.id(index)}
        return item if self.conditioning is None else item | {"conditioning": dict(self.conditioning)}


class RandomLatents(ItemDataset):
    """The items of :class:`RandomImages` with latents in place of images, as from a cache.

    Args:
        images: encoded on construction.
        encode: maps ``[B, 3, H, W]`` to ``[B, C + D, h, w]``.
    """

    def __init__(self, images: RandomImages, encode: Callable[[Tensor], Tensor]) -> None:
        self.classes, self.holds_latents = images.classes, True
        self.items = []
        for index in range(len(images)):
            item = images[index]
            self.items.append({**item, "latent": encode(item.pop("image")[None])[0].contiguous().cpu()})
            del self.items[-1]["image"]

    def __len__(self) -> int:
        return len(self.items)

    def id(self, index: int) -> str:
        """The image's number."""
        return str(index)

    def item(self, index: int, epoch: int) -> Item:
        """Item ``index``, the same in each epoch."""
        return dict(self.items[index])


@dataclass(frozen=True)
class _Decoded(Decoded):
    among: Sequence[Tensor] = ()
    """Gradients are computed for all of these, as in a full backward pass."""

    def alignment_ratio(self, z_d: Tensor, alignment: Tensor, weight: Tensor, *, maximum: float) -> Tensor:
        return _ratio(self.losses["reconstruction"], alignment, weight, self.among, maximum)


class SeparatePassesObjective(StructuredObjective):
    """The same losses and gradients, with two more full backward passes for each adaptive weight."""

    def _decode(
        self,
        vae: AutoencoderDA,
        latent: Tensor,
        z_d: Tensor,
        images: Tensor,
        measure: Measure,
        gan_loss: GanLoss | None,
        step: int,
        *,
        at_details: bool,
    ) -> _Decoded:
        made = vae.decode_structured(latent, z_d)
        losses = measure(images, made)
        total, among = losses["reconstruction"], list(vae.trained_parameters())
        if gan_loss is not None:
            hinge = gan_loss.hinge(images, made, step)
            losses["gan"] = total.new_zeros(())
            if hinge is not None:
                weight: Tensor | float = gan_loss.settings.weight
                if gan_loss.settings.adaptive:
                    last = vae.last_decoder_weight
                    weight = weight * _ratio(total, hinge, last, among, MAX_ADAPTIVE_GAN)
                losses["gan"] = weight * hinge
            total = total + losses["gan"]
        return _Decoded(losses, total, None, 1.0, among)


class SeparatePassesStage(AutoencoderStage):
    """The autoencoder stage with :class:`SeparatePassesObjective`."""

    objective_class = SeparatePassesObjective


def _ratio(reference: Tensor, loss: Tensor, weight: Tensor, among: Sequence[Tensor], maximum: float) -> Tensor:
    scale = gradient_scale(weight.device)
    place = next(i for i, tensor in enumerate(among) if tensor is weight)
    first, second = (
        grad(scale * term, among, retain_graph=True, allow_unused=True)[place] for term in (reference, loss)
    )
    return gradient_ratio(first, second, maximum=maximum, scale=scale)
