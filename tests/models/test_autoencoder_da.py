from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.latents import ChannelStatistics
from davae.models import AutoencoderDA, BaseAdapter, detail_dropout_factor, register_adapter
from tests.end_to_end import children
from tests.models.bases import KL, NAMES, make_base, raw_decode, raw_latent

DETAILS = 8


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


def make(name: str = "kl", **options: object) -> AutoencoderDA:
    torch.manual_seed(7)
    return AutoencoderDA.from_base(make_base(name), **{"detail_channels": DETAILS, **options})  # type: ignore[arg-type]


def small(images: Tensor) -> Tensor:
    size = (images.shape[-2] // 2, images.shape[-1] // 2)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


# ---------------------------------------------------------------------- the base


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_base_latent_is_bit_equal_and_the_given_base_untouched(name: str, images: Tensor) -> None:
    base = make_base(name)
    before = copy.deepcopy(base.state_dict())
    model = AutoencoderDA.from_base(base, detail_channels=DETAILS)
    expected = raw_latent(base, small(images))
    assert torch.equal(model.encode_base(images), expected)
    posterior = model.encode(images).latent_dist
    for latent in (posterior.mode(), posterior.sample()):
        assert torch.equal(latent[:, model.layout.base], expected)
    assert torch.equal(model.decode_base(posterior.mode()), raw_decode(base, expected))
    assert torch.equal(model.decode_base(expected), raw_decode(base, expected))
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    assert not {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_moves_everything_but_the_base(name: str, images: Tensor) -> None:
    model = make(name, start="random").train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.1)
    z, posterior = model.encode_base(images), model.encode_details(images)
    loss = (model.decode_structured(z, posterior.sample()) - images).square().mean() + posterior.kl().mean()
    loss.backward()
    optimizer.step()
    assert not z.requires_grad
    assert all(p.grad is not None for p in model.trained_parameters()), "an unused parameter"
    trained = {id(p) for p in model.trained_parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    frozen = [key for key in before if key.startswith(("base.", "bn."))]
    assert len(frozen) >= len(model.base.state_dict()) > 0
    for key in frozen:
        assert torch.equal(model.state_dict()[key], before[key]), key


def test_the_base_stays_frozen_and_in_eval_mode() -> None:
    model = make("dc").train().requires_grad_(True)
    assert model.training
    assert model.joint_decoder.training
    assert not any(module.training for module in model.base.modules())
    assert not any(p.requires_grad for p in model.base.parameters())
    assert all(p.requires_grad for p in model.trained_parameters())
    moved = model.to(torch.float64)
    assert not any(p.requires_grad for p in moved.base.parameters())


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_model_stands_alone(name: str, images: Tensor, tmp_path: Path) -> None:
    model = make(name)
    model.set_detail_statistics(torch.linspace(-1, 1, DETAILS), torch.linspace(0.5, 2, DETAILS))
    model.save_pretrained(tmp_path)
    again = AutoencoderDA.from_pretrained(tmp_path)
    latent = model.encode(images).latent_dist.mode()
    assert torch.equal(again.encode(images).latent_dist.mode(), latent)
    assert torch.equal(again.decode(latent).sample, model.decode(latent).sample)
    assert torch.equal(again.decode_base(latent), model.decode_base(latent))
    assert not again.training
    assert not any(p.requires_grad for p in again.base.parameters())
    assert all(p.requires_grad for p in again.trained_parameters())
    for key in model.config:
        if key != "base_config" and not key.startswith("_"):
            assert _lists(again.config[key]) == _lists(model.config[key]), key


def test_a_config_makes_the_same_model_again() -> None:
    model = make()
    model.set_detail_statistics(torch.ones(DETAILS), torch.full((DETAILS,), 2.0))
    again = AutoencoderDA.from_config(model.config)
    assert again.config.detail_std == [2.0] * DETAILS
    assert again.state_dict().keys() == model.state_dict().keys()


def _lists(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@torch.no_grad()
def _load_and_compare(folder: Path) -> None:
    model = AutoencoderDA.from_pretrained(folder)
    data = torch.load(folder / "data.pt", weights_only=True)
    latent = model.encode(data["images"]).latent_dist.mode()
    assert torch.equal(latent, data["latent"]), "latent"
    assert torch.equal(model.decode(latent).sample, data["decoded"]), "decoded"


@torch.no_grad()
def test_outputs_are_bit_equal_in_a_process_that_never_saw_the_base(images: Tensor, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    latent = model.encode(images).latent_dist.mode()
    torch.save({"images": images, "latent": latent, "decoded": model.decode(latent).sample}, tmp_path / "data.pt")
    log = tmp_path / "log"
    children.finish(children.start(_load_and_compare, tmp_path, log=log), log)


# ---------------------------------------------------------------------- what pipelines see


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [2, 4])
def test_config_tells_pipelines_the_sizes(name: str, scale: int) -> None:
    model = make(name, scale=scale)
    assert model.spatial_compression == 4 * scale
    assert 2 ** (len(model.config.block_out_channels) - 1) == 4 * scale
    assert model.config.latent_channels == 4 + DETAILS
    if name == "dc":  # SANA
        assert 2 ** (len(model.config.encoder_block_out_channels) - 1) == 4 * scale
    if name.startswith("kl"):
        assert model.config.sample_size == 32 * scale
        assert model.config.scaling_factor == make_base(name).config.scaling_factor
        assert model.config.shift_factor == make_base(name).config.shift_factor


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_details_have_unit_variance_as_pipelines_normalise_them(name: str, images: Tensor) -> None:
    model = make(name)
    statistics = ChannelStatistics(DETAILS)
    statistics.update(model.encode_details(images).mean)
    model.set_detail_statistics(statistics.mean, statistics.std)
    posterior = model.encode(images).latent_dist
    latent = posterior.mode()
    config = model.config
    if "latents_mean" in config and config.latents_mean is not None:
        mean, std = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
        seen = (latent - mean) * config.scaling_factor / std
        assert torch.allclose(
            seen[:, model.layout.base], model.alignment_target(latent[:, model.layout.base]), atol=1e-5
        )
    elif name == "flux2":  # 2x2 patches through the batch norm
        patches = F.pixel_unshuffle(latent, 2)
        mean, variance = model.bn.running_mean, model.bn.running_var
        std = (variance + config.batch_norm_eps).sqrt()
        seen = F.pixel_shuffle((patches - mean[:, None, None]) / std[:, None, None], 2)
    else:
        seen = (latent - (config.shift_factor or 0)) * config.scaling_factor
        assert torch.allclose(
            seen[:, model.layout.base], model.alignment_target(latent[:, model.layout.base]), atol=1e-5
        )
    again = ChannelStatistics(model.layout.channels)
    again.update(seen)
    assert torch.allclose(again.mean[model.layout.detail], torch.zeros(DETAILS).double(), atol=1e-4)
    assert torch.allclose(again.std[model.layout.detail], torch.ones(DETAILS).double(), atol=1e-4)
    raw = model.decode_structured(latent[:, model.layout.base], model.encode_details(images).mean)
    assert torch.allclose(model.decode(latent).sample, raw, atol=1e-4)
    noise = posterior.sample() - latent  # the spread is scaled too
    expected = model.encode_details(images).std / statistics.std[:, None, None]
    assert torch.allclose(
        posterior.std[:, model.layout.detail] * (config.scaling_factor or 1), expected.float(), rtol=1e-4
    )
    assert not noise[:, model.layout.base].any()
    assert noise[:, model.layout.detail].abs().max() > 0


def test_statistics_that_cannot_be_used() -> None:
    model = make()
    with pytest.raises(DavaeError, match=r"detail_std\[2\] is 0"):
        model.set_detail_statistics(torch.zeros(DETAILS), torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1]))
    with pytest.raises(DavaeError, match="detail_std has 4 values, and there are 8 channels"):
        model.set_detail_statistics(torch.zeros(DETAILS), torch.ones(4))


@torch.no_grad()
def test_latents_under_every_name_that_pipelines_read(images: Tensor) -> None:
    model = make()
    output = model.encode(images)
    assert torch.equal(output.latent, output.latent_dist.mode())
    assert torch.equal(output.latents, output.latent_dist.mode())
    assert output.to_tuple() == (output.latent_dist,)
    frames = model.encode(images.unsqueeze(2))
    assert torch.equal(frames.latent, output.latent.unsqueeze(2))


@torch.no_grad()
def test_other_precisions_come_in(images: Tensor) -> None:
    """Computed in the model's own; latents come out in the image's where that is lower, as a pipeline mixes them."""
    model = make()
    latent = model.encode(images.half()).latent
    assert latent.dtype == torch.float16
    assert torch.equal(latent, model.encode(images.half().float()).latent.half())
    latent = model.encode(images).latent
    assert latent.dtype == torch.float32
    assert model.decode(latent.bfloat16()).sample.dtype == torch.float32
    assert model.to(torch.bfloat16).encode(images).latent.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode(latent).sample.dtype == torch.bfloat16


# ---------------------------------------------------------------------- options


@torch.no_grad()
def test_channel_order_matters_in_front_of_the_up_block_only(images: Tensor) -> None:
    first, last = make(start="random"), make(start="random", decoder_channel_order="detail_first")
    last.load_state_dict(first.state_dict())
    latent = first.encode(images).latent_dist.mode()
    assert torch.equal(last.encode(images).latent_dist.mode(), latent)
    seen = []
    last.up.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    first.up.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    assert not torch.allclose(first.decode(latent).sample, last.decode(latent).sample)
    assert torch.equal(seen[0].roll(DETAILS, dims=1), seen[1])


@torch.no_grad()
def test_downsampling_options(images: Tensor) -> None:
    plain = F.interpolate(images, size=(16, 24), mode="bicubic", antialias=False, align_corners=False)
    assert torch.equal(make(antialias=False).downsample(images), plain)
    assert torch.equal(make().downsample(images), small(images))
    extreme = images.sign()
    assert make(antialias=False).downsample(extreme).abs().max() > 1
    assert make(antialias=False, clamp_base_image=True).downsample(extreme).abs().max() <= 1


@torch.no_grad()
def test_raw_space(images: Tensor) -> None:
    model = make(base_latent_space="raw")
    z = model.encode_base(images)
    assert model.alignment_target(z) is z
    scaled = make().alignment_target(z)
    assert torch.allclose(scaled, (z - 0.1) * 0.7)


def test_detail_dropout_zeroes_whole_samples_and_keeps_the_mean() -> None:
    factor = detail_dropout_factor(torch.tensor([0.0, 0.59, 0.61, 0.99]), 0.4)
    assert torch.allclose(factor, torch.tensor([1 / 0.6, 1 / 0.6, 0, 0]))
    model = make(detail_dropout=0.5).train()
    z, z_d = torch.ones(64, model.layout.base_channels, 2, 2), torch.ones(64, DETAILS, 2, 2)
    values, absent = model.drop_details(z, z_d)
    values = values.flatten(1)
    assert (values == values[:, :1]).all()  # by sample
    assert set(values[:, 0].tolist()) == {0.0, 2.0}
    assert torch.equal(values[:, 0] == 0, absent)
    assert set(model.drop_details(z, z_d, rescale=False)[0].unique().tolist()) == {0.0, 1.0}
    kept, absent = model.eval().drop_details(z, z_d)
    assert kept is z_d
    assert not absent.any()


@torch.no_grad()
def test_absent_details_are_those_of_the_base_s_enlarged_image(images: Tensor, tmp_path: Path) -> None:
    """In dropout, in the decoder alone, and in the copy whose latent is the base's own."""
    model = make(detail_dropout=0.5, absent_details="enlarged")
    z, z_d = model.encode_base(images), model.encode_details(images).mean
    small = model.decode_base(z).clamp(-1, 1)
    enlarged = F.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False).clamp(-1, 1)
    expected = model.encode_details(enlarged).mean
    assert torch.equal(model.absent_details(z), expected)
    assert not torch.equal(expected, z_d)
    many = [part.repeat_interleave(16, dim=0) for part in (z, z_d, expected)]
    made, absent = model.train().drop_details(many[0], many[1])
    assert 0 < absent.sum() < len(absent)
    assert torch.equal(made[~absent], many[1][~absent])  # not twice as large
    torch.testing.assert_close(made[absent], many[2][absent], atol=1e-5, rtol=1e-5)
    alone = model.eval().without_details()
    assert alone.layout.detail_channels == 0
    assert torch.equal(alone.encode(images).latent_dist.mode(), z)
    wanted = model.decode_structured(z, expected)
    assert torch.equal(model.decode_alone(z), wanted)
    torch.testing.assert_close(alone.decode(z).sample, wanted, atol=1e-5, rtol=1e-5)
    alone.save_pretrained(tmp_path)
    opened = AutoencoderDA.from_pretrained(tmp_path)
    torch.testing.assert_close(opened.decode(z).sample, wanted, atol=1e-5, rtol=1e-5)
    model.drop_base_decoder()
    with pytest.raises(DavaeError, match="no base decoder"):
        model.absent_details(z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"absent_details": "none"}, "absent_details"),
        ({"absent_details": "enlarged", "detail_dropout": 1.0}, "never trained"),
    ],
)
def test_absent_details_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(DavaeError, match=message):
        make(**options)


