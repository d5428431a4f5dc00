"""The cost of one step of each training stage, from the real architecture on the meta device."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from davae.choices import FrozenDtype, Precision, Quantization, TuneMode
from davae.errors import DavaeError, first_line
from davae.latents import grouped_mean
from davae.models import AutoencoderDA, PatchDiscriminator
from davae.models.latent_space import native_reconstruction
from davae.pipelines.lora import is_target
from davae.pipelines.quantization import quantizable_layers, quantized_bytes
from davae.pipelines.sampling.speed import regions
from davae.planner.architectures import Architecture, block_runs, cost_by_depth
from davae.planner.memory import Cost, ShapesOnly, bytes_of, checkpointing, cost_of, drop_gradients
from davae.warm_start import channel_parameters, dummy_arguments

_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0 halves


@dataclass(frozen=True)
class Run:
    """The training settings that the cost of a stage depends on.

    Attributes:
        steps: optimizer steps.
        batch_size: images per process and micro-step.
        gradient_accumulation: micro-steps per step.
        precision: autocast, as in ``loop.precision``.
        gradient_checkpointing: activations of blocks are computed again in the backward.
        ema: a float32 average of the trained weights is kept.
        validation_images: images made or reconstructed in a validation.
        cpu: on a CPU, whose autocast keeps norms in 16 bit.
        optimizer_bytes: of the optimizer's state, per trained parameter; AdamW keeps two float32 numbers.
    """

    steps: int
    batch_size: int
    gradient_accumulation: int = 1
    precision: Precision = "bf16"
    gradient_checkpointing: bool = True
    ema: bool = True
    validation_images: int = 16
    cpu: bool = False
    optimizer_bytes: float = 8.0

    @property
    def autocast(self) -> bool:
        """Whether operators run in 16 bit."""
        return self.precision != "no"

    @property
    def images(self) -> int:
        """Images seen in the whole training."""
        return self.steps * self.batch_size * self.gradient_accumulation


@dataclass(frozen=True)
class AutoencoderRun(Run):
    """The autoencoder stage.

    Attributes:
        gan: the adversarial term is on.
        lpips: the LPIPS (VGG-16) term is on.
        detail_encoder: the detail encoder is trained.
        base_target: the base's reconstructions are the target, at the cost of another pass.
        fitted_start: the base encodes images at full size before the first step.
    """

    gan: bool = False
    lpips: bool = False
    detail_encoder: bool = True
    base_target: bool = False
    fitted_start: bool = True


@dataclass(frozen=True)
class DiffusionRun(Run):
    """The diffusion stage.

    Attributes:
        mode: which weights are trained.
        lora_rank: of the adapters.
        lora_targets: module name suffixes of the adapters.
        frozen_dtype: of the weights that are not trained.
        cached: latents come from a cache or are kept in memory, so that no image is encoded in a step.
        prompt_length: tokens a prompt is padded to, if not the pipeline's default.
        quantization: of the frozen linear layers.
        offload_blocks: frozen weights of blocks rest in main memory.
    """

    mode: TuneMode = "lora"
    lora_rank: int = 256
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    frozen_dtype: FrozenDtype = "bfloat16"
    cached: bool = True
    prompt_length: int | None = None
    quantization: Quantization = "none"
    offload_blocks: bool = False


@dataclass(frozen=True)
class StageCost:
    """Attributes: operations for one image; trained parameters; bytes by part; those of weights in main memory."""

    flops_per_image: float
    trained_parameters: int
    memory: dict[str, int] = field(default_factory=dict)
    resting: int = 0

    @property
    def memory_bytes(self) -> int:
        """All parts together."""
        return sum(self.memory.values())


def autoencoder_stage(
    architecture: Architecture, vae: AutoencoderDA, resolution: int, run: AutoencoderRun
) -> StageCost:
    """Detail encoder and joint decoder on the frozen base, weights in float32.

    Args:
        architecture: the base.
        vae: from :meth:`Architecture.build_autoencoder`; of several levels the last one learns. Used up.
        resolution: side of the training image.
        run: how it is trained.
    """
    vae.train()
    vae.train_levels(together=False, detail_encoders=run.detail_encoder)
    if run.gradient_checkpointing:
        vae.enable_gradient_checkpointing(checkpointing(run.autocast, run.cpu))
    parts: dict[str, nn.Module] = {"autoencoder": vae}
    with torch.device("meta"):
        if run.lpips:
            parts["VGG-16"] = _Slices().requires_grad_(False)
        if run.gan:
            parts["discriminator"] = PatchDiscriminator()
        images = torch.empty(run.batch_size, 3, resolution, resolution)

    def step() -> None:
        below = vae.encode_prefix(images)
        posterior = vae.encode_own_details(images)
        z_d = posterior.sample()
        made = vae.decode_structured(below, z_d)
        base = below[:, : vae.layout.base_channels]
        aligned = (grouped_mean(z_d, base.shape[1]) - vae.alignment_target(base)).square().mean()
        target = native_reconstruction(vae, images) if run.base_target else images
        loss = (made - target).float().abs().mean() + posterior.kl().mean() + aligned
        if run.lpips:
            seen, true = parts["VGG-16"](made), parts["VGG-16"](target)
            loss = loss + sum((a - b).square().mean() for a, b in zip(seen, true, strict=True))
        if run.gan:
            loss = loss - parts["discriminator"](made).mean()
        loss.backward()
        if run.gan:
            both = parts["discriminator"](torch.cat([images, made.detach()]))
            both.mean().backward()

    learning = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
    cost = _run_step(step, parts.values(), run)
    memory = {name: bytes_of([*part.parameters(), *part.buffers()]) for name, part in parts.items()}
    return _stage_cost(cost, learning, memory, run)


def diffusion_stage(
    architecture: Architecture,
    vae: AutoencoderDA,
    resolution: int,
    run: DiffusionRun,
    *,
    text_tokens: int,
    encoding_flops: float,
) -> StageCost:
    """The widened transformer on structured latents.

    Args:
        architecture: the base.
        vae: the upgraded autoencoder, for its channels and its size.
        resolution: side of the training image.
        run: how it is trained.
        text_tokens: of a prompt.
        encoding_flops: operations to encode an image and its prompt; counted without a cache.
    """
    layout = vae.layout
    side = resolution // vae.spatial_compression

    def measure(shorten: Callable[[nn.Module], nn.Module]) -> Cost:
        model = shorten(architecture.build_transformer(layout.detail_channels))
        assert isinstance(model, ModelMixin)
        select_trained(model, run)
        model.eval()  # dropping labels reads values; gradients flow all the same
        if run.gradient_checkpointing:
            model.enable_gradient_checkpointing(checkpointing(run.autocast, run.cpu))
        latent = torch.empty(run.batch_size, layout.channels, side, side, device="meta")
        arguments = dummy_arguments(model, latent, torch.Generator(), **_text(text_tokens))
        return _run_step(lambda: _square(model(**arguments).sample).backward(), [model], run)

    transformer = architecture.build_transformer(layout.detail_channels)
    cost = cost_by_depth(measure, block_runs(transformer))
    quantized = [transformer.get_submodule(name) for name in quantizable_layers(transformer)]
    learning = select_trained(transformer, run)
    saved, resting = _not_on_the_device(transformer, quantized, run)
    memory = {"transformer": bytes_of([*transformer.parameters(), *transformer.buffers()]) - saved}
    if not run.cached:
        memory["autoencoder"] = bytes_of([*vae.parameters(), *vae.buffers()])
    stage = _stage_cost(cost, learning, memory, run)
    extra = 0.0 if run.cached else encoding_flops
    return StageCost(stage.flops_per_image + extra, stage.trained_parameters, stage.memory, resting)


def _not_on_the_device(transformer: nn.Module, quantized: list[nn.Module], run: DiffusionRun) -> tuple[int, int]:
    """Bytes of frozen weights that a device is spared, and of those that rest in main memory instead.

    Args:
        transformer: as it is trained.
        quantized: its linear layers that ``run.quantization`` would replace.
        run: how it is trained.
    """
    if run.quantization != "none":
        linear = [layer for layer in quantized if isinstance(layer, nn.Linear)]
        kept = sum(quantized_bytes(layer, run.quantization) for layer in linear)
        return bytes_of(layer.weight for layer in linear) - kept, 0
    if not run.offload_blocks:
        return 0, 0
    blocks = [bytes_of(p for p in block.parameters() if not p.requires_grad) for block in regions(transformer)]
    return sum(blocks) - max(blocks), sum(blocks)


def select_trained(transformer: ModelMixin, run: DiffusionRun) -> list[nn.Parameter]:
    """Freeze, add adapters and set dtypes as the diffusion stage does; returns the trained parameters.

    Raises:
        DavaeError: a LoRA target matches no layer of this transformer.
    """
    widened = channel_parameters(transformer)
    transformer.requires_grad_(run.mode == "full")
    nn.Module.to(transformer, getattr(torch, run.frozen_dtype) if run.mode != "full" else torch.float32)
    if run.mode == "lora":
        for target, count in target_counts(transformer, run.lora_targets).items():
            if not count:
                raise DavaeError(
                    f"LoRA target '{target}' matches no layer of {type(transformer).__name__}: "
                    "name suffixes of its linear layers in tune.lora.targets"
                )
        lora = LoraConfig(r=run.lora_rank, lora_alpha=run.lora_rank, target_modules=list(run.lora_targets))
        with ShapesOnly():
            inject_adapter_in_model(lora, transformer)  # also where the class lacks add_adapter
    named = dict(transformer.named_parameters())
    for name in widened:
        found = name if name in named else name.replace(".weight", ".base_layer.weight")
        named[found].requires_grad_(True)
    learning = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.data = parameter.data.float()
    return learning


def lora_layers(transformer: nn.Module, run: DiffusionRun) -> list[nn.Linear]:
    """The layers that adapters are attached to."""
    named = [(name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return [module for name, module in named if any(is_target(name, target) for target in run.lora_targets)]


def target_counts(transformer: nn.Module, targets: Iterable[str]) -> dict[str, int]:
    """How many layers each LoRA target means."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return {target: sum(is_target(name, target) for name in names) for target in targets}


