"""The typed settings of a training: what a recipe file may say, with defaults and limits.

Each class is one section of a recipe. Field comments give units and the source of a default;
`davae.training.recipe` reads files into these classes and turns mistakes into one clear line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Section):
    """Where images come from and how they become tensors."""

    path: str = "procedural"
    """A folder, a data set name or file, WebDataset shards, or ``procedural`` (see docs/data.md)."""
    resolution: Positive = 128
    """Side of the square training image in pixels, at full resolution."""
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    split: str = "train"
    revision: str | None = None
    """A name on the hub: the branch, tag or commit to take; none takes the newest. The run's environment.json says
    which commit it was, to be pinned here."""
    hold_out: Annotated[float, Field(ge=0)] = 0.05
    """Share of the images (below 1) or their number (1 and more) kept for validation."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes; 0 decodes in the training process."""
    timeout_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds to wait for a batch before the run stops and names the files being read; 0 waits for ever."""
    buckets: bool | list[tuple[Positive, Positive]] = False
    """Aspect-ratio buckets for the training images: ``true`` for sizes of about ``resolution ** 2`` pixels, or
    a list of [width, height]. Held-out images stay square."""
    cache_latents: bool = False
    """Encode the images once and keep the latents in memory: all of them in the diffusion stage, the base's in the
    autoencoder stage; with ``flip`` those of the mirrored images too. The training of a base from nothing keeps its
    images besides, at 3 bytes a pixel."""
    cache: str | None = None
    """Diffusion stage, or a base recipe with ``start_from``: folder that ``davae cache`` wrote; latents and embeddings
    are read from it."""
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Storage type of a cache; with float32 training gives the same losses as from images."""

    @model_validator(mode="after")
    def _can_be_kept(self) -> DataSettings:
        if self.crop == "random" and self.cache_latents:
            raise ValueError(
                "data.crop=random cuts another part out of an image each time, so data.cache_latents=true cannot "
                "keep its latent; set data.crop=center or data.cache_latents=false"
            )
        return self


def _yaml_no(value: object) -> object:
    """YAML 1.1 reads a bare ``no`` as false; people mean the word."""
    return "no" if value is False else value


class LoopSettings(Section):
    """How long and how the loop runs; the same for every stage."""

    @model_validator(mode="before")
    @classmethod
    def _without_plain(cls, values: Any) -> Any:
        """Earlier versions had ``plain``; False says what all do now."""
        if not isinstance(values, dict) or "plain" not in values:
            return values
        if values["plain"] is not False:
            raise ValueError(
                "'plain' is gone: steps have one form. Remove it; `davae bench training` times the plain form of a step"
            )
        return {key: value for key, value in values.items() if key != "plain"}

    steps: Positive
    batch_size: Positive
    """Images a process and a micro-step."""
    gradient_accumulation: Positive = 1
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients are scaled down to this norm."""
    skip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """A step whose gradient norm exceeds this is skipped, like one that is not finite."""
    max_skipped_steps: Positive = 10
    """Skipped steps in a row after which the run stops and saves what is needed to find the cause."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_yaml_no)] = "no"
    channels_last: bool = True
    """Convolutions in channels-last memory order: the same numbers, faster on most devices."""
    compile: bool = False
    """``torch.compile`` of what is repeated: the blocks of a transformer, encoders and decoders."""
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: Positive = 10
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0 validates at the end only."""
    validation_images: Positive = 16
    checkpoint_every: Positive = 100
    checkpoints_total_limit: Positive = 2
    best_metric: str | None = None
    """A validation metric; the checkpoint where it was best is kept besides the newest ones."""
    best_mode: Literal["min", "max"] = "min"
    report_to: list[str] = ["tensorboard"]
    """Trackers known to accelerate; metrics.jsonl is written in any case."""


class OptimizerSettings(Section):
    """AdamW and its learning-rate schedule."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """``adamw8bit`` keeps the moments in 8 bits, a quarter of the memory; it needs bitsandbytes, and no FSDP."""
    learning_rate: Annotated[float, Field(gt=0)]
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Weight = 0.0
    eps: Annotated[float, Field(gt=0)] = 1e-8
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_end: Weight = 0.0
    """Learning rate at the last step of the cosine schedule."""


class AlignmentSettings(Section):
    """Detail alignment, Eq. 3 and 4."""

    form: Literal["mean", "relational", "projection"] = "mean"
    weight: Weight = 0.5
    adaptive: bool = False
    """Multiply the weight by the gradient ratio |grad rec| / |grad alignment| at the last shared layer."""
    target: Literal["base", "prefix"] = "base"
    """With several levels: tie each level's details to the base latent, or to all channels below the level."""