def test_absent_details_of_a_second_level_are_zero() -> None:
    with pytest.raises(DavaeError, match="over a base VAE"):
        AutoencoderDA.from_base(make(), detail_channels=DETAILS, absent_details="enlarged")


@pytest.mark.parametrize("scale", [2, 4, 8])
@torch.no_grad()
def test_scales_take_one_step(scale: int) -> None:
    model = make(scale=scale, detail_channels=32)
    images = torch.rand(1, 3, 8 * scale, 4 * scale)
    latent = model.encode(images).latent_dist.mode()
    assert latent.shape == (1, 36, 2, 1)
    assert model.decode(latent).sample.shape == images.shape


def test_mistakes_are_told_with_numbers() -> None:
    with pytest.raises(DavaeError, match="unknown scale '3': use 2, 4 or 8"):
        make(scale=3)
    with pytest.raises(DavaeError, match="positive multiple of 8 for scale 4, not 12"):
        make(scale=4, detail_channels=12)
    with pytest.raises(DavaeError, match="detail_dropout must lie in"):
        make(detail_dropout=1.1)
    model = make()
    for encode in (model.encode, model.encode_details, model.encode_base):
        with pytest.raises(DavaeError, match=r"36 x 48 pixels .* multiples of 8 \(scale 2 times base compression 4\)"):
            encode(torch.zeros(1, 3, 36, 48))
    with pytest.raises(DavaeError, match="5 channels, expected 12"):
        model.decode(torch.zeros(1, 5, 4, 4))