def forward_cost(transformer: ModelMixin, latent: Tensor, *, text_tokens: int, watch: bool = False) -> Cost:
    """One forward pass on the meta device; ``latent`` is ``[B, C, h, w]`` in the autoencoder's channels, or refused."""
    arguments = dummy_arguments(transformer, latent, torch.Generator(), **_text(text_tokens))

    def forward() -> None:
        try:
            with torch.no_grad():
                transformer(**arguments)
        except ValueError as error:  # such as diffusers' limit of positions
            raise DavaeError(f"{type(transformer).__name__}: {first_line(error)} Try another resolution") from error

    return cost_of(forward, given=[*transformer.parameters(), *transformer.buffers()], watch=watch)


def _text(text_tokens: int) -> dict[str, int]:
    return {"text_tokens": text_tokens} if text_tokens else {}


def _square(prediction: Tensor | list[Tensor]) -> Tensor:
    tensor = prediction if isinstance(prediction, Tensor) else torch.stack(prediction)
    return tensor.float().square().mean()


def _run_step(step: Callable[[], None], modules: Iterable[nn.Module], run: Run) -> Cost:
    given: list[Tensor] = []
    for module in modules:
        drop_gradients(module.parameters())
        given += [*module.parameters(), *module.buffers()]
    return cost_of(step, given=given, autocast=run.autocast, cpu=run.cpu)


def _stage_cost(cost: Cost, learning: list[nn.Parameter], weights: dict[str, int], run: Run) -> StageCost:
    count = sum(p.numel() for p in learning)
    memory = {
        **weights,
        "gradients": bytes_of(learning),
        "optimizer": round(run.optimizer_bytes * count),
        "activations": cost.peak_bytes,
    }
    if run.ema:
        memory["average"] = 4 * count
    return StageCost(cost.flops / run.batch_size, count, memory)


class _Slices(nn.Module):
    """VGG-16 up to its last convolution, giving the features that LPIPS compares."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        channels = 3
        for width in _VGG16:
            self.layers.append(nn.Conv2d(channels, width, 3, padding=1) if width else nn.MaxPool2d(2))
            channels = width or channels

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                features.append(x)
            x = torch.relu(layer(x)) if isinstance(layer, nn.Conv2d) else layer(x)
        return [*features, x]