class GanSettings(Section):
    """PatchGAN discriminator; off while ``weight`` is 0."""

    weight: Weight = 0.0
    start_step: Annotated[int, Field(ge=0)] = 0
    adaptive: bool = True
    filters: Positive = 64
    layers: Positive = 3
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)


class ReconstructionSettings(Section):
    """The terms that compare a reconstruction with its image."""

    l1_weight: Weight = 1.0
    mse_weight: Weight = 0.0
    laplacian_weight: Weight = 0.0
    """L1 on a Laplacian pyramid: weight-free, keeps fine structure from blurring."""
    lpips_weight: Weight = 0.0
    """LPIPS (VGG); needs the ``lpips`` extra and its backbone file."""
    lpips_backbone: str | None = None
    """File of the VGG-16 weights (torchvision layout, safetensors or .pth)."""
    dino_weight: Weight = 0.0
    """Distance through the layers of a DINO network; 250 to 1000 beside an L1 of weight 1 is usual."""
    dino_backbone: str | None = None
    """Folder of the network (transformers layout: ``config.json``, ``model.safetensors``)."""
    kl_weight: Weight = 1e-6
    kl_reduction: Literal["mean", "sum"] = "mean"
    gan: GanSettings = GanSettings()


class AutoencoderModelSettings(Section):
    """Options of ``AutoencoderDA.from_base``."""

    scale: Literal[2, 4, 8] = 2
    detail_channels: Positive | Annotated[list[Positive], Field(min_length=1)]
    """A list means nested levels, each of a factor 2: the channels that each one adds."""
    start_from: str | None = None
    """Folder of a trained autoencoder whose levels are the first ones here."""
    antialias: bool = True
    clamp_base_image: bool = False
    base_latent_space: Literal["scaled", "raw"] = "scaled"
    detail_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    warm_blocks: bool = True

    @model_validator(mode="after")
    def _a_factor_of_two_a_level(self) -> AutoencoderModelSettings:
        nested = self.detail_channels if isinstance(self.detail_channels, list) else []
        if nested and self.scale != 2 ** len(nested):
            raise ValueError(
                f"{len(nested)} levels of detail_channels make a scale of {2 ** len(nested)}, not {self.scale}"
            )
        return self


class AutoencoderSettings(Section):
    """The autoencoder stage: detail encoder and joint decoder."""

    model: AutoencoderModelSettings
    alignment: AlignmentSettings = AlignmentSettings()
    reconstruction: ReconstructionSettings = ReconstructionSettings()
    levels: Literal["sequential", "together"] = "sequential"
    """Several levels: one training after another, each with the lower levels frozen, or one training for all."""
    optimizer: OptimizerSettings
    loop: LoopSettings
    """With sequential levels, of each level's training."""
    statistics_images: Positive = 10_000
    """Most images used to measure the detail channels' mean and standard deviation."""


class LoraSettings(Section):
    """Low-rank adapters on the transformer's own layers (peft)."""

    rank: Positive = 16
    alpha: Positive = 16
    targets: list[str] | None = None
    """Module name suffixes; none takes the usual ones of the transformer's family."""


class SigmaTableSettings(Section):
    """``sigma = table[int(steps u)]``: a scheduler made with one shift and set to another, times truncated."""

    config_shift: Annotated[float, Field(gt=0)] = 3.0
    train_shift: Annotated[float, Field(gt=0)] = 4.0
    steps: Positive = 1000


