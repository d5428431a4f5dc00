"""The typed settings of a recipe, with defaults and limits.

Each class is one section. The docstring below a field is its description, with units and the source of the default.
`davae.recipes.read` reads files into these classes and reports mistakes in one line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from davae.choices import (
    AbsentDetails,
    AlignmentForm,
    AlignmentTarget,
    BlockStart,
    FrozenDtype,
    LatentSpace,
    LevelOrder,
    LossForm,
    NewChannelsStart,
    Quantization,
    ReconstructionTarget,
    Reduction,
    SavedDtype,
    Scale,
    ScheduleShape,
    Scheme,
    TuneMode,
)
from davae.recipes.data import DataSettings
from davae.recipes.loop import (
    AT_HOME,
    MAY_CHANGE,
    MAY_MOVE,
    LoopSettings,
    NotNegative,
    OptimizerSettings,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Seed,
    Share,
    StepsOrShare,
    TrainedSection,
    Weight,
)


class AlignmentSettings(Section):
    """Detail alignment, Eq. 3 and 4."""

    form: AlignmentForm = "mean"
    """What is compared with the base latent: grouped means (the paper), similarities of positions, or a learned
    projection."""
    weight: Weight = 0.5
    """Factor of the alignment term; 0 leaves it out."""
    adaptive: bool = False
    """Multiply the weight by the gradient ratio |grad rec| / |grad alignment| at the last shared layer."""
    target: AlignmentTarget = "base"
    """With several levels: tie each level's details to the base latent, or to all channels below the level."""


class GanSettings(Section):
    """PatchGAN discriminator; off while ``weight`` is 0."""

    weight: Weight = 0.0
    """Factor of the generator's hinge loss."""
    start_step: NotNegative = 0
    """Step from which the discriminator learns and the generator sees it."""
    adaptive: bool = True
    """Multiply the weight by the gradient ratio |grad rec| / |grad gan| at the decoder's last layer."""
    filters: Positive = 64
    """Channels of the discriminator's first convolution."""
    layers: Positive = 3
    """Convolutions of stride 2."""
    learning_rate: Annotated[PositiveFloat, MAY_CHANGE] = 1e-4
    """Of the discriminator's AdamW, constant."""
    betas: Annotated[tuple[Probability, Probability], MAY_CHANGE] = (0.5, 0.9)
    """Of the discriminator's AdamW."""


class PrefixSettings(Section):
    """Channel prefixes (DC-AE 1.5): some training samples keep only their first latent channels."""

    channels: list[Positive] = Field(default=[])
    """Numbers of channels, all as likely for a sample that gets a prefix; none leaves prefixes out."""
    share: Probability = 0.5
    """Share of the samples that get a prefix; the others keep all channels."""


class ImageTerms(Section):
    """The terms that compare the image of a decoder with its target."""

    l1_weight: Weight = 1.0
    """Mean absolute error of pixels in [-1, 1]."""
    mse_weight: Weight = 0.0
    """Mean squared error of pixels in [-1, 1]."""
    laplacian_weight: Weight = 0.0
    """L1 on a Laplacian pyramid: weight-free, keeps fine structure from blurring."""
    lpips_weight: Weight = 0.0
    """LPIPS (VGG); needs the ``lpips`` extra and its backbone file."""
    dino_weight: Weight = 0.0
    """Distance through the layers of a DINO network; 250 to 1000 beside an L1 of weight 1 is usual."""
    efficientnet_weight: Weight = 0.0
    """Distance through the layers of EfficientNet-Lite0; needs the ``features`` extra and no download besides."""


class ReconstructionSettings(ImageTerms):
    """The terms that compare a reconstruction with its image, and the files of their networks."""

    lpips_backbone: Annotated[str | None, AT_HOME, MAY_MOVE] = None
    """File of the VGG-16 weights (torchvision layout, safetensors or .pth)."""
    dino_backbone: Annotated[str | None, AT_HOME, MAY_MOVE] = None
    """Folder of the network (transformers layout: ``config.json``, ``model.safetensors``)."""
    kl_weight: Weight = 1e-6
    """KL divergence of the posterior from a standard normal."""
    kl_reduction: Reduction = "mean"
    """Over a sample's elements; ``mean`` is the ImageNet code's, ``sum`` the usual form."""
    gan: GanSettings = GanSettings()


