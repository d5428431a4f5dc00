"""Pipelines that davae can upgrade but not train, and that deviate from the defaults."""

from davae.pipelines.families.family import UpgradeOnlyFamily, register_family


class Packed(UpgradeOnlyFamily):
    """Pipelines that pack latents two by two as FLUX.1 does."""

    packed = True
    pipelines = (
        *("BriaFiboEditPipeline", "BriaFiboPipeline", "BriaPipeline"),
        *("FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"),
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


for _family in (Packed, FluxKontext, HiDream, QwenImageLayered, Lumina, ListedSizes):
    register_family(_family())
