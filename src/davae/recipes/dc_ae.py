"""The typed settings of a DC-AE training: one network and data set, three phases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from davae.choices import Crop
from davae.recipes.data import ImageSettings
from davae.recipes.loop import (
    MAY_CHANGE,
    MAY_MOVE,
    LoopSettings,
    NotNegative,
    OptimizerSettings,
    Positive,
    Section,
    Share,
    TrainedSection,
)
from davae.recipes.settings import PrefixSettings, ReconstructionSettings


class DcArchitecture(Section):
    """An ``AutoencoderDC``; compression is ``2 ** (len(block_out_channels) - 1)``."""

    family: Literal["dc"] = "dc"
    """Which autoencoder."""
    block_out_channels: list[Positive]
    """Channels by stage from the image to the latent, for encoder and decoder."""
    latent_channels: Positive
    """``C``; with shortcuts at the latent, a divisor of the last of ``block_out_channels``."""
    encoder_layers: list[NotNegative]
    """Blocks per stage; 0 in the first leaves its resolution out, as in the published models."""
    decoder_layers: list[NotNegative]
    """Blocks per stage, from the image to the latent like ``block_out_channels``."""
    residual_stages: Positive = 3
    """First stages, of plain residual blocks. The others have EfficientViT blocks (RMS norm, SiLU)."""
    batch_norm: bool = True
    """The decoder's residual blocks have batch norm and ReLU, and ReLU comes before the output (DC-AE); off: RMS norm
    and SiLU throughout (DC-AE 1.5)."""
    attention_head_dim: Positive = 32
    """Channels of a head of the linear attention."""
    residual_autoencoding: bool = True
    """The shortcuts without parameters; off for the comparison."""
    latent_shortcuts: bool = True
    """Those on both sides of the latent; off in DC-AE 1.5, whose latent can then be cut to its first channels."""

    @model_validator(mode="after")
    def _fits(self) -> DcArchitecture:
        count = len(self.block_out_channels)
        for name in ("encoder_layers", "decoder_layers"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {count} block_out_channels")
        if self.latent_shortcuts and self.block_out_channels[-1] % self.latent_channels:
            raise ValueError(
                f"latent_channels {self.latent_channels} must divide the last of block_out_channels "
                f"({self.block_out_channels[-1]}): the shortcut at the latent averages whole groups; take another "
                "number, or set latent_shortcuts to false"
            )
        return self


class KlArchitecture(Section):
    """A deep ``AutoencoderKL``, the baseline; compression is ``2 ** (len(block_out_channels) - 1)``."""

    family: Literal["kl"]
    """Which autoencoder."""
    block_out_channels: list[Positive]
    """Channels by stage from the image to the latent, for encoder and decoder."""
    latent_channels: Positive
    """``C``."""
    layers_per_block: Positive = 2
    """Residual blocks per stage."""
    norm_num_groups: Positive = 32
    """Groups of each group norm; divides every entry of ``block_out_channels``."""


class DcAeDataSettings(ImageSettings):
    """Where the images come from. Resolution and crops are the phases' own."""

    crop: Crop = "random"
    flip: bool = True
    in_memory: bool = False
    """Decode each image once and keep it; crops and flips are then drawn once too, windows every time."""


class Phase(TrainedSection):
    """One phase: its images, its losses, its loop."""

    resolution: Positive
    """Side of the square training image in pixels."""
    path: Annotated[str | None, MAY_MOVE] = None
    """Other images than ``data.path``, for a phase that needs larger ones."""
    windows_from: Positive | None = None
    """Also cut windows of ``resolution`` from images read at this side."""
    windows: Share = 0.5
    """Share of the training images that are such windows."""
    prefixes: PrefixSettings = PrefixSettings()
    """Latents with a prefix are decoded from it beside zeros; the loss is that of the whole image."""
    reconstruction: ReconstructionSettings = ReconstructionSettings()
    optimizer: OptimizerSettings
    loop: LoopSettings

    @model_validator(mode="after")
    def _windows_fit(self) -> Phase:
        if self.windows_from is not None and self.windows_from < self.resolution:
            raise ValueError(f"windows_from {self.windows_from} is below the resolution {self.resolution}")
        return self


class LatentPhase(Phase):
    """Phase 2: only the layers around the latent."""

    stages: NotNegative = 1
    """Stages on each side of the latent that learn with the projections to and from it; 0 for these alone."""


class HeadPhase(Phase):
    """Phase 3: only the decoder's head."""

    stages: NotNegative = 1
    """Stages before the output convolution that learn with it."""


class MeasureSettings(Section):
    """What each phase is measured on, before and after."""

    resolutions: list[Positive]
    """Sides in pixels; held-out images are read at each of them."""
    path: str | None = None
    """Other images than ``data.path``; the same share of them is held out."""
    prefixes: list[Positive] = Field(default=[])
    """Also measure PSNR from the first so many channels, the others zero."""
    scaling_images: Annotated[Positive, MAY_CHANGE] = 1024
    """Most training images used to measure ``scaling_factor``."""


class DcAeRecipe(Section):
    """A deep compression autoencoder from nothing, with decoupled high-resolution adaptation."""

    kind: Literal["dc-ae"]
    """Which sections the file has."""
    description: Annotated[str, MAY_CHANGE]
    """One line for people."""
    data: DcAeDataSettings = DcAeDataSettings()
    architecture: Annotated[DcArchitecture | KlArchitecture, Field(discriminator="family")]
    phase1: Phase
    """Low resolution, everything, reconstruction only."""
    phase2: LatentPhase | None = None
    """High resolution, the layers around the latent, reconstruction only."""
    phase3: HeadPhase | None = None
    """Low resolution, the decoder's head, with the GAN."""
    measure: MeasureSettings

    @property
    def compression(self) -> int:
        """Pixels per latent position and side."""
        return 2 ** (len(self.architecture.block_out_channels) - 1)

    def _sides(self) -> Iterator[tuple[str, int]]:
        for number, phase in enumerate((self.phase1, self.phase2, self.phase3), start=1):
            if phase is not None:
                yield f"phase{number}.resolution", phase.resolution
        for side in self.measure.resolutions:
            yield "measure.resolutions", side

    @model_validator(mode="after")
    def _compression_divides(self) -> DcAeRecipe:
        f = self.compression
        for where, side in self._sides():
            if side % f:
                below, above = side // f * f, (side // f + 1) * f
                near = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"{where} is {side} pixels, which the compression {f} does not divide; take {near}")
        return self

    @model_validator(mode="after")
    def _prefixes_are_shorter(self) -> DcAeRecipe:
        channels = self.architecture.latent_channels
        phases = {f"phase{n}": phase for n, phase in enumerate((self.phase1, self.phase2, self.phase3), start=1)}
        named = {f"{name}.prefixes.channels": phase.prefixes.channels for name, phase in phases.items() if phase}
        for where, counts in {**named, "measure.prefixes": self.measure.prefixes}.items():
            if counts and max(counts) >= channels:
                raise ValueError(f"{where} has {max(counts)}; a prefix of {channels} channels has 1 to {channels - 1}")
        return self

    @model_validator(mode="after")
    def _gan_comes_last(self) -> DcAeRecipe:
        for name in ("phase1", "phase2"):
            phase = getattr(self, name)
            if phase is not None and phase.reconstruction.gan.weight:
                raise ValueError(
                    f"{name}.reconstruction.gan.weight is {phase.reconstruction.gan.weight}: the GAN belongs to "
                    "phase 3, where it needs neither high resolution nor the latent; set it to 0 here"
                )
        return self
