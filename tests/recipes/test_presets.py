import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError

from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.planner.architectures import build, find_architecture
from davae.recipes.presets import find_preset, preset_names

#: What the authors publish, in billions.
PUBLISHED = {
    "sd35-medium": 2.24,
    "sd35-large": 8.06,
    "sd3-medium": 2.03,
    "flux1-dev": 11.9,
    "flux1-schnell": 11.9,
    "flux2-dev": 32.2,
    "sana-1.6b": 1.60,
    "sana-0.6b": 0.59,
    "pixart-sigma": 0.611,
    "pixart-sigma-2k": 0.611,
    "qwen-image": 20.4,
    "lumina2": 2.61,
    "auraflow": 6.86,
    "dit-xl-2-512": 0.750,
    "lightningdit-xl-1": 0.675,
    "sd3-reduced": 0.0341,  # made for benchmarks on a CPU
}
ENCODERS = {
    "CLIPTextModel": 0.123,
    "T5EncoderModel": 4.76,
    "Gemma2Model": 2.61,
    "Qwen2_5_VLForConditionalGeneration": 8.29,
    "Mistral3ForConditionalGeneration": 24.0,
    "UMT5EncoderModel": 1.22,
}


def test_every_preset_is_listed():
    assert set(preset_names()) == set(PUBLISHED)


@pytest.mark.parametrize("key", sorted(PUBLISHED))
def test_preset_builds_the_published_model(key):
    preset = find_preset(key)
    assert preset is not None
    count = sum(p.numel() for p in build(preset.transformer).parameters())
    assert count == preset.transformer_parameters
    assert count / 1e9 == pytest.approx(PUBLISHED[key], rel=0.01)
    assert preset.license.link.startswith("https://")
    assert preset.source
    architecture = find_architecture(preset.name)
    assert architecture.base_compression in (8, 16, 32)
    for encoder in architecture.text_encoder_sizes():
        if encoder.class_name in ENCODERS:
            assert encoder.parameters / 1e9 == pytest.approx(ENCODERS[encoder.class_name], rel=0.01)
        assert encoder.multiplied <= encoder.parameters
        assert hasattr(transformers, encoder.class_name)


@pytest.mark.parametrize("key", sorted(PUBLISHED))
def test_preset_can_be_upgraded(key):
    architecture = find_architecture(key)
    channels = architecture.base_channels
    vae = architecture.build_autoencoder(2, channels)
    assert vae.spatial_compression == 2 * architecture.base_compression
    widened = architecture.build_transformer(channels)
    base = architecture.build_transformer()
    assert widened.config.in_channels == 2 * base.config.in_channels
    assert all(p.device == torch.device("meta") for p in widened.parameters())


def test_names_on_the_hub_are_known_in_any_case():
    assert find_preset("Stabilityai/Stable-Diffusion-3.5-Medium") is find_preset("sd35-medium")
    assert find_preset("nothing") is None


def test_an_autoencoder_by_itself_on_the_hub_has_an_architecture(tmp_path, monkeypatch):
    vae = debug_base().vae
    vae.save_config(tmp_path)

    class NotOnTheHub(EntryNotFoundError, OSError):
        """As of a repository without this file."""

    def download(name, file):
        if not (tmp_path / file).is_file():
            raise NotOnTheHub(file)
        return str(tmp_path / file)

    monkeypatch.setattr("davae.planner.architectures.hf_hub_download", download)
    found = find_architecture("someone/taesd")
    assert found.base_channels == vae.config.latent_channels
    with pytest.raises(DavaeError, match="an autoencoder by itself"):
        found.require_transformer()
    (tmp_path / "config.json").unlink()
    with pytest.raises(DavaeError, match=r"config\.json could not be fetched"):
        find_architecture("someone/nothing")
