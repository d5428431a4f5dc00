"""Residual autoencoding on and off, and which layers of a deep autoencoder are which."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.models.dc_ae import (
    PlainAutoencoderDC,
    first_channels,
    head_layers,
    last_decoder_weight,
    latent_layers,
)
from tests.models.bases import DC, KL, make_base


def _dc(network=AutoencoderDC, **changes):
    torch.manual_seed(0)
    return network(**{**DC, **changes}).eval()


def _names(model, layers):
    held = {id(p) for layer in layers for p in layer.parameters()}
    return {".".join(n.split(".")[:3]) for n, p in model.named_parameters() if id(p) in held}


def test_plain_has_the_same_parameters():
    with_shortcuts, plain = _dc(), _dc(PlainAutoencoderDC)
    assert {n: p.shape for n, p in with_shortcuts.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }


@pytest.mark.parametrize("network", [AutoencoderDC, PlainAutoencoderDC])
def test_shortcuts_are_the_whole_difference(network):
    """With zero weights, what remains is space-to-channel with a mean and repetition with channel-to-space."""
    model = _dc(network)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    image, features, latent = torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4), torch.randn(1, 4, 4, 4)
    down = model.encoder.down_blocks[0][-1](image)
    up = model.decoder.up_blocks[0][0](features)
    seen = [down, up]
    if network is AutoencoderDC:
        torch.testing.assert_close(down, F.pixel_unshuffle(image, 2).unflatten(1, (16, -1)).mean(2))
        torch.testing.assert_close(up, F.pixel_shuffle(features.repeat_interleave(2, dim=1), 2))
        assert all(part.any() for part in seen)
    else:
        assert not any(part.any() for part in seen)
    model.encoder.down_blocks = model.decoder.up_blocks = nn.ModuleList()
    model.encoder.conv_in = model.decoder.norm_out = model.decoder.conv_act = model.decoder.conv_out = nn.Identity()
    ends = [model.encode(features).latent, model.decode(latent).sample]
    if network is AutoencoderDC:
        torch.testing.assert_close(ends[0], features.unflatten(1, (4, -1)).mean(2))
        torch.testing.assert_close(ends[1], latent.repeat_interleave(4, dim=1))
    else:
        assert not any(part.any() for part in ends)


def test_plain_survives_saving(tmp_path):
    model, image = _dc(PlainAutoencoderDC), torch.randn(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    again = PlainAutoencoderDC.from_pretrained(tmp_path)
    assert torch.equal(again(image).sample, model(image).sample)
    assert again.config.scaling_factor == DC["scaling_factor"]


def test_plain_is_no_base_by_accident():
    """Its weights in an AutoencoderDC would compute something else, so nothing may take it for one."""
    with pytest.raises(DavaeError, match="PlainAutoencoderDC"):
        AutoencoderDA.from_base(_dc(PlainAutoencoderDC), detail_channels=4)


def test_latent_layers_of_dc():
    model = _dc()
    assert _names(model, latent_layers(model, 1)) == {
        "encoder.down_blocks.2",
        "encoder.conv_out.weight",
        "encoder.conv_out.bias",
        "decoder.conv_in.weight",
        "decoder.conv_in.bias",
        "decoder.up_blocks.2",
    }
    two = _names(model, latent_layers(model, 2))
    assert {"encoder.down_blocks.1", "decoder.up_blocks.1"} <= two
    none = _names(model, latent_layers(model, 0))
    assert none == {
        f"{layer}.{part}" for layer in ("encoder.conv_out", "decoder.conv_in") for part in ("weight", "bias")
    }


def test_head_layers_of_dc_skip_an_empty_first_stage():
    model = _dc(encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 1))
    names = _names(model, head_layers(model, 1))
    assert names == {
        "decoder.up_blocks.1",
        "decoder.norm_out.weight",
        "decoder.norm_out.bias",
        "decoder.conv_out.conv",
    }
    assert not any("up_blocks" in n for n in _names(model, head_layers(model, 0)))


def test_layers_of_kl():
    model = AutoencoderKL(**KL)
    middle = _names(model, latent_layers(model, 1))
    assert {"encoder.down_blocks.2", "decoder.up_blocks.0", "encoder.mid_block.resnets"} <= middle
    assert not any(n.startswith(("encoder.down_blocks.1", "decoder.up_blocks.1", "decoder.conv_out")) for n in middle)
    between = _names(model, latent_layers(model, 0))
    assert between == {n for n in middle if "_blocks" not in n}
    head = _names(model, head_layers(model, 1))
    assert {n.split(".")[2] for n in head if "up_blocks" in n} == {"2"}
    assert not middle & head


@pytest.mark.parametrize("name", ["dc", "kl"])
def test_the_last_weight_makes_the_image(name):
    model = make_base(name)
    weight = last_decoder_weight(model)
    assert any(weight is p for p in model.decoder.conv_out.parameters())
    assert weight.shape[0] % 3 == 0


# ---------------------------------------------------------------- DC-AE 1.5


def _structured():
    """A DC-AE 1.5: residual blocks with RMS norm, no shortcuts at the latent."""
    blocks = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BLOCKS.items()}
    return _dc(**blocks, decoder_norm_types="rms_norm", decoder_act_fns="silu", **NO_SHORTCUTS)


BLOCKS = {"block_types": "ResBlock", "qkv_multiscales": ((), (), ())}
NO_SHORTCUTS = {"encoder_out_shortcut": False, "decoder_in_shortcut": False}


def test_the_first_channels_are_those_of_the_whole_and_zeros_are_no_channels(tmp_path):
    """The official code cuts rows of the last and columns of the first convolution; a whole decoder is given zeros."""
    model, image = _structured(), torch.randn(2, 3, 16, 16)
    cut = first_channels(model, 3)
    latent = model.encode(image).latent
    torch.testing.assert_close(cut.encode(image).latent, latent[:, :3])
    padded = torch.cat([latent[:, :3], torch.zeros_like(latent[:, 3:])], 1)
    torch.testing.assert_close(cut.decode(latent[:, :3]).sample, model.decode(padded).sample)
    assert not torch.allclose(model.decode(padded).sample, model.decode(latent).sample)
    cut.save_pretrained(tmp_path)
    again = AutoencoderDC.from_pretrained(tmp_path)
    assert again.config.latent_channels == 3
    torch.testing.assert_close(again(image).sample, cut(image).sample)


def test_all_channels_are_the_model_itself():
    model, image = _structured().to(torch.bfloat16), torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)
    cut = first_channels(model, 4)
    assert torch.equal(cut(image).sample, model(image).sample)
    assert not {p.data_ptr() for p in cut.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize(
    ("model", "count", "words"),
    [(_dc, 2, "shortcuts at the latent cannot be cut"), (_structured, 5, "4 channels has no first 5")],
)
def test_what_cannot_be_cut_is_refused(model, count, words):
    with pytest.raises(DavaeError, match=words):
        first_channels(model(), count)


def test_it_is_a_base_for_details():
    base = _structured().requires_grad_(False)
    model, image = AutoencoderDA.from_base(base, scale=2, detail_channels=8), torch.randn(1, 3, 32, 32)
    latent = model.encode(image).latent_dist.mode()
    assert torch.equal(latent[:, :4], base.encode(model.reduce(image)).latent)
    assert model.decode(latent).sample.shape == image.shape
