"""Every image transformer class of diffusers: widened, it starts as the original; saved and loaded, it stays."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from torch import Tensor, nn

from davae.bases.debug_transformers import (
    EXCLUDED_TRANSFORMERS,
    SMALL_CHANNELS,
    SMALL_TRANSFORMERS,
    small_transformer,
    transformer_row,
)
from davae.latents import LatentLayout
from davae.warm_start import (
    channel_parameters,
    check_warm_start,
    description_of,
    dummy_arguments,
    new_channel_masks,
    widen_channels,
)
from davae.warm_start.observe import first_tensor
from davae.warm_start.patterns import split_axis

LAYOUT = LatentLayout(SMALL_CHANNELS, 6)


def latent(model: ModelMixin, channels: int, seed: int = 1) -> Tensor:
    shape = (2, channels, *description_of(model).dummy_grid(model))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(model: ModelMixin, z: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return first_tensor(model(**dummy_arguments(model, z, generator)))


def split(model: ModelMixin, prediction: Tensor) -> tuple[Tensor, Tensor]:
    d = description_of(model).fitted(model, LAYOUT.channels)
    sizes = d.resolve_sizes(model)
    return split_axis(prediction, d.sample_axis, d.sample_pattern, sizes, LAYOUT, name="sample")


def test_no_class_of_diffusers_is_forgotten() -> None:
    transformers = {
        name
        for name in dir(diffusers)
        if "Transformer" in name and not name.endswith(("Mixin", "Output", "Pipeline"))
        if isinstance(cls := getattr(diffusers, name), type) and issubclass(cls, ModelMixin)
        if cls.__module__.startswith("diffusers.models.transformers")
    }
    assert transformers - SMALL_TRANSFORMERS.keys() - EXCLUDED_TRANSFORMERS.keys() == set()
    assert not SMALL_TRANSFORMERS.keys() & EXCLUDED_TRANSFORMERS.keys()


@pytest.mark.parametrize("name", SMALL_TRANSFORMERS)
def test_widened_saved_and_loaded(name: str, tmp_path) -> None:
    model = SMALL_TRANSFORMERS[name]()
    widened = widen_channels(model, base_channels=LAYOUT.base_channels, detail_channels=6)
    assert type(widened) is type(model)
    report = check_warm_start(model, widened, LAYOUT)
    assert report.max_base_difference <= 1e-5
    assert report.max_base_difference_random <= 1e-5
    assert report.max_detail_output == 0

    # The same without the self-check's machinery: other inputs, another seed.
    z, z_d = latent(model, 4), latent(model, 6, seed=2)
    expected, prediction = predict(model, z), predict(widened, LAYOUT.join(z, 10 * z_d))
    base, detail = split(widened, prediction)
    assert expected.std() > 1e-3
    assert (base - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert detail.count_nonzero() == 0

    masks = new_channel_masks(widened, LAYOUT)
    assert list(masks) == channel_parameters(widened) != []
    assert all(torch.equal(mask, widened.get_parameter(n) == 0) for n, mask in masks.items())

    widened.save_pretrained(tmp_path)
    loaded = type(widened).from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.state_dict().values(), widened.state_dict().values()))
    again, before = (predict(m, LAYOUT.join(z, z_d)) for m in (loaded, widened))
    assert (again - before).abs().max() <= 1e-6 * before.abs().max()  # memory is laid out anew


@pytest.mark.parametrize("name", SMALL_TRANSFORMERS)
def test_details_reach_the_prediction_once_trained(name: str) -> None:
    # The new weights sit where the details are: filled, they move both base and detail outputs.
    model = SMALL_TRANSFORMERS[name]()
    widened = widen_channels(model, base_channels=LAYOUT.base_channels, detail_channels=6)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter, mask in new_channel_masks(widened, LAYOUT).items():
            weight = widened.get_parameter(parameter)
            weight[mask] = torch.randn(int(mask.sum()), generator=generator)
    z, z_d = latent(model, 4), latent(model, 6, seed=2)
    base, detail = split(widened, predict(widened, LAYOUT.join(z, z_d)))
    moved, _ = split(widened, predict(widened, LAYOUT.join(z, -z_d)))
    assert (base - moved).abs().max() > 1e-4
    assert detail.std() > 1e-3


#: diffusers 0.42 calls its checkpointing function with keywords that this function does not take.
_CHECKPOINTING_FAILS = {"HunyuanImageTransformer2DModel"}


@pytest.mark.parametrize("name", SMALL_TRANSFORMERS)
def test_adapters_and_checkpointing_after_widening(name: str) -> None:
    model = SMALL_TRANSFORMERS[name]()
    if model._supports_gradient_checkpointing and name not in _CHECKPOINTING_FAILS:
        model.enable_gradient_checkpointing()
    widened = widen_channels(model, base_channels=LAYOUT.base_channels, detail_channels=6)
    assert widened.is_gradient_checkpointing == model.is_gradient_checkpointing
    z = LAYOUT.join(latent(model, 4), latent(model, 6, seed=2))
    before, layers = predict(widened, z), {n.rpartition(".")[0] for n in channel_parameters(widened)}
    if hasattr(widened, "add_adapter"):
        linear = [n for n, m in widened.named_modules() if isinstance(m, nn.Linear) and n not in layers]
        attention = [n for n in linear if re.search(r"to_q|to_out|qkv|attention|attn|self_attention", n)]
        widened.add_adapter(LoraConfig(r=2, target_modules=attention[:4]))
        assert (predict(widened, z) - before).abs().max() <= 1e-5 * before.abs().max()
    for parameter in new_channel_masks(widened, LAYOUT):  # the widened layers are trained beside the adapter
        widened.get_parameter(parameter).requires_grad_(True)
    arguments = dummy_arguments(widened, z, torch.Generator().manual_seed(3))
    first_tensor(widened.train()(**arguments)).square().mean().backward()
    learnt = {
        parameter: widened.get_parameter(parameter).grad
        for parameter, mask in new_channel_masks(widened, LAYOUT).items()
        if parameter.endswith(".weight") and mask.ndim > 1
    }
    assert any(gradient is not None for gradient in learnt.values())
    for parameter, gradient in learnt.items():
        assert gradient is None or gradient.abs().max() > 0, parameter


#: On the meta device their forwards need values: routing, masks or lengths decide shapes there.
_NEEDS_VALUES = {
    "ErnieImageTransformer2DModel",  # autocast is not made for that device
    "HiDreamImageTransformer2DModel",
    "Ideogram4Transformer2DModel",  # autocast
    "NucleusMoEImageTransformer2DModel",
    "OmniGenTransformer2DModel",
    "QwenImage21Transformer2DModel",
}


@pytest.mark.parametrize("name", sorted(SMALL_TRANSFORMERS.keys() - _NEEDS_VALUES))
def test_dummy_arguments_on_the_meta_device(name: str) -> None:
    model = SMALL_TRANSFORMERS[name]()
    description = description_of(model)
    height, width = description.dummy_grid(model)
    with torch.device("meta"):
        ghost = type(model).from_config(model.config)
    z = torch.empty(1, SMALL_CHANNELS, 2 * height, 2 * width, device="meta")
    arguments = dummy_arguments(ghost, z, torch.Generator(), text_tokens=24)
    with torch.no_grad():
        sample = first_tensor(ghost(**arguments))
    assert sample.is_meta
    assert sample.numel() % z.numel() == 0  # means, or means and variances


def test_text_length_is_followed() -> None:
    model = SMALL_TRANSFORMERS["SD3Transformer2DModel"]()
    arguments = dummy_arguments(model, latent(model, 4), torch.Generator(), text_tokens=13)
    assert arguments["encoder_hidden_states"].shape[1] == 13


def test_weights_come_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, second = (small_transformer("FluxTransformer2DModel", seed=s) for s in (0, 0))
    other = small_transformer("FluxTransformer2DModel", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)
    assert all(p.count_nonzero() for p in first.parameters())


def test_the_page_lists_every_class() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    assert "davae doctor --transformers" in page
    rows = {line.split("|")[1].strip().strip("`"): line for line in page.splitlines() if line.startswith("| `")}
    assert rows.keys() == SMALL_TRANSFORMERS.keys() | EXCLUDED_TRANSFORMERS.keys()
    for name, make in SMALL_TRANSFORMERS.items():
        model = make()
        layers = {place.layer for place in description_of(model).places}
        assert all(f"`{layer}`" in rows[name] for layer in layers), name


@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "ZImageTransformer2DModel", "Kandinsky5Transformer3DModel"])
def test_a_row_of_the_table_is_the_one_on_the_page(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    message, difference, _ = transformer_row(name).rsplit("|", 2)
    assert f"{message}|" in page
    assert float(difference) <= 1e-5


class TestVariants:
    """One class, several ways to count its latent."""

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("SD3Transformer2DModel", {"in_channels": 9}),  # latent, mask, masked latent
            ("FluxTransformer2DModel", {"in_channels": 32, "out_channels": 16}),  # a control latent beside it
            ("FluxTransformer2DModel", {"in_channels": 4}),  # not packed
            ("CogView4Transformer2DModel", {"in_channels": 8}),
            ("HunyuanImageTransformer2DModel", {"in_channels": 8}),
            ("HunyuanImageTransformer2DModel", {"patch_size": (1, 2, 2), "rope_axes_dim": (4, 4, 4)}),
            ("DiTTransformer2DModel", {"out_channels": None}),
            ("PixArtTransformer2DModel", {"out_channels": 4}),
            ("HunyuanDiT2DModel", {"learn_sigma": False}),
            ("LuminaNextDiT2DModel", {"learn_sigma": False}),
            ("PRXTransformer2DModel", {"bottleneck_size": None}),
            ("ZImageTransformer2DModel", {"all_patch_size": (2,), "all_f_patch_size": (1,)}),
            ("ErnieImageTransformer2DModel", {"in_channels": 4, "out_channels": 4, "patch_size": 2}),
            ("Kandinsky5Transformer3DModel", {"visual_cond": False}),
            ("Ideogram4Transformer2DModel", {"in_channels": 4}),
        ],
        ids=str,
    )
    def test_widened(self, name: str, changes: dict) -> None:
        model = small_transformer(name, **changes)
        widened = widen_channels(model, base_channels=LAYOUT.base_channels, detail_channels=6)
        report = check_warm_start(model, widened, LAYOUT)
        assert report.max_base_difference_random <= 1e-5
        assert report.max_detail_output == 0
