"""One way to encode, decode and scale with every autoencoder: what the class itself and its pipelines do."""

import pytest
import torch
from diffusers import AutoencoderKL

from davae.models import AutoencoderDA
from davae.models.latent_space import decode, encode, from_model_space, to_model_space
from tests.models.bases import KL, NAMES, make_base, raw_decode, raw_latent


def _images(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_base_encodes_and_decodes_as_its_class_does(name):
    base = make_base(name)
    latent = encode(base, _images())
    torch.testing.assert_close(latent, raw_latent(base, _images()))
    torch.testing.assert_close(decode(base, latent), raw_decode(base, latent))


@pytest.mark.parametrize("upgraded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_scaling_back_is_the_inverse(name, upgraded):
    vae = make_base(name)
    if upgraded:
        vae = AutoencoderDA.from_base(vae, scale=2, detail_channels=8).eval()
    latent = encode(vae, _images(32 * (1 + upgraded)))
    for shifted in (True, False):
        scaled = to_model_space(vae, latent, shifted=shifted)
        torch.testing.assert_close(from_model_space(vae, scaled, shifted=shifted), latent)


@pytest.mark.parametrize("name", NAMES)
def test_an_upgraded_base_part_is_scaled_as_the_base(name):
    base = make_base(name)
    vae = AutoencoderDA.from_base(base, scale=2, detail_channels=8).eval()
    latent = encode(vae, _images(64))
    expected = to_model_space(base, latent[:, :4])
    torch.testing.assert_close(to_model_space(vae, latent)[:, :4], expected)


def test_known_values():
    latent = torch.ones(1, 4, 1, 1)
    numbers = AutoencoderKL(**KL, scaling_factor=0.5, shift_factor=0.2)
    assert to_model_space(numbers, latent).flatten().tolist() == pytest.approx([0.4] * 4)
    assert to_model_space(numbers, latent, shifted=False).flatten().tolist() == pytest.approx([0.5] * 4)
    assert from_model_space(numbers, latent).flatten().tolist() == pytest.approx([2.2] * 4)
    lists = make_base("kl_lists")  # scaling 0.5; means 0.1 ... 0.4; deviations 1, 2, 0.5, 1.5
    assert to_model_space(lists, latent).flatten().tolist() == pytest.approx([0.45, 0.2, 0.7, 0.2])
    flux2 = make_base("flux2")  # normalises patches of 2 x 2 by a batch norm; here all four positions alike
    flux2.bn.running_mean.fill_(0.5)
    flux2.bn.running_var.fill_(4.0 - flux2.config.batch_norm_eps)
    assert to_model_space(flux2, latent).flatten().tolist() == pytest.approx([0.25] * 4)
    # No shift in the configuration at all (TAESD, DC-AE), and half precision, which rounds a scale no further.
    tiny = make_base("tiny")
    assert to_model_space(tiny, latent).flatten().tolist() == [1.0] * 4
    half = to_model_space(numbers, latent.bfloat16())
    assert half.dtype == torch.bfloat16
