"""Upscalers as rows: small random ones of spandrel's and diffusers' real classes."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

from davae.bases.debug_text import clip
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.evaluation import psnr
from davae.evaluation.reconstruction.baselines import compare_reconstructions
from davae.evaluation.upscalers import SpandrelUpscaler, Upscaler, check_upscaler, open_upscaler
from davae.models import AutoencoderDA


class Nearest(Upscaler):
    """Repeats pixels, and adds noise drawn from the seed."""

    place, kind, parameters, factor, weights = "nearest", "Nearest", 0, 2, "none"

    def __init__(self, noise=0.0):
        self.noise, self.asked = noise, []

    def _enlarged(self, images, seeds, texts):
        self.asked.append((list(seeds), None if texts is None else list(texts)))
        made = F.interpolate(images, scale_factor=self.factor, mode="nearest")
        drawn = [torch.randn(made.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return made + self.noise * torch.stack(drawn)


@pytest.fixture(scope="module")
def autoencoder():
    return AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_the_row_of_an_upscaler_is_the_base_s_image_enlarged_each_from_its_own_seed(autoencoder, images):
    found = compare_reconstructions(autoencoder, images.split(4), upscalers={"noisy": Nearest(0.1)})
    assert list(found.rows)[:5] == ["upgraded", "decoder alone", "base, enlarged", "noisy", "base, native"]
    row = found.rows["noisy"]
    assert row.positions == 1
    assert row.seconds > 0
    assert row.meaning == "the base's image enlarged by Nearest (nearest)"
    assert found.to_json()["upscalers"]["noisy"]["kind"] == "Nearest"
    small = autoencoder.decode_base(autoencoder.encode_base(images)).clamp(-1, 1)
    expected = Nearest(0.1)(small, (32, 32), seeds=range(6))
    assert row.figures["psnr"] == pytest.approx(float(psnr(images, expected).mean()), abs=1e-4)


def test_it_is_applied_until_the_size_is_reached_then_reduced(images):
    small = images[..., :8, :8]
    upscaler = Nearest()
    assert torch.equal(upscaler(small, (16, 16), seeds=range(6)), F.interpolate(small, scale_factor=2, mode="nearest"))
    upscaler.asked.clear()
    made = upscaler(small, (24, 24), seeds=range(6))
    assert [seeds for seeds, _ in upscaler.asked] == [list(range(6))] * 2
    whole = F.interpolate(small, scale_factor=4, mode="nearest")
    expected = F.interpolate(whole, size=(24, 24), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(made, expected)


def test_names_are_unique_and_the_base_decoder_is_needed(autoencoder, images):
    for beside in ("base, enlarged", "decoder alone", "details drawn"):
        with pytest.raises(DavaeError, match=f"'{beside}' names a row"):
            compare_reconstructions(autoencoder, [images], upscalers={beside: Nearest()})
    with pytest.raises(DavaeError, match="'twice' names a row"):
        compare_reconstructions(autoencoder, [images], beside={"twice": autoencoder}, upscalers={"twice": Nearest()})
    bare = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    bare.drop_base_decoder()
    with pytest.raises(DavaeError, match="dropped the base's decoder"):
        compare_reconstructions(bare, [images], upscalers={"nearest": Nearest()})


def test_pickles_and_other_things_are_refused_with_advice(tmp_path):
    for name in ("RealESRGAN_x2plus.pth", "x.ckpt"):
        with pytest.raises(DavaeError, match=f"'up': .*{name} is a pickle.*once in Python.*save_file"):
            check_upscaler("up", str(tmp_path / name))
    with pytest.raises(DavaeError, match=r"there is no file .*absent\.safetensors"):
        check_upscaler("up", str(tmp_path / "absent.safetensors"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DavaeError, match=r"notes\.txt is no \.safetensors file; give a"):
        check_upscaler("up", str(tmp_path / "notes.txt"))
    debug_base().save_pretrained(tmp_path / "pipe")
    with pytest.raises(DavaeError, match=r"holds a ClassConditionalPipeline; give a .*StableDiffusionUpscalePipeline"):
        check_upscaler("up", str(tmp_path / "pipe"))


def _unet(in_channels, out_channels, width, **options):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        **options,
    )


def _vae(levels, **options):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(block_out_channels=(8,) * levels, norm_num_groups=4, latent_channels=4, **blocks, **options)


def _x4():
    text = clip(projection=False)
    width = text["text_encoder"].config.hidden_size
    return StableDiffusionUpscalePipeline(
        vae=_vae(3, scaling_factor=0.08333),
        unet=_unet(7, 4, width, num_class_embeds=100),
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(),
        max_noise_level=90,
        **text,
    )


def _x2():
    text = clip(projection=False)
    width = text["text_encoder"].config.hidden_size
    unet = _unet(8, 5, width, time_cond_proj_dim=128 + width, time_embedding_type="fourier")
    return StableDiffusionLatentUpscalePipeline(vae=_vae(2), unet=unet, scheduler=EulerDiscreteScheduler(), **text)


@pytest.mark.parametrize("make", [_x4, _x2])
def test_pipelines_of_diffusers_enlarge_each_image_from_its_seed(make, images, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "up")
    upscaler = open_upscaler("up", str(tmp_path / "up"))
    assert upscaler.factor == {"_x4": 4, "_x2": 2}[make.__name__]
    call = type(upscaler._pipe).__call__
    asked = []

    def quick(self, **options):
        asked.append(options)
        return call(self, num_inference_steps=2, **options)

    monkeypatch.setattr(type(upscaler._pipe), "__call__", quick)
    small = images[:2, :, :16, :16]
    made = upscaler(small, (32, 32), seeds=[3, 4])
    assert made.shape == (2, 3, 32, 32)
    assert made.std() > 0
    torch.testing.assert_close(upscaler(small[1:], (32, 32), seeds=[4]), made[1:], atol=2e-3, rtol=0)
    assert (upscaler(small[1:], (32, 32), seeds=[5]) - made[1:]).abs().max() > 0.01
    assert asked[0]["guidance_scale"] == 1.0  # no texts: no guidance
    upscaler(small, (32, 32), seeds=[3, 4], texts=["a fox", "a boat"])
    assert asked[-1]["prompt"] == ["a fox", "a boat"]
    assert "guidance_scale" not in asked[-1]
    again = open_upscaler("up", str(tmp_path / "up"))
    assert again.weights == upscaler.weights
    other = make()
    other.save_pretrained(tmp_path / "other")
    assert open_upscaler("up", str(tmp_path / "other")).weights != upscaler.weights


def _spandrel(architecture):
    try:
        return importlib.import_module(f"spandrel.architectures.{architecture}")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"spandrel is not installed: {error}; pip install 'davae[upscalers]'")


def test_a_model_of_spandrel_is_what_its_architecture_computes(images, tmp_path):
    model = _spandrel("ESRGAN").ESRGAN(scale=2, num_filters=8, num_blocks=1).eval()
    file = tmp_path / "esrgan.safetensors"
    save_file(model.state_dict(), file)
    upscaler = open_upscaler("esrgan", str(file))
    assert upscaler.factor == 2
    assert upscaler.title == f"ESRGAN ({file})"
    small = images[:2, :, :15, :16]
    with torch.no_grad():
        expected = model(small / 2 + 0.5).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(upscaler(small, (30, 32), seeds=[0, 1]), expected, atol=1e-5, rtol=0)


def test_what_spandrel_does_not_know_or_does_not_enlarge_is_told(tmp_path):
    compact = _spandrel("Compact").Compact(num_feat=8, num_conv=1, upscale=1)
    save_file(compact.state_dict(), tmp_path / "denoiser.safetensors")
    with pytest.raises(DavaeError, match="Compact that does not enlarge colour images: give a"):
        SpandrelUpscaler(tmp_path / "denoiser.safetensors", "cpu")
    save_file({"a.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DavaeError, match=r"is no upscaler that spandrel .* knows"):
        SpandrelUpscaler(tmp_path / "other.safetensors", "cpu")
    save_file({"a.weight": torch.full((3,), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(DavaeError, match="not finite"):
        SpandrelUpscaler(tmp_path / "nan.safetensors", "cpu")


def test_without_spandrel_the_extra_is_named(tmp_path, monkeypatch):
    save_file({"a.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(DavaeError, match=r"pip install 'davae\[upscalers\]'"):
        open_upscaler("up", str(tmp_path / "a.safetensors"))
