from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor, nn

from davae.bases.debug_transformers import small_transformer
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models.lightningdit import LightningDiTTransformer2DModel
from davae.warm_start import WarmStartError, check_warm_start, structured_loss, widen_channels
from tests.warm_start.models import VARIANTS, lightningdit, predict, randomise, sd3

LAYOUT = LatentLayout(4, 12)
GRIDS = [(8, 8), (4, 12)]  # square and not


def widen(model: nn.Module) -> nn.Module:
    return widen_channels(model, base_channels=4, detail_channels=12)


def latent(channels: int, grid: tuple[int, int] = (8, 8), seed: int = 1) -> Tensor:
    return torch.randn(2, channels, *grid, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_step_zero_is_the_original(variant: str, grid: tuple[int, int]) -> None:
    model = randomise(VARIANTS[variant]())
    widened = widen(model)
    z = latent(4, grid)
    with torch.no_grad():
        expected = predict(model, z)
        assert expected.std() > 0.1  # the model says something
        for scale in (0.0, 1.0, 1e3):
            prediction = predict(widened, LAYOUT.join(z, scale * latent(12, grid, seed=2)))
            base, detail = LAYOUT.split(prediction)
            assert (base - expected).abs().max() <= 1e-6 * expected.abs().max()
            assert detail.count_nonzero() == 0


def test_counts_of_the_new_configuration() -> None:
    widened = widen(sd3())
    assert type(widened) is SD3Transformer2DModel
    assert (widened.config.in_channels, widened.config.out_channels, widened.out_channels) == (16, 16, 16)
    following = widen(lightningdit())  # its out_channels is None and follows in_channels
    assert (following.config.in_channels, following.config.out_channels, following.out_channels) == (
        16,
        None,
        16,
    )


def test_original_and_random_state_are_untouched() -> None:
    model = randomise(sd3())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, state = dict(model.config), torch.get_rng_state()
    widened = widen(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(model.config) == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # the two share no memory
        for tensor in (*widened.parameters(), *widened.buffers()):
            tensor.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_constructor_that_draws_leaves_the_random_state_alone() -> None:
    class Drawing(LightningDiTTransformer2DModel):
        def _initialise(self) -> None:
            self.register = nn.Parameter(torch.randn(3))
            super()._initialise()

    model = randomise(Drawing.from_config(dict(lightningdit().config)))
    state = torch.get_rng_state()
    assert torch.equal(widen(model).register, model.register)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [lightningdit, sd3])
def test_modes_survive(make: type) -> None:
    model = randomise(make()).train()
    model.transformer_blocks[1].eval()
    model.enable_gradient_checkpointing()
    model.requires_grad_(False)
    model.transformer_blocks[0].requires_grad_(True)
    widened = widen(model)
    assert widened.is_gradient_checkpointing
    for name, module in model.named_modules():
        assert widened.get_submodule(name).training == module.training, name
    for name, parameter in model.named_parameters():
        assert widened.get_parameter(name).requires_grad == parameter.requires_grad, name
    predict(widened, latent(16)).square().mean().backward()  # through the checkpointed blocks
    assert widened.transformer_blocks[0].norm1 is not model.transformer_blocks[0].norm1


def test_attention_processors_survive() -> None:
    class Marked(JointAttnProcessor2_0):
        pass

    model = randomise(sd3())
    model.set_attn_processor(Marked())
    model.enable_forward_chunking(2, 1)
    widened = widen(model)
    assert {type(p) for p in widened.attn_processors.values()} == {Marked}
    assert not {id(p) for p in widened.attn_processors.values()} & {id(p) for p in model.attn_processors.values()}
    assert widened.transformer_blocks[0]._chunk_size == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", ["lightningdit-p2-qknorm", "sd3-dual-qknorm"])
def test_dtypes(variant: str, dtype: torch.dtype) -> None:
    model = randomise(VARIANTS[variant]()).to(dtype)
    widened = widen(model)
    assert {p.dtype for p in widened.parameters()} == {dtype}
    z, z_d = latent(4).to(dtype), latent(12, seed=2).to(dtype)
    with torch.no_grad():
        expected = predict(model, z)
        base, detail = LAYOUT.split(predict(widened, LAYOUT.join(z, z_d)))
    assert (base - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert detail.count_nonzero() == 0


@pytest.mark.parametrize("variant", ["lightningdit-p2", "sd3-dual-qknorm"])
def test_saved_and_loaded(variant: str, tmp_path) -> None:
    widened = widen(randomise(VARIANTS[variant]()))
    widened.save_pretrained(tmp_path)
    loaded = type(widened).from_pretrained(tmp_path)
    x = latent(16)
    with torch.no_grad():
        assert torch.equal(predict(loaded, x), predict(widened, x))
    assert loaded.config.in_channels == 16


@pytest.mark.parametrize("make", [lightningdit, sd3])
def test_lora_on_the_widened_model(make: type) -> None:
    widened = widen(randomise(make()))
    x = latent(16)
    before = predict(widened, x).detach()
    widened.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert (predict(widened, x) - before).abs().max() < 1e-6  # LoRA's B starts at zero
    predict(widened, x).square().mean().backward()
    trained = [name for name, p in widened.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("variant", ["lightningdit-p2", "sd3"])
def test_where_the_gradient_reaches_at_step_zero(variant: str, weight: float) -> None:
    # New input weights learn from the base loss at once: the base head is not zero, and the details they read
    # may help it. The new head learns only when its loss counts.
    widened = widen(randomise(VARIANTS[variant]()))
    structured_loss(predict(widened, latent(16)), latent(16, seed=3), LAYOUT, weight).backward()
    embedder = widened.pos_embed.proj if variant == "sd3" else widened.patch_embed
    new_input = embedder.weight.grad[:, LAYOUT.detail]
    base_head, new_head = widened.proj_out.weight.grad.unflatten(0, (4, 16)).split([4, 12], dim=1)
    assert new_input.abs().amax((0, 2, 3)).min() > 0  # every new channel
    assert base_head.abs().max() > 0
    assert (new_head.abs().max() > 0) == (weight > 0)


def test_a_subclass_is_known() -> None:
    class Custom(SD3Transformer2DModel):
        pass

    config = dict(sd3().config)
    widened = widen(randomise(Custom.from_config(config)))
    assert type(widened) is Custom


class TestRefusals:
    def test_channel_counts_name_both_numbers(self) -> None:
        with pytest.raises(WarmStartError, match=r"in_channels = 4.*has 16 channels"):
            widen_channels(sd3(), base_channels=16, detail_channels=16)

    def test_output_counts_name_both_numbers(self) -> None:
        with pytest.raises(WarmStartError, match=r"out_channels = 8.*has 4 channels"):
            widen(sd3(out_channels=8))

    def test_unknown_class(self) -> None:
        unet = UNet2DConditionModel(
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            layers_per_block=1,
        )
        with pytest.raises(WarmStartError, match=r"UNet2DConditionModel.*describe\('UNet2DConditionModel'"):
            widen(unet)

    def test_weights_that_are_not_loaded(self) -> None:
        with torch.device("meta"):
            model = lightningdit()
        with pytest.raises(WarmStartError, match=r"patch_embed\.weight has no values"):
            widen(model)

    @pytest.mark.parametrize("make", [lightningdit, sd3])
    def test_adapters(self, make: type) -> None:
        model = make()
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(WarmStartError, match=r"attn.to_q.*remove adapters"):
            widen(model)

    def test_fused_projections(self) -> None:
        model = sd3()
        model.fuse_qkv_projections()
        with pytest.raises(WarmStartError, match=r"to_qkv"):
            widen(model)

    def test_a_model_that_cannot_be_run(self) -> None:
        """Texts are projected to a width that the cross attention does not take."""
        with pytest.raises(WarmStartError, match=r"this PixArtTransformer2DModel cannot be run .*RuntimeError"):
            widen(pixart(caption_channels=8))

    @pytest.mark.parametrize("make", [lightningdit, sd3])
    def test_a_forward_that_fails(self, make: type) -> None:
        class Broken(type(make())):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return {}["nothing"]

        model = make()
        with pytest.raises(WarmStartError, match=r"this Broken cannot be run .*KeyError"):
            widen(Broken.from_config(dict(model.config)))

    def test_no_detail_channels(self) -> None:
        with pytest.raises(DavaeError, match="detail_channels"):
            widen_channels(lightningdit(), base_channels=4, detail_channels=0)


def pixart(**changes: Any) -> PixArtTransformer2DModel:
    """As in diffusers' own tests: texts go to the cross attention as they are, without a projection."""
    config = {"sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3}
    config |= {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 8, "norm_num_groups": 1}
    config |= {"use_additional_conditions": False, "caption_channels": None}
    return randomise(PixArtTransformer2DModel(**config | changes))


def test_a_pixart_without_a_projection_of_its_texts() -> None:
    assert widen(pixart()).config.in_channels == 16


def test_memory_that_was_never_written_is_copied_as_it_is() -> None:
    """LuminaNext's pad token is made with torch.empty: whatever it holds, not-a-number too, is equal to itself."""
    model = small_transformer("LuminaNextDiT2DModel")
    assert model.pad_token.requires_grad
    with torch.no_grad():
        model.pad_token[0] = float("nan")
    widened = widen(model)
    assert torch.equal(widened.pad_token.isnan(), model.pad_token.isnan())
    with torch.no_grad():
        widened.pad_token[0] = 0.0
    with pytest.raises(WarmStartError, match="pad_token differ"):
        check_warm_start(model, widened, LAYOUT)


def test_hooks_of_the_class_itself_are_no_obstacle() -> None:
    class Hooked(LightningDiTTransformer2DModel):
        def _initialise(self) -> None:
            super()._initialise()
            self.register_forward_hook(lambda *_: None)

    model = randomise(Hooked.from_config(dict(lightningdit().config)))
    assert len(widen(model)._forward_hooks) == 1
    model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(WarmStartError, match=r"a hook on itself.*remove\(\)"):
        widen(model)


def test_a_new_model_with_a_zero_head_can_be_widened() -> None:
    model = LightningDiTTransformer2DModel(**dict(lightningdit().config))  # head and gates start at zero
    assert model.proj_out.weight.count_nonzero() == 0
    assert widen(model).proj_out.out_features == 16
