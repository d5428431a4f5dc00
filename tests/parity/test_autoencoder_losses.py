"""One official training step of the ImageNet autoencoder: every term, the adaptive weights, the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from davae.interop.official_autoencoders import convert_imagenet
from davae.latents import AlignmentLoss, adaptive_weight, gaussian_kl
from davae.models import AutoencoderDA, PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss
from tests.conftest import ParityCase, load_case, parity_cases, relative_error

TOLERANCE, WEIGHT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4, 5e-5


@dataclass
class Step:
    """The generator's side of one training step."""

    model: AutoencoderDA
    reconstruction: Tensor
    terms: dict[str, Tensor]


def official_discriminator(case: ParityCase) -> PatchDiscriminator:
    """The authors' PatchGAN, whose size is read off its weights."""
    prefix = "loss.discriminator."
    weights = {n.removeprefix(prefix): t for n, t in case.state_dict().items() if n.startswith(prefix)}
    strided = sum(tensor.ndim == 4 for tensor in weights.values()) - 2  # all but the last two convolutions
    model = PatchDiscriminator(filters=len(weights["main.0.weight"]), layers=strided)
    model.load_state_dict(weights)
    return model


def generator_step(case: ParityCase) -> Step:
    model, _ = convert_imagenet(case.state_dict(), detail_dropout=0.0)
    settings, images = case.info["loss_config"], case.tensors["image"]
    z, posterior = model.encode_base(images), model.encode_details(images)
    z_d = posterior.mean + posterior.std * case.tensors["train_detail_noise"]
    assert relative_error(z_d.detach(), case.tensors["train_detail_sample"]) < TOLERANCE
    reconstruction = model.train().decode_structured(z, z_d)
    discriminator = official_discriminator(case).train()
    nll = (images - reconstruction).abs().mean()
    adversarial = hinge_generator_loss(discriminator(reconstruction))
    alignment = AlignmentLoss(model.layout)(z_d, model.alignment_target(z))
    terms = {
        "nll_loss": nll,
        "kl_loss": gaussian_kl(posterior.mean, posterior.logvar, reduction="mean"),
        "g_loss": adversarial,
        "vf_loss": alignment,
        "d_weight": settings["disc_weight"] * adaptive_weight(nll, adversarial, model.last_decoder_weight, maximum=1e4),
        "vf_weight": settings["vf_weight"] * adaptive_weight(nll, alignment, model.alignment_weight, maximum=1e8),
    }
    return Step(model, reconstruction, terms)


def total_loss(terms: dict[str, Tensor], kl_weight: float, discriminator_factor: float) -> Tensor:
    return (
        terms["nll_loss"]
        + kl_weight * terms["kl_loss"]
        + terms["d_weight"] * discriminator_factor * terms["g_loss"]
        + terms["vf_weight"] * terms["vf_loss"]
    )


@pytest.mark.parametrize("path", parity_cases("davae_ldm", having="train_generator"))
def test_generator_terms_and_gradients(path: Path) -> None:
    case = load_case(path)
    step = generator_step(case)
    assert relative_error(step.reconstruction.detach(), case.tensors["train_reconstruction"]) < TOLERANCE
    for record in ("train_generator", "train_generator_before_disc_start"):
        expected = case.info["scalars"][record]
        for name, value in step.terms.items():
            tolerance = WEIGHT_TOLERANCE if name.endswith("weight") else TOLERANCE
            assert float(value) == pytest.approx(expected[name], rel=tolerance), (record, name)
        total = total_loss(step.terms, case.info["loss_config"]["kl_weight"], expected["disc_factor"])
        assert float(total) == pytest.approx(expected["total_loss"], rel=TOLERANCE)
    total = total_loss(step.terms, case.info["loss_config"]["kl_weight"], 1.0)
    total.backward()
    gradients = {
        "grad_total.da.da_down.conv.weight": step.model.alignment_weight.grad,
        "grad_total.da.decoder.conv_out.weight": step.model.last_decoder_weight.grad,
    }
    assert gradients.keys() == {name for name in case.tensors if name.startswith("grad_total.")}
    for name, gradient in gradients.items():
        assert gradient is not None
        assert relative_error(gradient, case.tensors[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("path", parity_cases("davae_ldm", having="train_discriminator"))
def test_discriminator_terms(path: Path) -> None:
    case = load_case(path)
    expected = case.info["scalars"]["train_discriminator"]
    discriminator = official_discriminator(case).train()
    discriminator(case.tensors["train_reconstruction"])  # the generator's pass comes first
    real, fake = discriminator(case.tensors["image"]), discriminator(case.tensors["train_reconstruction"])
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(expected["disc_loss"], rel=TOLERANCE)
    assert float(real.mean()) == pytest.approx(expected["logits_real"], rel=1e-4)
    assert float(fake.mean()) == pytest.approx(expected["logits_fake"], rel=1e-4)