class TimestepSettings(Section):
    """How noise levels are drawn: ``sigma`` is the share of noise, 1 is pure noise."""

    scheme: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] | None = None
    """``sigma <- shift sigma / (1 + (shift - 1) sigma)``; above 1 favours noise. None takes the shift that the
    pipeline samples with at the training's token count (1 for the class-conditional pipeline)."""
    table: SigmaTableSettings | None = None
    """Take noise levels from a table instead of shifting them: the official SD3 training."""

    @model_validator(mode="after")
    def _one_shift(self) -> TimestepSettings:
        if self.table is not None and self.shift is not None:
            raise ValueError("shift and table exclude each other: the table holds its own shifts")
        return self


class FlowLossSettings(Section):
    """The diffusion loss, Eq. 12 and 13, and the official code's variants."""

    form: Literal["velocity", "x0"] = "velocity"
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    cosine_weight: Weight = 0.0
    """Weight of ``1 - cos(prediction, target)`` over channels, not scheduled (LightningDiT)."""
    variance_weight: Weight = 1.0
    """Weight of the variational bound of variances that a transformer predicts beside the noise (DiT, PixArt), in
    bits; 0 leaves them as they are. Others have no such term."""
    detail_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """``N`` of Eq. 12: steps over which the detail channels' loss fades in."""
    detail_schedule: Literal["cosine", "linear", "constant"] = "cosine"


class TuneSettings(Section):
    """Which weights of the transformer learn."""

    mode: Literal["full", "lora", "new_channels"] = "full"
    lora: LoraSettings = LoraSettings()
    new_channels_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the widened input and output layers; none takes the optimizer's."""
    new_channels_start: Literal["zero", "random"] = "zero"
    """Weights of the new channels at step 0. ``random`` is for ablations: with the spread of the base's own weights,
    so that step 0 is no longer the pretrained model."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights that do not learn; those that do stay in float32. ``bfloat16`` halves the memory
    of the transformer, needs ``loop.precision=bf16``, and the result is saved in it."""
    add_qk_norm: bool = False
    """LightningDiT without QK-norm: put it in, as the official ImageNet training does. Attention changes at once,
    so the start is no longer an exact copy of the base."""


class PromptSettings(Section):
    """Text-conditional models: how captions become what the transformer sees."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of samples trained with the empty prompt, for classifier-free guidance."""
    max_length: Positive | None = None
    """Tokens a prompt is cut or padded to; none takes the pipeline's default (SD3 256, FLUX 512, ...)."""
    guidance: float = 3.5
    """What a guidance-distilled transformer (FLUX.1-dev) is told in training."""
    validation: list[str] = []
    """Prompts of the validation images; empty takes captions of held-out images."""


class SampleSettings(Section):
    """Sampling for validation pictures and the report."""

    num_inference_steps: Positive = 25
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)


class DiffusionSettings(Section):
    """The diffusion stage: the warm-started transformer."""

    tune: TuneSettings = TuneSettings()
    prompts: PromptSettings = PromptSettings()
    timesteps: TimestepSettings = TimestepSettings()
    loss: FlowLossSettings = FlowLossSettings()
    optimizer: OptimizerSettings
    loop: LoopSettings
    sample: SampleSettings = SampleSettings()

    @model_validator(mode="after")
    def _frozen_weights_fit(self) -> DiffusionSettings:
        if self.tune.frozen_dtype == "bfloat16":
            if self.tune.mode == "full":
                raise ValueError("tune.frozen_dtype=bfloat16 needs frozen weights: set tune.mode=lora")
            if self.loop.precision != "bf16":
                raise ValueError("tune.frozen_dtype=bfloat16 needs loop.precision=bf16")
        return self


class UpgradeRecipe(Section):
    """A whole upgrade: the base, the data, and both stages."""

    kind: Literal["upgrade"] = "upgrade"
    description: str
    base: str = "tiny"
    """``tiny`` (embedded), ``debug`` (random weights), a pipeline folder, or a name on the hub."""
    base_revision: str | None = None
    """A name on the hub: the branch, tag or commit to take; none takes the newest. The run's environment.json says
    which commit it was, to be pinned here."""
    base_remote_code: bool = False
    """Whether Python files that lie beside the base's weights may be executed."""
    data: DataSettings = DataSettings()
    autoencoder: AutoencoderSettings
    diffusion: DiffusionSettings