# ---------------------------------------------------------------------- adapters


def test_unknown_base_names_the_methods_to_write() -> None:
    base = AsymmetricAutoencoderKL(
        down_block_out_channels=(8,), up_block_out_channels=(8,), norm_num_groups=4, latent_channels=4
    )
    with pytest.raises(DavaeError, match=r"AsymmetricAutoencoderKL .*detail_encoder.*joint_decoder.*register_adapter"):
        AutoencoderDA.from_base(base, detail_channels=8)


class StrangerKL(AutoencoderKL):
    """A base that nobody listed."""


class StrangerAdapter(BaseAdapter):
    def detail_encoder(self, base: ModelMixin) -> nn.Module:
        encoder = copy.deepcopy(base.encoder)
        encoder.conv_out = nn.Identity()
        return encoder

    def joint_decoder(self, base: ModelMixin) -> nn.Module:
        decoder = copy.deepcopy(base.decoder)
        decoder.conv_in = nn.Identity()
        return decoder


@torch.no_grad()
def test_two_methods_make_an_adapter(images: Tensor, tmp_path: Path) -> None:
    register_adapter(StrangerKL, StrangerAdapter())
    model = AutoencoderDA.from_base(StrangerKL(**KL), detail_channels=8)
    model.save_pretrained(tmp_path)
    latent = model.encode(images).latent_dist.mode()
    again = AutoencoderDA.from_pretrained(tmp_path)
    assert torch.equal(again.decode(latent).sample, model.decode(latent).sample)