class AutoencoderModelSettings(Section):
    """Options of ``AutoencoderDA.from_base``."""

    scale: Scale = 2
    """Side of the full image over the side of the base's."""
    detail_channels: Positive | Annotated[list[Positive], Field(min_length=1)]
    """``D``, a multiple of ``scale ** 2 / 2``; ``scale ** 2 C`` can hold the base's latent of the full-size image.
    A list means nested levels, each of a factor 2: the channels that each one adds."""
    antialias: bool = True
    """Antialias the bicubic reduction to base resolution."""
    clamp_base_image: bool = False
    """Clamp the reduced image to [-1, 1]."""
    base_latent_space: LatentSpace = "scaled"
    """What alignment and joint decoder see: ``(z - shift) * scale`` as the diffusion model does, or ``z``."""
    detail_dropout: Share = 0.1
    """Share of training samples whose details are taken away in front of the decoder: what the decoder alone learns
    from. 1 trains nothing else, a baseline: details, their alignment and their KL divergence then have no part."""
    absent_details: AbsentDetails = "zero"
    """What the decoder gets in their place, there and where it is used alone: zeros, as in the paper, or the details of
    the base's image, enlarged bicubically (``enlarged``, over a base VAE), which it reads without having learned to."""
    start: BlockStart = "fitted"
    """Of the new blocks: fitted to images in closed form, from the base's layers that they replace (``warm``), or from
    torch's initial values, the official start (``random``)."""

    @model_validator(mode="before")
    @classmethod
    def _warm_blocks(cls, values: Any) -> Any:
        """Accept ``warm_blocks`` of earlier versions."""
        if not isinstance(values, dict) or "warm_blocks" not in values:
            return values
        start = {True: "warm", False: "random"}.get(values["warm_blocks"])
        if start is None or values.get("start", start) != start:
            raise ValueError("warm_blocks is now start: remove it, and keep start=fitted, warm or random")
        rest = {key: value for key, value in values.items() if key != "warm_blocks"}
        return {**rest, "start": start}

    @model_validator(mode="after")
    def _fits_the_levels(self) -> AutoencoderModelSettings:
        nested = self.detail_channels if isinstance(self.detail_channels, list) else []
        if nested and self.scale != 2 ** len(nested):
            raise ValueError(
                f"{len(nested)} levels of detail_channels make a scale of {2 ** len(nested)}, not {self.scale}"
            )
        if self.absent_details == "enlarged" and (len(nested) > 1 or self.detail_dropout == 1):
            raise ValueError(
                "absent_details=enlarged is for one level of details that are trained: leave it at zero with nested "
                "levels and with detail_dropout=1"
            )
        return self