class BaseAutoencoderArchitecture(Section):
    """A small ``AutoencoderKL``; compression is ``2 ** (len(block_out_channels) - 1)``."""

    block_out_channels: list[Positive]
    latent_channels: Positive
    layers_per_block: Positive = 1
    norm_num_groups: Positive = 8


class BaseAutoencoderSettings(Section):
    """First half of a base training: the autoencoder."""

    architecture: BaseAutoencoderArchitecture
    reconstruction: ReconstructionSettings = ReconstructionSettings()
    optimizer: OptimizerSettings
    loop: LoopSettings


class BaseTransformerArchitecture(Section):
    """A LightningDiT transformer."""

    hidden_size: Positive
    num_layers: Positive
    num_attention_heads: Positive
    patch_size: Positive = 1
    qk_norm: bool = True
    class_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _heads_divide(self) -> BaseTransformerArchitecture:
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 x num_attention_heads "
                f"({self.num_attention_heads}): 2-D rotary positions split a head in four"
            )
        return self


class StartFromSettings(Section):
    """A native fine-tune: a pipeline's autoencoder is kept and its transformer is the start."""

    pipeline: str
    """A class-conditional pipeline's folder, ``tiny`` or ``debug``; a bundled configuration for dry runs."""
    patch_size: Positive | None = None
    """Another patch size, a multiple of the pipeline's: twice the resolution at the same number of tokens."""
    qk_norm: bool | None = None
    """Put QK-norm in, or take it as it is."""


class BaseTransformerSettings(Section):
    """Second half of a base training: the transformer on the autoencoder's latents."""

    architecture: BaseTransformerArchitecture | None = None
    timesteps: TimestepSettings = TimestepSettings()
    loss: FlowLossSettings = FlowLossSettings()
    optimizer: OptimizerSettings
    loop: LoopSettings
    sample: SampleSettings = SampleSettings()


class BaseRecipe(Section):
    """A class-conditional base pipeline from nothing: autoencoder, then transformer."""

    kind: Literal["base"]
    description: str
    data: DataSettings = DataSettings()
    downsample: Positive = 1
    """Images are rendered or read at ``data.resolution`` and reduced by this factor, as the base of
    an upgrade sees them."""
    full_resolution_crops: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the autoencoder's training images that are crops at full resolution, not reduced ones."""
    save_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the saved weights; training is not affected."""
    start_from: StartFromSettings | None = None
    """A pipeline to fine-tune; none trains both halves from nothing."""
    autoencoder: BaseAutoencoderSettings | None = None
    transformer: BaseTransformerSettings

    @model_validator(mode="after")
    def _one_start(self) -> BaseRecipe:
        own = {"autoencoder": self.autoencoder, "transformer.architecture": self.transformer.architecture}
        given = [name for name, value in own.items() if value is not None]
        if self.start_from is not None and given:
            raise ValueError(f"with start_from, {' and '.join(given)} come from its pipeline: leave out")
        if self.start_from is None and len(given) < 2:
            absent = [name for name in own if name not in given]
            raise ValueError(f"{' and '.join(absent)} needed, or start_from")
        return self

    @model_validator(mode="after")
    def _reads_everything(self) -> BaseRecipe:
        cached = self.data.cache is not None or self.data.cache_dtype != "float32"
        if cached and (self.start_from is None or self.downsample > 1):
            raise ValueError(
                "data.cache and data.cache_dtype need start_from, whose autoencoder is there beforehand, and "
                "downsample=1. Leave them out; data.cache_latents=true keeps the latents in memory"
            )
        if self.data.buckets is not False:
            raise ValueError("data.buckets: the training of a base has one size; set data.buckets=false")
        if self.start_from is not None and self.full_resolution_crops:
            raise ValueError(
                "full_resolution_crops are for training an autoencoder; with start_from, leave out"
            )
        return self
