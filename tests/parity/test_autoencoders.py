"""Official autoencoders, loaded through interop, against their own outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from davae.errors import DavaeError
from davae.interop.official_autoencoders import convert_imagenet, convert_sd3
from davae.latents import AlignmentLoss, gaussian_kl, grouped_mean
from davae.models import AutoencoderDA, detail_dropout_factor
from tests.conftest import ParityCase, load_case, parity_cases, relative_error

TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def check(case: ParityCase, **ours: torch.Tensor) -> None:
    """Every named tensor lies within the stated tolerance."""
    errors = {name: relative_error(tensor, case.tensors[name]) for name, tensor in ours.items()}
    assert max(errors.values()) < TOLERANCE, errors


def check_losses(
    case: ParityCase, model: AutoencoderDA, details: DiagonalGaussianDistribution, z: torch.Tensor
) -> None:
    scalars = case.info["scalars"]
    assert AlignmentLoss(model.layout)(details.mean, model.alignment_target(z)) == pytest.approx(
        scalars["align_mse"], rel=TOLERANCE
    )
    per_sample = torch.tensor(scalars["kl_half_sum_per_sample"])
    assert gaussian_kl(details.mean, details.logvar) == pytest.approx(float(per_sample.mean()), rel=TOLERANCE)


@pytest.mark.parametrize("path", parity_cases("davae_ldm", having="reconstruction"))
def test_imagenet_autoencoder(path: Path) -> None:
    case = load_case(path)
    model, unused = convert_imagenet(case.state_dict())
    images = case.tensors["image"]
    z, details = model.encode_base(images), model.encode_details(images)
    check(
        case,
        image_base=model.downsample(images),
        base_latent=z,
        detail_mean=details.mean,
        detail_logvar=details.logvar,
        detail_grouped_mean=grouped_mean(details.mean, model.layout.base_channels),
        decoder_input=model.layout.join(z, details.mean),
        reconstruction=model.decode_structured(z, details.mean),
        reconstruction_zero_detail=model.decode_structured(z, torch.zeros_like(details.mean)),
    )
    check_losses(case, model, details, z)
    scalars = case.info["scalars"]
    kl = gaussian_kl(details.mean, details.logvar, reduction="mean")
    assert kl == pytest.approx(scalars["kl_elementwise_mean_no_half"], rel=TOLERANCE)
    factor = detail_dropout_factor(case.tensors["dropout_uniform"], scalars["dropout_p"])
    assert 0 < (factor == 0).sum() < len(factor)
    assert relative_error(factor, case.tensors["dropout_output_scale"]) < TOLERANCE
    parts = {name.removeprefix("da.").split(".")[0] + "." + name.split(".")[2] for name in unused if "da." in name}
    assert parts == {"encoder.conv_out", "decoder.conv_in"}


@pytest.mark.parametrize("path", parity_cases("davae_ldm", having="reconstruction"))
def test_imagenet_statistics_normalise_every_channel(path: Path) -> None:
    case = load_case(path)
    channels = case.info["config"]["total_channels"]
    mean, std = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    model, _ = convert_imagenet(case.state_dict(), statistics=(mean.tolist(), std.tolist()))
    latent = model.encode(case.tensors["image"]).latent_dist.mode()
    listed = (torch.tensor(values)[:, None, None] for values in (model.config.latents_mean, model.config.latents_std))
    pipeline_mean, pipeline_std = listed
    ours = (latent - pipeline_mean) / pipeline_std  # what a diffusion model sees
    official = (case.tensors["decoder_input"] - mean[:, None, None]) / std[:, None, None]
    assert relative_error(ours, official) < TOLERANCE
    check(case, reconstruction=model.decode(latent).sample)


@pytest.mark.parametrize("path", parity_cases("davae_ldm", having="reconstruction"))
def test_a_converted_model_is_saved_and_loaded(path: Path, tmp_path: Path) -> None:
    case = load_case(path)
    model, _ = convert_imagenet(case.state_dict())
    model.save_pretrained(tmp_path)
    again = AutoencoderDA.from_pretrained(tmp_path)
    latent = again.encode(case.tensors["image"]).latent_dist.mode()
    check(case, reconstruction=again.decode(latent).sample)
    with pytest.raises(DavaeError, match="has no base decoder"):
        again.decode_base(latent)


@pytest.mark.parametrize("path", parity_cases("davae_ldm", having="reconstruction"))
def test_nothing_is_dropped_or_made_up(path: Path) -> None:
    state_dict = load_case(path).state_dict()
    with pytest.raises(DavaeError, match=r"unexpected: da\.extra\.weight"):
        convert_imagenet({**state_dict, "da.extra.weight": torch.zeros(1)})
    name = "da.encoder.mid.attn_1.q.weight"
    with pytest.raises(DavaeError, match=r"missing: detail_encoder\.mid_block\.attentions\.0\.to_q\.weight"):
        convert_imagenet({k: v for k, v in state_dict.items() if k != name})
    with pytest.raises(DavaeError, match=r"of another shape: .*to_q\.weight \(1, 2\), expected"):
        convert_imagenet({**state_dict, name: torch.zeros(1, 2, 1, 1)})


@pytest.mark.parametrize("path", parity_cases("davae_sd3", having="reconstruction"))
def test_sd3_autoencoder(path: Path) -> None:
    case = load_case(path)
    statistics = (case.tensors["norm_mean"].tolist(), case.tensors["norm_std"].tolist())
    model, unused = convert_sd3(case.state_dict(), case.info["config"]["vae"], statistics=statistics)
    assert {name.rpartition(".")[0] for name in unused} == {"vae.encoder.conv_out", "vae.decoder.conv_in"}
    images = case.tensors["image"] * 2 - 1
    z, details = model.encode_base(images), model.encode_details(images)
    target = model.alignment_target(z)
    latent = model.encode(images).latent_dist.mode()
    seen = (latent - model.config.shift_factor) * model.config.scaling_factor  # by a diffusion model
    decoded = model.decode(latent).sample
    check(
        case,
        image_base=(model.downsample(images) + 1) / 2,
        base_mean_raw=z,
        base_latent=target,
        detail_mean=details.mean,
        detail_logvar=details.logvar,
        alignment_projection=grouped_mean(details.mean, model.layout.base_channels),
        decoder_input=torch.cat([details.mean, target], dim=1),
        wrapper_latent=seen.roll(model.layout.detail_channels, dims=1),  # official order: details first
        reconstruction=((decoded + 1) / 2).clamp(0, 1),
    )
    if "reconstruction_unclamped_first" in case.tensors:
        check(case, reconstruction_unclamped_first=decoded[:1])
    check_losses(case, model, details, z)


@pytest.mark.parametrize("path", parity_cases("davae_sd3", having="reconstruction"))
def test_sd3_base_supplies_the_decoder_and_is_compared(path: Path) -> None:
    case = load_case(path)
    base = AutoencoderKL(**case.info["config"]["vae"]).eval()
    with pytest.raises(DavaeError, match="not the VAE in the official file"):
        convert_sd3(case.state_dict(), case.info["config"]["vae"], base=base)
    base.load_state_dict({**base.state_dict(), **case.state_dict("original_vae_model.vae.")})
    model, _ = convert_sd3(case.state_dict(), case.info["config"]["vae"], base=base)
    latent = model.encode(case.tensors["image"] * 2 - 1).latent_dist.mode()
    preview = model.decode_base(latent)
    assert torch.equal(preview, base.decode(model.layout.split(latent)[0]).sample)


@pytest.mark.parametrize("path", parity_cases("davae_sd3", having="in_10_to_4"))
def test_uneven_groups(path: Path) -> None:
    case = load_case(path)
    inputs = [name for name in case.tensors if name.startswith("in_")]
    assert inputs
    for name in inputs:
        expected = case.tensors[name.replace("in_", "out_")]
        assert relative_error(grouped_mean(case.tensors[name], expected.shape[1]), expected) < TOLERANCE


@pytest.mark.parametrize("path", parity_cases("davae_ldm", having="parameters_mild"))
def test_posterior(path: Path) -> None:
    case = load_case(path)
    posterior = DiagonalGaussianDistribution(case.tensors["parameters"])
    check(case, mean=posterior.mean, logvar=posterior.logvar, std=posterior.std)
    mean, logvar = case.tensors["parameters_mild"].chunk(2, dim=1)
    elementwise, half_sum = case.tensors["kl_elementwise_no_half"], case.tensors["kl_half_sum"]
    assert gaussian_kl(mean, logvar, reduction="mean") == pytest.approx(float(elementwise.mean()), rel=TOLERANCE)
    assert gaussian_kl(mean, logvar) == pytest.approx(float(half_sum.mean()), rel=TOLERANCE)


@pytest.mark.parametrize("path", parity_cases("dcae"))
def test_dc_ae_as_base(path: Path) -> None:
    """The parts that the adapter cuts out make the official autoencoder when put together again."""
    case = load_case(path)
    base = AutoencoderDC(**case.info["config"]).eval()
    base.load_state_dict(case.state_dict())
    model = AutoencoderDA.from_base(base, detail_channels=base.config.latent_channels)
    images, head, stem = (
        case.tensors["image"],
        model.adapter.encoder_head(base),
        model.adapter.decoder_stem(base),
    )
    features = model.detail_encoder(images)
    latent = torch.conv2d(features, head.weight, head.bias, padding=1)
    first = torch.conv2d(latent, stem.weight, stem.bias, padding=1)
    check(case, latent=latent, reconstruction=model.joint_decoder(first))
    check(case, latent=model.adapter.encode(model.base, images))
