"""What must not be rounded under mixed precision is not: KL, alignment, statistics, linear attention, the base."""

import copy

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0, SanaMultiscaleLinearAttention
from diffusers.models.normalization import RMSNorm
from torch import nn

from davae.bases.debug_transformers import SMALL_TRANSFORMERS
from davae.bases.tiny import debug_base
from davae.latents import AlignmentLoss, ChannelStatistics, LatentLayout, adaptive_weight, gaussian_kl
from davae.models import lightningdit
from davae.models.fp32_linear_attention import keep_linear_attention_in_float32
from davae.recipes.settings import AlignmentSettings, ReconstructionSettings
from davae.training.autoencoder.losses import ReconstructionLoss
from davae.training.autoencoder.objective import StructuredObjective

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=HALVES, ids=["bf16", "fp16"])
def half(request):
    return request.param


def _latent(seed, channels=8, scale=1.0):
    return scale * torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_kl_under_autocast_is_that_of_float32(half):
    """Large means (1e3, whose squares exceed float16) and tiny variances: finite and exact for its inputs."""
    mean, logvar = _latent(0, scale=1e3).to(half), _latent(1, scale=6.0).to(half)
    for reduction in ("mean", "sum"):
        expected = gaussian_kl(mean.double().float(), logvar.double().float(), reduction=reduction)
        with torch.autocast("cpu", half):
            found = gaussian_kl(mean, logvar, reduction=reduction)
        assert found.dtype == torch.float32
        assert found.isfinite()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("form", ["mean", "relational", "projection"])
def test_alignment_under_autocast_is_that_of_float32(half, form):
    loss = AlignmentLoss(LatentLayout(4, 8), form)
    details, base = _latent(0, scale=300.0).to(half), _latent(1, 4, 300.0)
    with torch.no_grad():
        expected = loss(details.float(), base)
        with torch.autocast("cpu", half):
            found = loss(details, base)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_statistics_of_half_precision_latents_are_exact(half):
    """100 added to each value leaves bfloat16 sums without any digit of the spread."""
    values = (_latent(0, 3) + 100.0).to(half)
    with torch.autocast("cpu", half):
        statistics = ChannelStatistics(3)
        for part in values.split(1):
            statistics.update(part)
    exact = values.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(statistics.mean, exact.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.std, exact.std(1, correction=0), rtol=1e-9, atol=0)


def test_reconstruction_terms_are_float32(half):
    images, made = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    made = made.to(half)
    loss = ReconstructionLoss(ReconstructionSettings(mse_weight=1.0, laplacian_weight=0.5))
    with torch.autocast("cpu", half):
        found = loss(images, made)
    assert {v.dtype for v in found.values()} == {torch.float32}
    assert torch.equal(found["l1"], (made.float() - images).abs().mean())


def test_adaptive_weights_do_not_vanish_in_float16():
    """The gradient of a mean over 10^9 elements is zero in float16 unless it is scaled on its way."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    x = torch.randn(8, 4)

    def ratio():
        y = layer(x)
        return adaptive_weight(y.float().square().sum() * 1e-9, y.float().sum() * 1e-3, layer.weight, maximum=1e8)

    expected = ratio()
    with torch.autocast("cpu", torch.float16):
        found = ratio()
    assert expected > 0
    assert found == pytest.approx(float(expected), rel=0.02)


def _dc():
    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
    )
    return model.eval()


def _attention(model):
    return next(m for m in model.modules() if isinstance(m, SanaMultiscaleLinearAttention))


class _Products(torch.overrides.TorchFunctionMode):
    """Notes what ``torch.matmul`` gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.matmul:
            self.seen.append(out)
        return out


@pytest.mark.parametrize("side", [2, 16])  # 4 positions: quadratic; 256: linear
def test_dc_ae_attention_multiplies_in_float32(half, side):
    attention = _attention(_dc())
    x = 30 * torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0))
    assert keep_linear_attention_in_float32(attention) == 1
    with torch.no_grad(), _Products() as products, torch.autocast("cpu", half):
        attention(x)
    assert {p.dtype for p in products.seen} == {torch.float32}
    assert len(products.seen) == 2