class AutoencoderSettings(TrainedSection):
    """The autoencoder stage: detail encoder and joint decoder."""

    model: AutoencoderModelSettings
    start_from: Annotated[str | None, AT_HOME, MAY_MOVE] = None
    """A trained autoencoder to start from: its folder, or its run. Its levels must be the first ones here; if there are
    no others, they are trained further."""
    alignment: AlignmentSettings = AlignmentSettings()
    reconstruction: ReconstructionSettings = ReconstructionSettings()
    decoder_alone: ImageTerms | None = None
    """Terms for the samples whose details are taken away (``model.detail_dropout``), in place of those of
    ``reconstruction``, whose networks' files they take; none means the same for all."""
    rescale_details: bool = True
    """Divide the details that ``model.detail_dropout`` keeps by the share of samples that keep theirs, in training, as
    the official code does. ``false`` gives the decoder what it gets afterwards: for shares well above 0.1."""
    levels: LevelOrder = "sequential"
    """Several levels: one training after another, each with the lower levels frozen, or one training for all."""
    train_detail_encoder: bool = True
    """``false`` leaves the detail encoder, a copy of the base's, as it is: only the new blocks and the decoder learn
    (official SD3 training; the paper trains it)."""
    detail_noise: Weight = 0.0
    """Noise on the details in front of the decoder, in their standard deviations: each training sample draws its
    strength evenly between 0 and this. Makes decoding forgive details that a transformer gets a little wrong."""
    target: ReconstructionTarget = "image"
    """What the decoder learns to make: the image (the paper), or the frozen base VAE's reconstruction of it at full
    size (``base``, official SD3 training; one pass of it more a step, unless ``data.cache_latents`` keeps it).
    Validation compares with the image."""
    optimizer: OptimizerSettings
    loop: LoopSettings
    """With sequential levels, of each level's training."""
    statistics_images: Annotated[Positive, MAY_CHANGE] = 10_000
    """Most images used to measure the detail channels' mean and standard deviation."""
    start_images: Positive = 128
    """Images that ``model.start`` is fitted to."""

    @model_validator(mode="before")
    @classmethod
    def _start_of_the_model(cls, values: Any) -> Any:
        """Accept ``model.start_from`` of earlier versions."""
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict) or "start_from" not in model:
            return values
        start = model["start_from"]
        if start is not None and values.get("start_from") not in (None, start):
            raise ValueError("start_from and model.start_from name two autoencoders: keep start_from")
        rest = {key: value for key, value in model.items() if key != "start_from"}
        return {**values, "model": rest} | ({} if start is None else {"start_from": start})


class LoraSettings(Section):
    """Low-rank adapters on the transformer's own layers (peft)."""

    rank: Positive = 16
    """Rank of each adapter."""
    alpha: PositiveFloat = 16
    """Adapters are scaled by ``alpha / rank``."""
    targets: list[str] | None = None
    """Module name suffixes; none takes the usual ones of the transformer's family."""


class SigmaTableSettings(Section):
    """``sigma = table[int(steps u)]``: a scheduler made with one shift and set to another, times truncated."""

    config_shift: PositiveFloat = 3.0
    """Shift that the scheduler was made with."""
    train_shift: PositiveFloat = 4.0
    """Shift that it is set to."""
    steps: Positive = 1000
    """Entries of the table."""


class TimestepSettings(Section):
    """How noise levels are drawn: ``sigma`` is the share of noise, 1 is pure noise."""

    scheme: Scheme = "logit_normal"
    """Distribution of ``sigma`` before the shift; ``logit_normal`` is the sigmoid of a Gaussian."""
    logit_mean: float = 0.0
    """Mean of that Gaussian; above 0 favours noise."""
    logit_std: PositiveFloat = 1.0
    """Standard deviation of that Gaussian."""
    shift: PositiveFloat | None = None
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

    form: LossForm = "velocity"
    """Compare ``noise - data``, or the data it implies (official SD3 training). Flow models only."""
    min_snr_gamma: PositiveFloat | None = None
    """Weigh samples by ``min((1 - t) / t, gamma)``, ``t`` the share of noise; none weighs them alike."""
    cosine_weight: Weight = 0.0
    """Weight of ``1 - cos(prediction, target)`` over channels, not scheduled (LightningDiT)."""
    variance_weight: Weight = 1.0
    """Weight of the variational bound of variances that a transformer predicts beside the noise (DiT, PixArt), in
    bits; 0 leaves them as they are. Others have no such term."""
    detail_warmup_steps: Annotated[StepsOrShare, MAY_CHANGE] = 0
    """``N`` of Eq. 12: steps over which the detail channels' loss fades in; below 1 a share of ``loop.steps``."""
    detail_schedule: ScheduleShape = "cosine"
    """How it fades in; ``constant`` gives it full weight from the first step."""
    prefixes: PrefixSettings = PrefixSettings()
    """Samples with a prefix are shown it beside zeros, and the loss is that of the prefix."""
    base_distillation: Share = 0.0
    """Share of the base channels' target that is the frozen base's own prediction instead of the image's. 0 is the
    paper; 1 keeps the base's scenes, so that the same noise gives the same picture, only finer. One pass of the base
    more a step, and a copy of its weights."""


