"""An autoencoder beside its baselines."""

import json

import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.evaluation import psnr
from davae.evaluation.reconstruction.baselines import compare_reconstructions
from davae.models import AutoencoderDA


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_rows_are_the_autoencoder_and_every_baseline(autoencoder, images):
    report = compare_reconstructions(autoencoder, images.split(4))
    assert report.images == 6
    assert {name: row.positions for name, row in report.rows.items()} == {
        "upgraded": 1,
        "base, upscaled": 1,
        "base, native": 4,
        "image, reduced": 0,
        "details zeroed": 1,
        "details shuffled": 1,
        "details drawn": 1,
    }
    base = debug_base().vae
    with torch.no_grad():
        native = base.decode(base.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        small = F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)
        small = base.decode(base.encode(small).latent_dist.mode()).sample.clamp(-1, 1)
        upscaled = F.interpolate(small, scale_factor=2, mode="bicubic").clamp(-1, 1)
    for name, made in (("base, native", native), ("base, upscaled", upscaled)):
        pairs = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(images, made)]
        psnr = [peak_signal_noise_ratio(a, b, data_range=2) for a, b in pairs]
        ssim = [
            structural_similarity(
                a, b, data_range=2, channel_axis=2, gaussian_weights=True, use_sample_covariance=False
            )
            for a, b in pairs
        ]
        assert report.rows[name].figures["psnr"] == pytest.approx(sum(psnr) / 6, abs=1e-3)
        assert report.rows[name].figures["ssim"] == pytest.approx(sum(ssim) / 6, abs=1e-4)
    json.dumps(report.to_json())


def test_batches_do_not_show(autoencoder, images):
    one, two = (
        compare_reconstructions(autoencoder, parts, perceptual={"gap": _Gap()}) for parts in ([images], images.split(1))
    )
    assert one.rows.keys() == two.rows.keys()
    assert len(one.rows) >= 2
    for name, row in one.rows.items():
        assert row.figures == pytest.approx(two.rows[name].figures, rel=1e-4, abs=1e-5)
        assert row.crops["fine texture"] == pytest.approx(two.rows[name].crops["fine texture"], rel=1e-4, abs=1e-5)
    assert one.reference == two.reference


class _Gap:
    """A perceptual distance that needs no network."""

    def describe(self):
        return {"network": "none"}

    def __call__(self, images, made):
        return (images - made).abs().mean((1, 2, 3))


def test_crops_of_any_size_are_told_apart(autoencoder, images):
    crops = {"lettering": [images[:1, :, :16, :24], images[1:2]], "faces": [images[2:3]]}
    report = compare_reconstructions(autoencoder, [images], crops=crops, perceptual={"gap": _Gap()})
    assert report.crops == {"fine texture": 6, "lettering": 2, "faces": 1}
    assert report.perceptual == {"gap": {"network": "none"}}
    alone = compare_reconstructions(autoencoder, [images[2:3]]).rows["upgraded"].figures["psnr"]
    assert report.rows["upgraded"].crops["faces"]["psnr"] == pytest.approx(alone)
    assert report.rows["upgraded"].crops["lettering"].keys() == {"psnr", "ssim", "gap"}
    with pytest.raises(DavaeError, match="crops 'empty'"):
        compare_reconstructions(autoencoder, [images], crops={"empty": []})


def test_without_its_base_decoder_two_rows_remain(images):
    autoencoder = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    autoencoder.drop_base_decoder()
    assert list(compare_reconstructions(autoencoder, [images]).rows)[:2] == ["upgraded", "image, reduced"]


@torch.no_grad()
def test_rows_of_other_details_are_what_they_say(images):
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    mean, std = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    vae.set_detail_statistics(mean, std)
    z, z_d = vae.encode_base(images), vae.encode_details(images).mean
    noise = torch.stack([torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    details = {
        "details zeroed": torch.zeros_like(z_d),
        "details shuffled": z_d[[5, 0, 1, 2, 3, 4]],
        "details drawn": noise * std[:, None, None] + mean[:, None, None],
    }
    rows = compare_reconstructions(vae, images.split(4)).rows
    for name, other in details.items():
        expected = psnr(images, vae.decode_structured(z, other).clamp(-1, 1)).mean()
        assert rows[name].figures["psnr"] == pytest.approx(float(expected), abs=1e-4)
    assert "details shuffled" not in compare_reconstructions(vae, [images[:1]]).rows


def test_autoencoders_beside_and_a_decoder_alone(autoencoder, images):
    alone = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8, detail_dropout=1.0)
    report = compare_reconstructions(autoencoder, [images], beside={"decoder alone": alone})
    found = compare_reconstructions(alone, [images])
    assert list(found.rows) == ["upgraded", "base, upscaled", "base, native", "image, reduced"]
    assert report.rows["decoder alone"].figures == found.rows["upgraded"].figures
    assert report.rows["decoder alone"].positions == 1
    with pytest.raises(DavaeError, match="'base, native' names a row"):
        compare_reconstructions(autoencoder, [images], beside={"base, native": alone})
