"""An autoencoder beside its baselines."""

import json

import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.evaluation import psnr
from davae.evaluation.metrics.names import OF_BASE
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
        "decoder alone": 1,
        "base, enlarged": 1,
        "base, native": 4,
        "image, reduced": 0,
        "details shuffled": 1,
        "details drawn": 1,
    }
    base = debug_base().vae
    with torch.no_grad():
        native = base.decode(base.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        small = F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)
        small = base.decode(base.encode(small).latent_dist.mode()).sample.clamp(-1, 1)
        upscaled = F.interpolate(small, scale_factor=2, mode="bicubic").clamp(-1, 1)
    for name, made in (("base, native", native), ("base, enlarged", upscaled)):
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
    timed = {name for name, row in report.rows.items() if row.seconds}
    assert timed == {"upgraded", "decoder alone", "base, enlarged", "base, native"}
    assert {name for name, row in report.figures().items() if "seconds to decode an image" in row} == timed
    assert list(report.meanings()) == list(report.rows)


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


def test_rows_that_training_leaves_as_they_are_can_be_left_out(autoencoder, images):
    whole = compare_reconstructions(autoencoder, [images], crops={"square": [images[:1]]}).rows
    own = compare_reconstructions(autoencoder, [images], crops={"square": [images[:1]]}, of_base=False).rows
    assert [*own] == [name for name in whole if name not in OF_BASE]
    assert {name: row.figures for name, row in own.items()} == {name: whole[name].figures for name in own}


def test_without_its_base_decoder_no_row_of_the_base_remains(images):
    autoencoder = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    autoencoder.drop_base_decoder()
    rows = list(compare_reconstructions(autoencoder, [images]).rows)
    assert rows[:3] == ["upgraded", "decoder alone", "image, reduced"]


@torch.no_grad()
def test_rows_of_other_details_are_what_they_say(images):
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    mean, std = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    vae.set_detail_statistics(mean, std)
    z, z_d = vae.encode_base(images), vae.encode_details(images).mean
    noise = torch.stack([torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    details = {
        "decoder alone": torch.zeros_like(z_d),
        "details shuffled": z_d[[5, 0, 1, 2, 3, 4]],
        "details drawn": noise * std[:, None, None] + mean[:, None, None],
    }
    rows = compare_reconstructions(vae, images.split(4)).rows
    for name, other in details.items():
        expected = psnr(images, vae.decode_structured(z, other).clamp(-1, 1)).mean()
        assert rows[name].figures["psnr"] == pytest.approx(float(expected), abs=1e-4)
    assert "details shuffled" not in compare_reconstructions(vae, [images[:1]]).rows


def test_the_decoder_alone_and_one_that_was_trained_so_are_told_apart(autoencoder, images):
    other = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=4)
    trained = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8, detail_dropout=1.0)
    report = compare_reconstructions(autoencoder, [images], beside={"other": other, "trained alone": trained})
    names = ["upgraded", "decoder alone", "other", "other, decoder alone", "trained alone", "base, enlarged"]
    assert list(report.rows)[:6] == names
    for name, model in (("other", other), ("trained alone", trained)):
        found = compare_reconstructions(model, [images])
        assert report.rows[name].figures == found.rows["upgraded"].figures
        assert report.rows[name].positions == 1
    assert list(found.rows) == ["upgraded", "base, enlarged", "base, native", "image, reduced"]
    alone = compare_reconstructions(other, [images]).rows["decoder alone"].figures
    assert report.rows["other, decoder alone"].figures == alone
    latent = compare_reconstructions(other.without_details(), [images]).rows["upgraded"].figures
    assert alone["psnr"] == pytest.approx(latent["psnr"], abs=1e-3)
    meanings = [report.rows[name].meaning for name in names]
    assert len(set(meanings)) == len(meanings)
    assert meanings[4] == "another autoencoder, a joint decoder trained without details"
    for name in ("base, native", "decoder alone", "other, decoder alone"):
        with pytest.raises(DavaeError, match=f"'{name}' names a row"):
            compare_reconstructions(autoencoder, [images], beside={"other": other, name: trained})