class TuneSettings(Section):
    """Which weights of the transformer learn."""

    mode: TuneMode = "full"
    """All weights, adapters with the widened layers in full, or the new channels only (base weights stay bit-equal)."""
    lora: LoraSettings = LoraSettings()
    new_channels_learning_rate: Annotated[PositiveFloat | None, MAY_CHANGE] = None
    """Learning rate of the new channels in the input and output layers, whose weights start at zero; none takes the
    optimizer's, which the base's own channels have in any case."""
    new_channels_start: NewChannelsStart = "zero"
    """Weights of the new channels at step 0. ``random`` is for ablations: with the spread of the base's own weights,
    so that step 0 is no longer the pretrained model."""
    frozen_dtype: FrozenDtype = "float32"
    """Precision of the weights that do not learn; those that do stay in float32. ``bfloat16`` halves the memory
    of the transformer, needs ``loop.precision=bf16``, and the result is saved in it."""
    quantization: Quantization = "none"
    """Storage of the frozen linear layers while training (bitsandbytes): LLM.int8 or NF4, in place of 2 bytes a weight
    1 or 0.56. The result has the base's own weights. Needs ``frozen_dtype=bfloat16``."""
    offload_blocks: Annotated[bool, MAY_CHANGE] = False
    """Keep the frozen weights of the transformer's blocks in main memory, and on the device only those of the block
    that computes: the same numbers, slower."""
    add_qk_norm: bool = False
    """LightningDiT without QK-norm: add it, as the official ImageNet training does. Attention changes at once,
    so the start is no longer an exact copy of the base."""


class PromptSettings(Section):
    """Text-conditional models: how captions become what the transformer sees."""

    dropout: Probability = 0.1
    """Share of samples trained with the empty prompt, for classifier-free guidance."""
    max_length: Positive | None = None
    """Tokens a prompt is cut or padded to; none takes the pipeline's default (SD3 256, FLUX 512, ...)."""
    guidance: Weight = 3.5
    """What a guidance-distilled transformer (FLUX.1-dev) is given in training."""
    validation: Annotated[list[str], MAY_CHANGE] = Field(default=[])
    """Prompts of the validation images; empty takes captions of held-out images."""


class SampleSettings(Section):
    """Sampling for validation pictures and the report."""

    num_inference_steps: Annotated[Positive, MAY_CHANGE] = 25
    """Steps of the sampler."""
    guidance_scale: Annotated[Weight, MAY_CHANGE] = 3.0
    """Classifier-free guidance; 1 is none."""
    guidance_interval: Annotated[tuple[Share, Share], MAY_CHANGE] = (0.0, 1.0)
    """Class-conditional pipelines: guide only while ``start <= t <= end``, where t = 0 is noise."""


