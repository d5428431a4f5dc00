"""Pipelines that davae upgrades without knowing how to train them, as far as they do something in their own way."""

from davae.pipelines.families.family import UpgradeOnlyFamily, register_family


class Flux2(UpgradeOnlyFamily):
    """FLUX.2 and its distilled forms."""

    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline")
    shift_rule = "has its own rule for the shift, which reads the number of tokens and of steps alone"


class FluxKontext(UpgradeOnlyFamily):
    """FLUX.1 Kontext, which changes an image as a text says."""

    pipelines = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
    edits_images = True


class HiDream(UpgradeOnlyFamily):
    """HiDream-I1."""

    pipelines = ("HiDreamImagePipeline",)
    shift_rule = "takes the shift from its transformer's largest number of tokens"


class Ideogram4(UpgradeOnlyFamily):
    """Ideogram 4."""

    pipelines = ("Ideogram4Pipeline",)
    shift_rule = "has its own rule for the shift, which reads the height and width in pixels"
    shift_reads_pixels = True


class QwenImageLayered(UpgradeOnlyFamily):
    """Qwen-Image-Layered: one image in several layers."""

    pipelines = ("QwenImageLayeredPipeline",)
    shift_rule = "has its own rule for the shift"


class Lumina(UpgradeOnlyFamily):
    """The first Lumina, Lumina-Next."""

    pipelines = ("LuminaPipeline",)
    sizes = "fixed"


class ListedSizes(UpgradeOnlyFamily):
    """Further pipelines of the kinds of PixArt and SANA."""

    pipelines = (
        "PixArtAlphaPipeline",
        "PixArtSigmaPAGPipeline",
        "SanaControlNetPipeline",
        "SanaPAGPipeline",
        "SanaSprintPipeline",
        "SanaSprintImg2ImgPipeline",
    )
    sizes = "listed"


for _family in (Flux2, FluxKontext, HiDream, Ideogram4, QwenImageLayered, Lumina, ListedSizes):
    register_family(_family())
