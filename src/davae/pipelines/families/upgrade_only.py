"""Pipelines that davae can upgrade but not train, and that deviate from the defaults."""

import torch
from diffusers import DiffusionPipeline

from davae.models import AutoencoderDA
from davae.pipelines.families.family import UpgradeOnlyFamily, register_family


class Packed(UpgradeOnlyFamily):
    """Pipelines that pack latents two by two as FLUX.1 does."""

    packed = True
    pipelines = (
        *("BriaFiboEditPipeline", "BriaFiboPipeline", "BriaPipeline", "ChromaImg2ImgPipeline"),
        *("ChromaInpaintPipeline", "ChromaPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"),
        *("FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline", "FluxControlNetPipeline"),
        *("FluxControlPipeline", "FluxFillPipeline", "LongCatImageEditPipeline", "LongCatImagePipeline"),
        *("OvisImagePipeline", "QwenImageControlNetInpaintPipeline", "QwenImageControlNetPipeline"),
        *("QwenImageEditInpaintPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        "VisualClozeGenerationPipeline",
    )


class FluxKontext(UpgradeOnlyFamily):
    """FLUX.1 Kontext, which edits an image as a text instructs."""

    packed = True
    pipelines = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
    edits_images = True


class HiDream(UpgradeOnlyFamily):
    """HiDream-I1."""

    pipelines = ("HiDreamImagePipeline",)
    shift_rule = "takes the shift from its transformer's largest number of tokens"


class Ideogram4(UpgradeOnlyFamily):
    """Ideogram 4."""

    pipelines = ("Ideogram4Pipeline",)
    shift_rule = "has its own rule for the shift, which depends on the height and width in pixels"
    shift_reads_pixels = True

    def mend(self, pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
        """Arrange the batch norm's statistics as this class's tokens: all channels of a position, then the next."""
        norm, base, layout = vae.bn, vae.base_vae.bn, vae.layout
        for statistics, known, neutral in (
            (norm.running_mean, base.running_mean, 0.0),
            (norm.running_var, base.running_var, 1.0 - norm.eps),
        ):
            by_position = known.to(statistics).unflatten(0, (-1, layout.base_channels))
            details = by_position.new_full((len(by_position), layout.detail_channels), neutral)
            statistics.copy_(torch.cat([by_position, details], dim=1).flatten())


class QwenImageLayered(UpgradeOnlyFamily):
    """Qwen-Image-Layered: one image in several layers."""

    pipelines = ("QwenImageLayeredPipeline",)
    shift_rule = "has its own rule for the shift"


class Lumina(UpgradeOnlyFamily):
    """The first Lumina (Lumina-Next)."""

    pipelines = ("LuminaPipeline",)
    sizes = "fixed"


class ListedSizes(UpgradeOnlyFamily):
    """Further pipelines of PixArt and SANA, which round sizes to a list."""

    pipelines = (
        *("PixArtAlphaPipeline", "PixArtSigmaPAGPipeline", "SanaControlNetPipeline", "SanaPAGPipeline"),
        *("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
    )
    sizes = "listed"


for _family in (Packed, FluxKontext, HiDream, Ideogram4, QwenImageLayered, Lumina, ListedSizes):
    register_family(_family())