class DiffusionSettings(TrainedSection):
    """The diffusion stage: the warm-started transformer."""

    start_from: Annotated[str | None, AT_HOME] = None
    """A tuned transformer to start from: the folder of its pipeline or adapters, or its run."""
    tune: TuneSettings = TuneSettings()
    prompts: PromptSettings = PromptSettings()
    timesteps: TimestepSettings = TimestepSettings()
    loss: FlowLossSettings = FlowLossSettings()
    sample_details: bool = False
    """Train on a draw from the details' posterior (official ImageNet training) instead of its mean. An image has one
    draw, which depends on ``loop.seed`` and its pixels: the same with a cache as without."""
    sampling_shift: PositiveFloat | None = None
    """Timestep shift that the result samples with. None takes that of ``timesteps.shift`` or ``timesteps.table``; if
    these are not set either, or for a model that is no flow model, the base's schedule."""
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

    @model_validator(mode="after")
    def _frozen_weights_can_be_kept_so(self) -> DiffusionSettings:
        tune, quantized = self.tune, self.tune.quantization != "none"
        if quantized and tune.offload_blocks:
            raise ValueError("tune.quantization and tune.offload_blocks exclude each other: set one of them")
        asked = f"tune.quantization={tune.quantization}" if quantized else "tune.offload_blocks=true"
        if quantized and tune.frozen_dtype != "bfloat16" and tune.mode != "full":
            raise ValueError(f"{asked} needs tune.frozen_dtype=bfloat16 and loop.precision=bf16")
        if quantized or tune.offload_blocks:
            if tune.mode == "full":
                raise ValueError(f"{asked} needs frozen weights: set tune.mode=lora")
            if self.loop.compile:
                raise ValueError(f"{asked} does not work with compiled blocks: set loop.compile=false")
        return self


class UpgradeRecipe(Section):
    """A whole upgrade: the base, the data, and both stages."""

    kind: Literal["upgrade"] = "upgrade"
    """Which sections the file has."""
    description: Annotated[str, MAY_CHANGE]
    """One line for people."""
    base: Annotated[str, MAY_MOVE] = "tiny"
    """``tiny`` (embedded), ``debug`` (random weights), a pipeline folder, or a name on the hub; for stage 1 also an
    autoencoder by itself."""
    base_revision: Annotated[str | None, MAY_MOVE] = None
    """A name on the hub: the branch, tag or commit to take; none takes the newest. The run's environment.json says
    which commit it was, to be pinned here."""
    base_variant: Annotated[str | None, MAY_MOVE] = None
    """Variant of the base's files, such as ``fp16`` in ``model.fp16.safetensors``; none takes those without a variant,
    or, if there are none, the only variant."""
    base_remote_code: Annotated[bool, MAY_CHANGE] = False
    """Whether Python files beside the base's weights may be executed."""
    data: DataSettings = DataSettings()
    autoencoder: AutoencoderSettings
    diffusion: DiffusionSettings


class BaseAutoencoderArchitecture(Section):
    """A small ``AutoencoderKL``; compression is ``2 ** (len(block_out_channels) - 1)``."""

    block_out_channels: list[Positive]
    """Channels by stage from the image to the latent."""
    latent_channels: Positive
    """``C``."""
    layers_per_block: Positive = 1
    """Residual blocks per stage."""
    norm_num_groups: Positive = 8
    """Groups of each group norm; divides every entry of ``block_out_channels``."""


class BaseAutoencoderSettings(TrainedSection):
    """First half of a base training: the autoencoder."""

    architecture: BaseAutoencoderArchitecture
    reconstruction: ReconstructionSettings = ReconstructionSettings()
    optimizer: OptimizerSettings
    loop: LoopSettings


class BaseTransformerArchitecture(Section):
    """A LightningDiT transformer."""

    hidden_size: Positive
    """Width of a token, a multiple of 4 times the heads."""
    num_layers: Positive
    """Transformer blocks."""
    num_attention_heads: Positive
    """Heads of each attention."""
    patch_size: Positive = 1
    """Side of a token in latent positions."""
    qk_norm: bool = True
    """Normalise queries and keys."""
    class_dropout: Probability = 0.1
    """Share of samples trained without their class, for classifier-free guidance."""

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

    pipeline: Annotated[str, MAY_MOVE]
    """A class-conditional pipeline's folder, ``tiny`` or ``debug``; a bundled configuration for dry runs."""
    patch_size: Positive | None = None
    """Another patch size, a multiple of the pipeline's: twice the resolution at the same number of tokens."""
    qk_norm: bool | None = None
    """``true`` adds QK-norm, which cannot be removed again; none keeps the pipeline's transformer as it is."""


