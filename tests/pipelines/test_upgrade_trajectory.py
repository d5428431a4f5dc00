"""At step 0 the base channels of an upgraded pipeline follow the base pipeline: same noise, same image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.dit import pipeline_dit
from tests.pipelines.upgrades import base_and_upgraded, base_image, noises

from davae.bases.debug_pipelines import SMALL_PIPELINES, call_arguments

# What each pipeline calls guidance, and a value with it off and on.
GUIDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flux": (
        {"guidance_scale": 1.0},
        {"guidance_scale": 5.0, "true_cfg_scale": 3.0, "negative_prompt": "a car"},
    ),
    "qwenimage": ({"true_cfg_scale": 1.0}, {"true_cfg_scale": 4.0, "negative_prompt": "a car"}),
}
PLAIN: tuple[dict[str, Any], dict[str, Any]] = ({"guidance_scale": 1.0}, {"guidance_scale": 5.0})


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_base_channels_make_the_base_image(
    name: str, guided: bool, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, upgraded = base_and_upgraded(name, scale)
    further = GUIDED.get(name, PLAIN)[guided] | {"num_inference_steps": 4}
    base_noise, wide_noise = noises(name, upgraded)

    def run(pipe: Any, noise: torch.Tensor, scale: int, output_type: str) -> torch.Tensor:
        arguments = call_arguments(name, scale=scale) | further
        if name == "dit":  # it takes no latents and no output "latent": both ends are reached elsewhere
            monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: noise.clone())
            latents: list[torch.Tensor] = []
            decode = pipe.vae.decode
            monkeypatch.setattr(pipe.vae, "decode", lambda z: (latents.append(z), decode(z))[1])
            image = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
            scaled = latents[0] * pipe.vae.config.scaling_factor
            return scaled if output_type == "latent" else torch.as_tensor(image)
        arguments |= {"output_type": output_type, "generator": torch.Generator().manual_seed(0)}
        return torch.as_tensor(pipe(**arguments, latents=noise.clone()).images)

    expected = run(base, base_noise, 1, "pt")
    found = base_image(name, upgraded, run(upgraded, wide_noise, scale, "latent"))
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
