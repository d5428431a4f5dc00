"""A class nobody described: found by running it, and where it is not, the error says what stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.bases.debug_transformers import SMALL_TRANSFORMERS, randomise
from davae.latents import LatentLayout
from davae.warm_start import (
    WarmStartError,
    channel_parameters,
    check_warm_start,
    description_of,
    new_channel_masks,
    registry,
    widen_channels,
)

LAYOUT = LatentLayout(4, 6)

#: Known classes whose inputs cannot be guessed from the names of their arguments, with what the error names.
NOT_PROBED = {
    "BriaFibo2Transformer2DModel": "accepted none of the inputs",  # a text with layers
    "BriaFiboTransformer2DModel": "accepted none of the inputs",  # a list of text layers
    "Flux3Transformer2DModel": "x_embedders.image_cond",  # an optional second image
    "GlmImageTransformer2DModel": "prior_token_id",
    "HiDreamImageTransformer2DModel": "accepted none of the inputs",
    "HunyuanDiT2DModel": "accepted none of the inputs",
    "Ideogram4Transformer2DModel": "position_ids",
    "JoyImageEditPlusTransformer3DModel": "accepted none of the inputs",  # patches on axes of their own
    "Kandinsky5Transformer3DModel": "features that are not latent channels",
    "Krea2Transformer2DModel": "position_ids",
    "LuminaNextDiT2DModel": "image_rotary_emb",
    "OmniGenTransformer2DModel": "input_ids",
    "QwenImage21Transformer2DModel": "accepted none of the inputs",
}


def widen(model: ModelMixin) -> ModelMixin:
    return widen_channels(model, base_channels=LAYOUT.base_channels, detail_channels=LAYOUT.detail_channels)


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.delitem(registry._DESCRIPTIONS, name)


@pytest.mark.parametrize("name", sorted(SMALL_TRANSFORMERS.keys() - NOT_PROBED.keys()))
def test_probing_a_known_class_gives_the_described_weights(name: str, forget: Callable[[str], None]) -> None:
    model = SMALL_TRANSFORMERS[name]()
    described = widen(model)
    masks = new_channel_masks(described, LAYOUT)
    forget(name)
    assert description_of(model).source == "probed"
    probed = widen(model)
    assert dict(probed.config) == dict(described.config)
    assert all(map(torch.equal, probed.parameters(), described.parameters()))
    assert {n: m.tolist() for n, m in new_channel_masks(probed, LAYOUT).items()} == {
        n: m.tolist() for n, m in masks.items()
    }


@pytest.mark.parametrize("name", NOT_PROBED)
def test_what_stands_in_the_way_is_named(name: str, forget: Callable[[str], None]) -> None:
    model = SMALL_TRANSFORMERS[name]()
    forget(name)
    with pytest.raises(WarmStartError, match=rf"{name} is not described.*{NOT_PROBED[name]}.*describe\('{name}'"):
        widen(model)


class Unlisted(ModelMixin, ConfigMixin):
    """Patches ordered (row, channel, column) on the way in, (channel, column, row) and variances on the way out."""

    @register_to_config
    def __init__(self, in_channels: int = 4, patch_size: int = 2, text_width: int = 20, defect: str = "") -> None:
        super().__init__()
        features = in_channels * patch_size**2
        self.read = nn.Linear(features, 24)
        self.listen = nn.Linear(text_width, 24)
        self.think = nn.MultiheadAttention(24, 2, batch_first=True)
        self.write = nn.Linear(24, 2 * features)
        if defect == "norm":
            self.norm = nn.GroupNorm(2, in_channels)
        if defect == "mixing":
            self.mix = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, sample: Tensor, timestep: Tensor, prompt_states: Tensor, **options: Any) -> Tensor:
        (batch, channels, height, width), p = sample.shape, self.config.patch_size
        if self.config.defect == "norm":
            sample = self.norm(sample)
        if self.config.defect == "mixing":
            sample = sample.cumsum(1)
        grid = sample.reshape(batch, channels, height // p, p, width // p, p)  # b c h i w j
        tokens = self.read(grid.permute(0, 2, 4, 3, 1, 5).reshape(batch, -1, p * channels * p))
        text = self.listen(prompt_states)
        tokens = tokens + self.think(tokens, text, text)[0] + timestep[:, None, None]
        out = self.write(tokens).reshape(batch, height // p, width // p, 2, channels, p, p)  # b h w v c j i
        return out.permute(0, 3, 4, 1, 6, 2, 5).reshape(batch, 2 * channels, height, width)


def test_a_class_that_nobody_listed() -> None:
    model = randomise(Unlisted())
    description = description_of(model)
    assert description.source == "probed"
    assert [place.pattern for place in description.inputs] == ["2 in_channels 2"]
    assert {place.pattern for place in description.outputs} == {"2 in_channels 4"}
    assert description.sample_pattern == "2 in_channels"
    widened = widen(model)
    assert isinstance(widened, Unlisted)
    assert channel_parameters(widened) == ["read.weight", "write.weight", "write.bias"]

    z, z_d = torch.randn(3, 4, 6, 8), torch.randn(3, 6, 6, 8)  # another size than the probe's
    conditioning = {"timestep": torch.rand(3), "prompt_states": torch.randn(3, 5, 20)}
    with torch.no_grad():
        expected = model(z, **conditioning).unflatten(1, (2, 4))
        out = widened(LAYOUT.join(z, z_d), **conditioning).unflatten(1, (2, 10))
    assert (out[:, :, :4] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert out[:, :, 4:].count_nonzero() == 0


class Sequence(ModelMixin, ConfigMixin):
    """Takes tokens and whole timesteps, and has no patch size."""

    @register_to_config
    def __init__(self, in_channels: int = 4, out_channels: int | None = None) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(in_channels, 12), nn.Embedding(1000, 12)
        self.head = nn.Linear(12, out_channels or in_channels, bias=False)

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.head((self.embed(x) + self.time(t)[:, None]).tanh()),)


@pytest.mark.parametrize(("features", "packed"), [(4, "c"), (16, "c 2 2")])
def test_tokens_packed_or_not(features: int, packed: str) -> None:
    # With 4 features an image 4 positions wide would fit the embedder too: the probe must not fall for it.
    model = randomise(Sequence(in_channels=features))
    assert description_of(model).sample_axis == 2
    widened = widen(model)
    assert description_of(widened).fitted(widened, LAYOUT.channels).inputs[0].pattern == packed
    assert widened.config.in_channels == features // 4 * 10
    assert widened.config.out_channels is None
    tokens = torch.randn(1, 5, features)
    details = torch.randn(1, 5, features // 4 * 6)
    with torch.no_grad():  # channel-major: base features stay first
        (out,) = widened(torch.cat([tokens, details], dim=2), torch.tensor([7]))
        (expected,) = model(tokens, torch.tensor([7]))
    assert (out[..., :features] - expected).abs().max() <= 1e-6
    assert out[..., features:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probing_does_not_depend_on_precision_or_values(dtype: torch.dtype) -> None:
    model = Unlisted(in_channels=96, patch_size=2)  # 768 rows in the head: more than bfloat16 counts
    nn.init.zeros_(model.write.weight)
    model.to(dtype)
    assert {p.pattern for p in description_of(model).outputs} == {"2 in_channels 4"}


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = randomise(Unlisted(patch_size=1)).train()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    description_of(model)
    assert model.training
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


class TestRefusals:
    def test_a_normalisation_over_latent_channels(self) -> None:
        with pytest.raises(WarmStartError, match=r"layer norm \(GroupNorm\).*without mixing base and detail"):
            widen(randomise(Unlisted(defect="norm")))

    def test_channels_mixed_before_the_tokens(self) -> None:
        with pytest.raises(WarmStartError, match=r"layer mix \(Conv2d\).*on axes \[0, 1\]"):
            widen(randomise(Unlisted(defect="mixing")))

    def test_mixing_without_weights(self) -> None:
        class Summing(Unlisted):
            def forward(self, sample: Tensor, timestep: Tensor, prompt_states: Tensor, **options: Any) -> Tensor:
                return super().forward(sample.cumsum(1), timestep, prompt_states)

        with pytest.raises(WarmStartError, match=r"layer read: .*several latent channels"):
            widen(randomise(Summing()))

    def test_an_output_that_is_no_rearrangement(self) -> None:
        class Bent(Unlisted):
            def forward(self, sample: Tensor, timestep: Tensor, prompt_states: Tensor, **options: Any) -> Tensor:
                return super().forward(sample, timestep, prompt_states).tanh()

        with pytest.raises(WarmStartError, match=r"layer write: .*unchanged"):
            widen(randomise(Bent()))

    def test_an_argument_whose_name_tells_nothing(self) -> None:
        class Strange(Unlisted):
            def forward(self, sample: Tensor, timestep: Tensor, gizmo: Tensor) -> Tensor:
                return super().forward(sample, timestep, gizmo)

        with pytest.raises(WarmStartError, match=r"needs 'gizmo'.*describe\('Strange'"):
            widen(randomise(Strange()))

    def test_a_residual_around_the_transformer(self) -> None:
        # It adds its input to its output: details would go straight through.
        class Residual(Unlisted):
            def forward(self, sample: Tensor, timestep: Tensor, prompt_states: Tensor, **options: Any) -> Tensor:
                return sample.repeat(1, 2, 1, 1) + super().forward(sample, timestep, prompt_states)

        with pytest.raises(WarmStartError, match=r"layer write: .*unchanged"):
            widen(randomise(Residual()))

    def test_a_unet_block(self) -> None:
        block = diffusers.DreamLiteTransformer2DModel(
            in_channels=8, num_attention_heads=2, attention_head_dim=4, norm_num_groups=2
        )
        with pytest.raises(WarmStartError, match=r"layer norm \(GroupNorm\)"):
            widen_channels(block, base_channels=8, detail_channels=2)
        legacy = diffusers.Transformer2DModel(
            in_channels=8, num_attention_heads=2, attention_head_dim=4, norm_num_groups=2
        )
        with pytest.raises(WarmStartError, match="block of a U-Net"):
            widen_channels(legacy, base_channels=8, detail_channels=2)


def test_the_self_check_accepts_a_probed_class_again() -> None:
    model = randomise(Unlisted(patch_size=1, text_width=28))
    report = check_warm_start(model, widen(model), LAYOUT)
    assert report.layers == ("read", "write")
    assert report.max_detail_output == 0
