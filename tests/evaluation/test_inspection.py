"""What an inspection says, against signals whose answer is known."""

import json

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from typer.testing import CliRunner

from davae.bases.tiny import debug_base
from davae.cli.main import app
from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation import psnr, radial_power_spectrum
from davae.evaluation.images import held_out_images
from davae.evaluation.latent_space.inspect import _derangement, inspect_autoencoder
from davae.evaluation.latent_space.spectra import (
    detail_groups,
    high_frequency_share,
    local_distant_similarity,
)
from davae.models import AutoencoderDA


def _wave(cycles, side=32):
    x = torch.arange(side) / side
    return torch.sin(2 * torch.pi * cycles * x).expand(2, 3, side, side).clone()


def test_high_frequency_share_of_known_signals():
    assert high_frequency_share(_wave(2)) == pytest.approx(0.0, abs=1e-12)
    assert high_frequency_share(_wave(12)) == pytest.approx(1.0)
    both = torch.cat([_wave(2), _wave(12)], dim=1)  # channels count alike, however strong
    both[:, :3] *= 100
    assert high_frequency_share(both) == pytest.approx(0.5)
    noise = torch.randn(8, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    assert high_frequency_share(noise) == pytest.approx(0.778, abs=0.01)  # 1 - pi (1/4 + 1/64)^2
    assert high_frequency_share(noise + 100) == pytest.approx(high_frequency_share(noise))


def test_local_distant_similarity_of_known_signals():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 8, 8, 8, generator=generator)
    assert local_distant_similarity(noise) == pytest.approx(0.0, abs=0.01)
    halves = torch.randn(16, 8, 1, 2, generator=generator).repeat_interleave(8, 2).repeat_interleave(4, 3)
    assert local_distant_similarity(halves) > 0.5  # the picture's left half is one colour, its right another


def test_a_derangement_leaves_nothing_in_its_place():
    for seed in range(20):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        moved = _derangement(order)
        assert sorted(moved.tolist()) == list(range(9))
        assert (moved != torch.arange(9)).all()


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)


def test_an_inspection_says_what_the_autoencoder_does(autoencoder):
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.arange(12) % 3
    found = inspect_autoencoder(autoencoder, images, labels, method="pca")
    with torch.no_grad():
        latent = autoencoder.encode(images).latent_dist.mode()
        z, _ = autoencoder.layout.split(latent)
        whole = autoencoder.decode(latent).sample.clamp(-1, 1)
        zeroed = torch.cat([z, torch.zeros(12, 8, 4, 4)], dim=1)
        without = autoencoder.decode(zeroed).sample.clamp(-1, 1)
    assert found.psnr["whole"] == pytest.approx(float(psnr(images, whole).mean()), abs=1e-4)
    assert found.psnr["zeroed"] == pytest.approx(float(psnr(images, without).mean()), abs=1e-4)
    assert {name: part.channels for name, part in found.parts.items()} == {
        "base": 4,
        "detail": 8,
        "structured": 12,
    }
    assert found.chance == pytest.approx(1 / 3)
    assert len(found.channel_mean) == 12
    assert list(found.latent_spectra) == ["z", "details 1", "details 2", "details 3", "details 4"]
    assert 0 <= found.parts["detail"].linear_probe_std <= 0.5  # of numbers between 0 and 1
    told = found.to_json()
    assert "examples" not in told
    json.dumps(told)


def test_the_band_of_a_group_is_what_its_absence_takes_away(autoencoder):
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = inspect_autoencoder(autoencoder, images, method="pca")
    with torch.no_grad():
        latent = autoencoder.encode(images).latent_dist.mode()
        lacking = latent.clone()
        lacking[:, 4 + 2 : 4 + 4] = 0  # 4 base channels; the second group of two
        band = autoencoder.decode(latent).sample.clamp(-1, 1) - autoencoder.decode(lacking).sample.clamp(-1, 1)
    _, power = radial_power_spectrum(band)
    torch.testing.assert_close(
        torch.tensor(found.image_spectra["added by details 2"][1]).double(), power, rtol=1e-3, atol=1e-9
    )
    _, power = radial_power_spectrum(latent[:, 6:8])
    torch.testing.assert_close(torch.tensor(found.latent_spectra["details 2"][1]).double(), power, rtol=1e-3, atol=1e-9)


