"""Bases that compress 16 times already: VA-VAE's kind and Qwen-Image 2.1's, upgraded to 32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)

from davae.bases.debug_pipelines import call_arguments, small_pipeline
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline


class NoProcessor:
    """Stands where the processor is: embeddings are given instead of prompts."""

    class tokenizer:
        """Its marks are asked for when the pipeline is built."""

        @staticmethod
        def encode(text: str) -> list[int]:
            return [1]

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


@torch.no_grad()
def test_an_autoencoder_kl_of_five_levels() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()
    base = small_pipeline("sd3")
    base = type(base)(**{**base.components, "vae": vae})
    upgraded = upgrade_pipeline(base, AutoencoderDA.from_base(vae, detail_channels=8))
    assert (base.vae_scale_factor, upgraded.vae_scale_factor) == (16, 32)
    arguments = call_arguments("sd3") | {"height": 256, "width": 256}
    assert upgraded(**arguments).images.shape == (1, 3, 256, 256)


def qwen21() -> QwenImage21Pipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=3,
        context_in_dim=24,
        mlp_ratio=2,
        axes_dims_rope=(4, 4, 4),
    )
    dynamic = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192}
    pipe = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=vae.eval(),
        text_encoder=None,
        processor=NoProcessor(),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [2, 4])
@torch.no_grad()
def test_qwen_image_2_1(scale: int) -> None:
    base = qwen21()
    vae = AutoencoderDA.from_base(base.vae, scale=scale, detail_channels=8)
    upgraded = upgrade_pipeline(base, vae)
    assert (base.vae_scale_factor, upgraded.vae_scale_factor) == (16, 16 * scale)
    assert upgraded.image_processor.config.vae_scale_factor == 16 * scale
    assert upgraded.latent_channels == 12
    wide = torch.randn(1, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    prompt = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))

    def run(pipe: Any, channels: int, side: int, output: str) -> torch.Tensor:
        noise = wide[:, :channels].flatten(2).transpose(1, 2)  # one token a latent position
        return pipe(
            prompt_embeds=prompt,
            latents=noise,
            height=side,
            width=side,
            num_inference_steps=3,
            output_type=output,
            true_cfg_scale=1.0,
        ).images

    expected = run(base, 4, 64, "pt")[:, :3]  # without opacity
    latents = run(upgraded, 12, 64 * scale, "latent").transpose(1, 2).unflatten(2, (4, 4))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    found = (vae.decode_base(latents * std + mean) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert run(upgraded, 12, 64 * scale, "pt").shape == (1, 3, 64 * scale, 64 * scale)