def test_dc_ae_overflows_in_float16_without_the_island_and_not_with_it():
    model, x = _dc(), 60 * torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    attention = _attention(model)
    attention.norm_out = nn.Identity()  # large activations reach the sum as they are
    attention.norm_type = "rms_norm"
    with torch.no_grad():
        expected = attention(x)
        with torch.autocast("cpu", torch.float16):
            bare = attention(x)
            keep_linear_attention_in_float32(model)
            kept = attention(x)
    assert not bare.isfinite().all()
    torch.testing.assert_close(kept.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_islands_change_nothing_without_autocast_and_are_laid_once():
    model, images = _dc(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(images).sample
        count = keep_linear_attention_in_float32(model)
        assert count == keep_linear_attention_in_float32(model) == 2
        assert torch.equal(model(images).sample, before)
        assert torch.equal(copy.deepcopy(model)(images).sample, before)
    assert model.state_dict().keys() == _dc().state_dict().keys()


def test_gradients_pass_through_the_island(half):
    model = _dc()
    keep_linear_attention_in_float32(model)
    with torch.autocast("cpu", half):
        loss = model(torch.randn(1, 3, 32, 32)).sample.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in _attention(model).parameters())


def test_sana_attention_is_an_island_too():
    model = SMALL_TRANSFORMERS["SanaTransformer2DModel"]()
    assert isinstance(model, SanaTransformer2DModel)
    linear = [m for m in model.modules() if isinstance(getattr(m, "processor", None), SanaLinearAttnProcessor2_0)]
    assert keep_linear_attention_in_float32(model) == len(linear) > 0
    x = torch.randn(1, 9, linear[0].to_q.in_features)
    with torch.no_grad(), _Products() as products, torch.autocast("cpu", torch.bfloat16):
        linear[0](x)
    assert {p.dtype for p in products.seen} == {torch.float32}


def test_the_base_latent_is_exact_in_training(half, monkeypatch):
    """What details are aligned with and decoded beside is what stage 2 will see, not a rounding of it."""
    from davae.models import AutoencoderDA

    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    objective = StructuredObjective(vae, AlignmentSettings(), ReconstructionSettings())
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    seen = []
    decode = vae.decode_structured
    monkeypatch.setattr(vae, "decode_structured", lambda z, z_d: seen.append(z) or decode(z, z_d))
    torch.manual_seed(0)
    with torch.autocast("cpu", half):
        losses = objective({"image": images}, 0)
    assert torch.equal(seen[0], vae.encode_base(images))
    assert {losses[n].dtype for n in ("total", "kl", "alignment", "l1")} == {torch.float32}
    torch.manual_seed(0)
    whole = objective({"image": images}, 0)
    assert losses["l1"].item() == pytest.approx(whole["l1"].item(), rel=0.02)
    assert losses["alignment"].item() == pytest.approx(whole["alignment"].item(), rel=0.05)


NORMS = {
    "group": lambda: nn.GroupNorm(4, 16, eps=1e-6),
    "layer": lambda: nn.LayerNorm((16, 8, 8), eps=1e-6),
    "batch": lambda: nn.BatchNorm2d(16, eps=1e-6),
    "rms": lambda: RMSNorm(8, eps=1e-6),  # diffusers', in DC-AE, SANA, SD3.5 and FLUX
    "rms, LightningDiT": lambda: lightningdit.RMSNorm(8, eps=1e-6),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_take_their_statistics_in_float32(norm, half):
    """Values of 200 +- 1: in bfloat16, where steps are of 1 there, their mean and spread would be gone."""
    if norm == "batch" and half is torch.float16:
        pytest.skip("torch has no float16 batch norm on the CPU")
    module = NORMS[norm]()
    x = (200 + torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))).to(half)
    with torch.no_grad():
        exact = copy.deepcopy(module)(x.float())
        with torch.autocast("cpu", half):
            found = module(x).float()
    assert float((found - exact).abs().max()) <= 2**-7 * float(exact.abs().max())
    assert {p.dtype for p in module.parameters()} <= {torch.float32}
    if norm == "batch":
        assert module.running_mean.dtype == torch.float32
        torch.testing.assert_close(module.running_mean, 0.1 * x.float().mean((0, 2, 3)), rtol=1e-5, atol=0)
