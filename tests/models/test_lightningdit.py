"""The mathematics of the transformer, and its manners as a diffusers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.models.lightningdit import (
    SIZES,
    LightningDiTTransformer2DModel,
    RMSNorm,
    apply_rope,
    rope_table,
    sincos_table,
)

TINY = {
    "sample_size": 4,
    "patch_size": 1,
    "in_channels": 3,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_classes": 5,
}


def tiny(*, seed: int = 0, random: bool = True, **changes: Any) -> LightningDiTTransformer2DModel:
    """A small model; with `random` also its zeros are filled, so that no term of it can hide."""
    torch.manual_seed(seed)
    model = LightningDiTTransformer2DModel(**{**TINY, **changes}).eval()
    if random:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model: LightningDiTTransformer2DModel, *, batch: int = 3, side: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, model.config.in_channels, side, side, generator=generator)
    return latent, torch.rand(batch, generator=generator), torch.arange(batch) % model.config.num_classes


VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"qk_norm": True, "patch_size": 2}, id="qk_norm-patch2"),
    pytest.param({"swiglu": False, "rms_norm": False, "qk_norm": True}, id="gelu-layer_norm"),
    pytest.param({"rope": False, "adaln_shift": False, "out_channels": 6}, id="no_rope-no_shift-wider_out"),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_new_model_predicts_zero_and_its_blocks_are_the_identity(changes: dict[str, Any]) -> None:
    model = tiny(random=False, **changes)
    output = model(*inputs(model)).sample
    assert output.shape == (3, changes.get("out_channels", 3), 4, 4)
    assert torch.count_nonzero(output) == 0
    tokens, condition = torch.randn(2, 5, 32), torch.randn(2, 32)
    for block in model.transformer_blocks:
        assert torch.equal(block(tokens, condition, None), tokens)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    model(*inputs(model)).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # Softmax forgets what is added to all logits of a query, and so the bias of the keys (up to rounding)
        # where no rotation or norm follows.
        assert torch.count_nonzero(parameter.grad) > 0 or name.endswith("to_k.bias"), name


def test_gradients_agree_with_checkpointing_on_and_off() -> None:
    plain, checkpointed = tiny().train(), tiny().train()
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    outputs = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)  # label dropout
        output = model(*inputs(model)).sample
        output.square().mean().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_rope_logits_depend_on_relative_position_only() -> None:
    height, width, channels = 5, 6, 16
    query, key = torch.randn(channels), torch.randn(channels)
    table = rope_table(height, width, channels)
    queries = apply_rope(query.expand(1, 1, height * width, channels), *table)[0, 0]
    keys = apply_rope(key.expand(1, 1, height * width, channels), *table)[0, 0]
    logits = (queries @ keys.T).view(height, width, height, width)
    torch.testing.assert_close(logits[:-1, :-1, :-1, :-1], logits[1:, 1:, 1:, 1:], rtol=0, atol=1e-5)
    assert (logits[0, 0, 1, 0] - logits[0, 0, 0, 1]).abs() > 1e-3  # rows and columns are told apart
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(height * width))  # a rotation


def test_rope_of_one_pair_by_hand() -> None:
    cos, sin = torch.tensor([[0.0]]), torch.tensor([[1.0]])  # a quarter turn: (a, b) -> (-b, a)
    assert torch.equal(apply_rope(torch.tensor([[[[2.0, 3.0]]]]), cos, sin), torch.tensor([[[[-3.0, 2.0]]]]))


def test_sincos_table_by_hand() -> None:
    table = sincos_table(2, 3, 8)  # frequencies 1 and 1/100; columns in the first half, rows in the second
    token = table[1 * 3 + 2]  # row 1, column 2
    angles = torch.tensor([2.0, 0.02, 1.0, 0.01])
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(token, expected)


def test_swiglu_width_is_two_thirds_of_four_times_hidden() -> None:
    model = tiny(hidden_size=64)
    assert model.transformer_blocks[0].ff.net[0].proj.out_features == 2 * 170  # int(2/3 * 256), gate and value
    assert tiny(swiglu=False).transformer_blocks[0].ff.net[0].proj.out_features == 4 * 32
    xl = SIZES["XL"]["hidden_size"]
    assert int(2 / 3 * 4 * xl) == 3072


def test_labels_drop_to_the_null_label_where_asked_and_not_in_the_model() -> None:
    model = tiny(class_dropout=0.25)
    labels = torch.zeros(8000, dtype=torch.long)
    rate = (model.drop_labels(labels) == model.null_label).float().mean()
    assert abs(rate - 0.25) < 0.02  # four standard deviations
    embedded = model.train().embed_class(labels)
    assert torch.equal(embedded, model.class_embed.weight[:1].expand(8000, -1))
    model.register_to_config(class_dropout=0.0)
    assert torch.equal(model.drop_labels(labels), labels)


def test_a_scalar_time_serves_the_whole_batch() -> None:
    model = tiny()
    latent, _, labels = inputs(model)
    one = model(latent, torch.tensor(0.3), labels).sample
    assert torch.equal(one, model(latent, torch.full((3,), 0.3), labels).sample)


def test_samples_of_a_batch_do_not_meet() -> None:
    model = tiny(qk_norm=True)
    latent, time, labels = inputs(model)
    together = model(latent, time, labels).sample
    alone = torch.cat([model(latent[i : i + 1], time[i : i + 1], labels[i : i + 1]).sample for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_any_grid_is_accepted() -> None:
    model = tiny(patch_size=2)
    latent = torch.randn(1, 3, 6, 10)
    assert model(latent, torch.tensor(0.5), torch.tensor([0])).sample.shape == latent.shape


def test_tokens_are_patches_in_reading_order() -> None:
    model = tiny(patch_size=2)
    latent = torch.randn(1, 3, 4, 6)
    changed = latent.clone()
    changed[:, :, 2:, 4:] += 1  # last row of patches, last column: token 5
    difference = (model.embed_tokens(changed) - model.embed_tokens(latent)).abs().sum(dim=-1)[0]
    assert difference.nonzero().flatten().tolist() == [5]


def test_the_features_of_a_token_are_row_column_channel() -> None:
    model = tiny(random=False, patch_size=2)
    model.proj_out.bias.data = torch.arange(12.0)  # the head's weight is zero: every token says this
    patch = model(*inputs(model)).sample[0, :, 2:, 2:]  # [C, row, column]
    assert torch.equal(patch, torch.arange(12.0).view(2, 2, 3).permute(2, 0, 1))


def test_saved_and_loaded_outputs_are_bit_equal(tmp_path: Path) -> None:
    model = tiny(qk_norm=True, patch_size=2)
    model.save_pretrained(tmp_path)
    loaded = LightningDiTTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert torch.equal(loaded(*inputs(model)).sample, model(*inputs(model)).sample)


def test_half_precision_keeps_the_positions() -> None:
    model = tiny(sample_size=16)
    latent, time, labels = inputs(model, side=16)
    exact = model(latent, time, labels).sample
    half = model.bfloat16()(latent.bfloat16(), time, labels).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.03


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    assert torch.allclose(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / 12.5**0.5)


def test_autocast_works_without_a_warning_and_keeps_the_residual_stream_wide(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = tiny(qk_norm=True)
    streams: list[torch.dtype] = []
    model.transformer_blocks[-1].register_forward_hook(lambda _m, _i, output: streams.append(output.dtype))
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs(model))
    torch.set_warn_always(before)
    assert streams == [torch.float32]
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("label", [-1, 6])
def test_a_label_out_of_range_is_named(label: int) -> None:
    model = tiny()
    with pytest.raises(DavaeError, match=rf"class label {label} .* 0 to 4, and 5 for no class"):
        model(torch.randn(1, 3, 4, 4), torch.tensor(0.5), torch.tensor([label]))


def test_wrong_shapes_are_named() -> None:
    model = tiny(patch_size=2)
    with pytest.raises(DavaeError, match=r"latent has 4 channels, the transformer takes 3"):
        model(torch.randn(1, 4, 4, 4), torch.tensor(0.5), torch.tensor([0]))
    with pytest.raises(DavaeError, match=r"4 x 5 cannot be divided into patches of 2"):
        model(torch.randn(1, 3, 4, 5), torch.tensor(0.5), torch.tensor([0]))
    with pytest.raises(DavaeError, match=r"hidden_size 30"):
        tiny(hidden_size=30)
    with pytest.raises(DavaeError, match=r"width is a multiple of 4.* gives 2"):
        tiny(num_attention_heads=16)