class BaseTransformerSettings(TrainedSection):
    """Second half of a base training: the transformer on the autoencoder's latents."""

    architecture: BaseTransformerArchitecture | None = None
    """Left out with ``start_from``, whose pipeline has one."""
    timesteps: TimestepSettings = TimestepSettings()
    loss: FlowLossSettings = FlowLossSettings()
    optimizer: OptimizerSettings
    loop: LoopSettings
    sample: SampleSettings = SampleSettings()


class BaseRecipe(Section):
    """A class-conditional base pipeline: an autoencoder, trained or given, then a transformer on its latents."""

    kind: Literal["base"]
    """Which sections the file has."""
    description: Annotated[str, MAY_CHANGE]
    """One line for people."""
    data: DataSettings = DataSettings()
    downsample: Positive = 1
    """Images are rendered or read at ``data.resolution`` and reduced by this factor, as the base of
    an upgrade sees them."""
    full_resolution_crops: Share = 0.0
    """Share of the autoencoder's training images that are crops at full resolution, not reduced ones."""
    save_dtype: Annotated[SavedDtype, MAY_CHANGE] = "float32"
    """Precision of the saved weights; training is not affected."""
    start_from: StartFromSettings | None = None
    """A pipeline to fine-tune; none trains a transformer from nothing, and an autoencoder unless one is given."""
    pretrained_autoencoder: Annotated[str | None, AT_HOME, MAY_MOVE] = None
    """An autoencoder to keep instead of training one: its folder or its name on the hub, or those of a pipeline that
    has it. If its configuration states no scaling, scaling and shift are measured on the training images."""
    autoencoder: BaseAutoencoderSettings | None = None
    """Left out with ``start_from``, whose pipeline has one, and with ``pretrained_autoencoder``."""
    transformer: BaseTransformerSettings

    @model_validator(mode="after")
    def _one_start(self) -> BaseRecipe:
        pretrained = self.pretrained_autoencoder
        if self.autoencoder is not None and pretrained is not None:
            raise ValueError(
                "autoencoder trains one, and pretrained_autoencoder names one to keep: leave one of them out"
            )
        name = "autoencoder" if pretrained is None else "pretrained_autoencoder"
        own = {name: self.autoencoder or pretrained, "transformer.architecture": self.transformer.architecture}
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
                "data.cache and data.cache_dtype need start_from, whose pipeline encodes beforehand, and "
                "downsample=1. Leave them out; data.cache_latents=true keeps the latents in memory"
            )
        if not self.data.of_one_size:
            raise ValueError(
                "data: the training of a base has one size; set data.buckets=false, and no resolution in data.more"
            )
        if self.autoencoder is None and self.full_resolution_crops:
            raise ValueError(
                "full_resolution_crops are for training an autoencoder; without an autoencoder section, leave out"
            )
        if self.transformer.loss.base_distillation:
            raise ValueError("transformer.loss.base_distillation is for an upgrade, which has a frozen base: leave out")
        return self


class AblationRecipe(Section):
    """Variants of one upgrade recipe: the same data, steps and seeds, some settings changed."""

    kind: Literal["ablation"]
    """Which sections the file has."""
    description: Annotated[str, MAY_CHANGE]
    """One line for people."""
    recipe: str
    """The upgrade recipe that every variant starts from, by name or file."""
    overrides: tuple[str, ...] = ()
    """``section.key=value``, for every variant."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Every variant is trained once with each."""
    samples: Positive = 192
    """Images generated for the generation metrics, classes in turn."""
    features: str | None = None
    """A network for distances of features, as ``davae evaluate generation --features`` takes it."""
    autoencoder_only: bool = False
    """Train and measure stage 1 alone, whose base may then be an autoencoder by itself. All held-out images are
    reconstructed in every way of ``davae evaluate reconstruction``."""
    native: bool = False
    """Also fine-tune the base itself at full size, with patches ``scale`` times larger and so as many tokens, by the
    settings of the first variant's stage 2."""
    variants: Annotated[dict[str, list[str]], Field(min_length=1)]
    """Overrides by name of the variant. The others are compared with the first."""