def test_nested_levels_are_the_groups_of_a_nested_autoencoder(autoencoder):
    groups = detail_groups(AutoencoderDA.from_base(autoencoder, scale=2, detail_channels=8))
    assert groups == {"details of level 1": slice(0, 8), "details of level 2": slice(8, 16)}
    assert detail_groups(autoencoder)["details 4"] == slice(6, 8)


def test_without_labels_there_is_no_accuracy(autoencoder):
    images = torch.rand(8, 3, 32, 32)
    found = inspect_autoencoder(autoencoder, images, torch.full((8,), -1), method="pca")
    assert found.chance is None
    assert found.parts["detail"].linear_probe is None
    with pytest.raises(DavaeError, match="at least 8 images"):
        inspect_autoencoder(autoencoder, images[:4])


def test_an_autoencoder_without_its_base_decoder_can_be_inspected(autoencoder):
    base = AutoencoderKL.from_config(autoencoder.base.config)
    other = AutoencoderDA.from_base(base, scale=2, detail_channels=8)
    other.drop_base_decoder()
    found = inspect_autoencoder(other, torch.rand(8, 3, 32, 32), method="pca")
    assert "base" not in found.psnr


def test_the_verb_writes_pictures_and_json(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path / "a")
    arguments = ["inspect", str(tmp_path / "a"), "--beside", str(tmp_path / "a"), "--data", "procedural:24"]
    arguments += ["--resolution", "32", "--images", "24", "--method", "pca", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "linear probe" in done.output
    names = {p.name for p in (tmp_path / "out").iterdir()}
    pictures = {"map.png", "spectra.png", "channels.png", "details.png", "examples.png"}
    assert names == pictures | {"inspection.json"}
    found = json.loads((tmp_path / "out" / "inspection.json").read_text())
    first, second = found.values()
    assert first == second


def test_what_was_held_out_does_not_depend_on_the_resolution_of_a_measurement(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        Image.effect_noise((8 + 8 * (i % 4), 64), 50).save(photos / f"{i}.png")
    (tmp_path / "run").mkdir()
    data = {"path": str(photos), "resolution": 64, "hold_out": 3, "split": "train"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    trained = open_dataset(photos, resolution=64, hold_out=3)
    for resolution in (16, 64, 112):
        held = held_out_images(tmp_path / "run" / "autoencoder", resolution)
        ids = {held.id(i) for i in range(len(held))}
        assert len(ids) == 3
        assert not ids & {trained.id(i) for i in range(len(trained))}
        assert held[0]["image"].shape[-1] == resolution


def test_without_images_the_verb_takes_those_that_the_run_held_out(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path / "run" / "autoencoder")
    data = {"path": "procedural:30", "resolution": 32, "hold_out": 12, "split": "train"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    arguments = ["inspect", str(tmp_path / "run" / "autoencoder"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--method", "pca"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "inspection.json").read_text())["run"]
    assert found["images"] == 12
    held = open_dataset("procedural:30", resolution=32, hold_out=12, part="held_out")
    assert found["labels"] == [held[i]["label"] for i in range(12)]
    for other in ("- a list", "!secret x", "data: text", "data: {path: x}"):  # another program's
        (tmp_path / "run" / "config.yaml").write_text(other)
        with pytest.raises(DavaeError, match="is in no run"):
            held_out_images(tmp_path / "run" / "autoencoder", 32)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": data | {"hold_out": 0}}))
    done = CliRunner().invoke(app, arguments)
    assert "--data" in str(done.exception)