# ---------------------------------------------------------------------- the family's interface


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name: str, images: Tensor) -> None:
    model = make(name, start="random", detail_dropout=0.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        z = model.encode_base(images)
        model.decode_structured(z, model.encode_details(images).mean).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.trained_parameters()])  # type: ignore[union-attr]
    for plain, checkpointed in zip(*gradients):
        assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_slicing_and_bfloat16(name: str, images: Tensor) -> None:
    model = make(name)
    latent = model.encode(images).latent_dist.mode()
    decoded = model.decode(latent).sample
    model.enable_slicing()
    assert torch.allclose(model.encode(images).latent_dist.mode(), latent, atol=1e-5)
    assert torch.allclose(model.decode(latent).sample, decoded, atol=1e-5)
    half = model.to(torch.bfloat16)
    posterior = half.encode(images.bfloat16()).latent_dist
    assert posterior.mode().dtype == posterior.sample().dtype == torch.bfloat16
    again = half.decode(latent.bfloat16()).sample
    assert again.dtype == torch.bfloat16
    assert (again.float() - decoded).abs().mean() < 0.05 * decoded.abs().max()


def test_forward_reconstructs_and_returns_tuples_on_request(images: Tensor) -> None:
    model = make(start="random")
    with torch.no_grad():
        posterior = model.encode(images, return_dict=False)[0]
        expected = model.decode(posterior.mode(), return_dict=False)[0]
        assert torch.equal(model(images).sample, expected)
        drawn = model(images, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
    assert drawn.shape == images.shape
    assert not torch.equal(drawn, expected)


def test_residual_blocks_are_never_split_over_devices():
    vae = AutoencoderDA.from_base(make_base("kl"), scale=2, detail_channels=8)
    blocks = {type(module).__name__ for module in vae.modules() if isinstance(module, ResnetBlock2D)}
    assert len(blocks) == 2  # the base's, and the copies that take less memory
    assert blocks <= set(AutoencoderDA._no_split_modules)


@pytest.mark.parametrize("order", ["base_first", "detail_first"])
@pytest.mark.parametrize(("details", "repeats"), [(8, False), (4, True)])
def test_without_details_the_images_are_those_of_details_of_zero(
    order: str, details: int, repeats: bool, tmp_path: Path, images: Tensor
) -> None:
    """With a shortcut that repeats channels by their position, and with a projection."""
    vae = make(detail_channels=details, decoder_channel_order=order, start="random")
    assert (vae.up.shortcut_proj is None) is repeats
    if not repeats:
        torch.nn.init.normal_(vae.up.shortcut_proj.weight, std=0.1)
    alone = vae.without_details()
    with torch.no_grad():
        latent = alone.encode(images).latent_dist.mode()
        assert torch.equal(latent, vae.encode_base(images))
        wanted = vae.decode_structured(latent, latent.new_zeros(2, details, *latent.shape[-2:]))
        torch.testing.assert_close(alone.decode(latent).sample, wanted, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(alone.decode_base(latent), vae.decode_base(latent))
    assert alone.config.latent_channels == vae.layout.base_channels
    assert len(alone.config.block_out_channels) == len(vae.config.block_out_channels)
    alone.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderDA.from_pretrained(tmp_path).decode(latent).sample, alone.decode(latent).sample)
    alone.train().requires_grad_(True)
    assert {id(p) for p in alone.trained_parameters()} == {
        id(p) for part in (alone.up, alone.joint_decoder) for p in part.parameters()
    }


def test_without_the_details_of_all_levels() -> None:
    vae = AutoencoderDA.from_base(make(start="random"), detail_channels=DETAILS, start="random")
    latent = torch.randn(1, vae.layout.base_channels, 4, 4)
    with torch.no_grad():
        wanted = vae.decode_structured(latent, latent.new_zeros(1, vae.layout.detail_channels, 4, 4))
        torch.testing.assert_close(vae.without_details().decode(latent).sample, wanted, atol=2e-5, rtol=1e-5)
    vae.drop_base_decoder()
    assert vae.without_details().eval().config.has_base_decoder is False


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_base_has_an_upscaling_decoder(name: str, images: Tensor) -> None:
    vae = make(name, start="random")
    alone = vae.without_details()
    latent = alone.encode(images).latent_dist.sample()
    wanted = vae.decode_structured(latent, latent.new_zeros(len(latent), DETAILS, *latent.shape[-2:]))
    torch.testing.assert_close(alone.decode(latent).sample, wanted, atol=2e-5, rtol=1e-4)
