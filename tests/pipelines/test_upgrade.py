"""Every small pipeline upgraded: sizes, tokens, derived attributes, what is shared and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, PixArtSigmaPipeline, SanaPipeline
from tests.pipelines.upgrades import DETAILS, autoencoder, base_and_upgraded
from torch import Tensor, nn

from davae.bases.debug_pipelines import SMALL_PIPELINES, call_arguments, small_pipeline
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import fit_to_autoencoder, load_pipeline, upgrade_pipeline
from davae.warm_start import WarmStartError

FACTORS = {"sd3": 4, "flux": 4, "pixart-sigma": 8, "sana": 32, "qwenimage": 4, "lumina2": 8, "auraflow": 4}


class Stop(Exception):
    pass


@contextmanager
def tokens_seen(pipe: DiffusionPipeline, *, stop: bool = False) -> Iterator[set[int]]:
    """Lengths of the image sequences that the pipeline's token embedding makes."""
    seen: set[int] = set()

    def record(module: nn.Module, args: Any, output: Any) -> None:
        seen.add(output.shape[1] if output.ndim == 3 else output[0].shape[1])
        if stop:
            raise Stop

    embedding = next(
        getattr(pipe.transformer, name)
        for name in ("pos_embed", "x_embedder", "patch_embed", "img_in")
        if isinstance(getattr(pipe.transformer, name, None), nn.Module)
        and any(True for _ in getattr(pipe.transformer, name).parameters())
    )
    handle = embedding.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_output_is_s_times_larger_from_the_same_tokens(name: str, scale: int) -> None:
    base, upgraded = base_and_upgraded(name, scale)
    assert type(upgraded) is type(base)
    shapes = []
    for pipe, factor in ((base, 1), (upgraded, scale)):
        with tokens_seen(pipe) as tokens:
            image = torch.as_tensor(pipe(**call_arguments(name, scale=factor)).images)
        assert image.isfinite().all()
        shapes.append((tokens, image.shape[-1]))
    (base_tokens, base_side), (tokens, side) = shapes
    assert side == scale * base_side
    assert len(base_tokens) == 1
    assert tokens == base_tokens


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_components_are_shared_and_the_base_is_untouched(name: str) -> None:
    base = small_pipeline(name)
    before = {n: p.clone() for n, p in base.transformer.named_parameters()}
    scheduler = dict(base.scheduler.config)
    upgraded = upgrade_pipeline(base, autoencoder(name), timestep_shift="base")
    for part, module in base.components.items():
        if part in ("vae", "transformer", "scheduler"):
            assert upgraded.components[part] is not module, part
        else:
            assert upgraded.components[part] is module, part
    assert type(upgraded.scheduler) is type(base.scheduler)
    assert dict(base.scheduler.config) == scheduler
    assert all(torch.equal(before[n], p) for n, p in base.transformer.named_parameters())
    assert upgraded.vae is autoencoder(name)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", list(FACTORS))
def test_derived_attributes(name: str, scale: int) -> None:
    base, upgraded = base_and_upgraded(name, scale)
    assert base.vae_scale_factor == FACTORS[name]
    assert upgraded.vae_scale_factor == scale * FACTORS[name]
    processors = {name: part for name, part in vars(base).items() if name.endswith("_processor")}
    assert processors or name == "dit"
    for attribute, processor in processors.items():
        found = getattr(upgraded, attribute).config.vae_scale_factor
        assert found == scale * processor.config.vae_scale_factor, attribute
    for attribute in ("default_sample_size", "tokenizer_max_length", "patch_size"):
        assert getattr(upgraded, attribute, None) == getattr(base, attribute, None), attribute
    if name == "lumina2":
        assert upgraded.default_image_size == scale * base.default_image_size


@pytest.mark.parametrize(("name", "side"), [("sd3", 32), ("flux", 512), ("lumina2", 64), ("qwenimage", 512)])
def test_a_call_without_a_size_makes_s_times_the_default(name: str, side: int) -> None:
    base, upgraded = base_and_upgraded(name)
    seen = []
    for pipe in (base, upgraded):
        arguments = {k: v for k, v in call_arguments(name).items() if k not in ("height", "width")}
        with tokens_seen(pipe, stop=True) as tokens, pytest.raises(Stop):
            pipe(**arguments)
        seen.append(tokens)
    assert seen[0] == seen[1] == {(side // base.vae_scale_factor // 2) ** 2}


@pytest.mark.parametrize(("name", "base_side"), [("pixart-sigma", 256), ("sana", 1024)])
def test_lists_of_sizes_are_in_base_resolution(name: str, base_side: int) -> None:
    base, upgraded = base_and_upgraded(name)
    seen = []
    for pipe, side in ((base, base_side), (upgraded, 2 * base_side)):
        arguments = call_arguments(name) | {
            "use_resolution_binning": True,
            "height": side,
            "width": side // 2,
        }
        with tokens_seen(pipe, stop=True) as tokens, pytest.raises(Stop):
            pipe(**arguments)
        seen.append(tokens)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["lumina2", "pixart-sigma"])
def test_what_constructors_cannot_know_is_mended_after_loading(name: str, tmp_path) -> None:
    _, upgraded = base_and_upgraded(name)
    upgraded.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert loaded.vae_scale_factor == upgraded.vae_scale_factor
    assert type(loaded.image_processor) is type(upgraded.image_processor)
    assert loaded.image_processor.config == upgraded.image_processor.config
    factor = loaded.vae_scale_factor
    assert fit_to_autoencoder(loaded) is loaded
    assert loaded.vae_scale_factor == factor


def test_ready_made_mappings_of_sizes() -> None:
    """The bins themselves: PixArt's for 256 and SANA's for 1024 pixels."""
    for name, cls, side in (("pixart-sigma", PixArtSigmaPipeline, 256), ("sana", SanaPipeline, 1024)):
        base, upgraded = base_and_upgraded(name, 4)
        assert isinstance(base, cls)
        ratios = {"0.5": [side // 2, side], "1.0": [side, side]}
        found = upgraded.image_processor.classify_height_width_bin(4 * side, 4 * side + 8, ratios)
        assert found == (4 * side, 4 * side)
        assert upgraded.image_processor.resize_and_crop_tensor(torch.zeros(1, 3, 8, 8), 4, 8).shape[-1] == 4


def test_qwen_statistics_leave_details_as_they_are() -> None:
    _, upgraded = base_and_upgraded("qwenimage")
    assert upgraded.vae.config.latents_mean[-DETAILS:] == [0.0] * DETAILS
    assert upgraded.vae.config.latents_std[-DETAILS:] == [1.0] * DETAILS


def test_another_vae_or_another_width_is_refused_with_both_numbers() -> None:
    flux, sd3 = small_pipeline("flux"), small_pipeline("sd3")
    with pytest.raises(DavaeError, match=r"made from another base VAE: .* differs from the pipeline's"):
        upgrade_pipeline(flux, AutoencoderDA.from_base(small_pipeline("sd3", seed=1).vae, detail_channels=8))
    wider = AutoencoderKL.from_config(sd3.vae.config, latent_channels=6)
    for pipe, channels in ((sd3, "4"), (flux, "16")):
        pipe.register_modules(vae=wider)
        with pytest.raises(WarmStartError, match=rf"{channels}.*6|6.*{channels}"):
            upgrade_pipeline(pipe, AutoencoderDA.from_base(wider, detail_channels=8))


def test_pipelines_without_a_transformer_are_refused() -> None:
    pipe = small_pipeline("sd3")
    pipe.register_modules(transformer=None)
    with pytest.raises(DavaeError, match="StableDiffusion3Pipeline has no transformer"):
        upgrade_pipeline(pipe, autoencoder("sd3"))
    with pytest.raises(DavaeError, match="takes an AutoencoderDA, not AutoencoderKL"):
        upgrade_pipeline(small_pipeline("sd3"), small_pipeline("sd3").vae)
    _, upgraded = base_and_upgraded("sd3")
    with pytest.raises(DavaeError, match="upgraded before"):
        upgrade_pipeline(upgraded, autoencoder("sd3"))


def test_details_take_part_once_they_have_weights() -> None:
    """The other tests see zeros: here the head speaks on detail channels, and the image follows."""
    _, upgraded = base_and_upgraded("flux")
    images: list[Tensor] = []
    for weight in (0.0, 0.5):
        torch.nn.init.constant_(upgraded.transformer.proj_out.bias, weight)
        generator = torch.Generator().manual_seed(0)
        images.append(torch.as_tensor(upgraded(**call_arguments("flux", scale=2), generator=generator).images))
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_the_guard_of_silent_details_stays_out_of_training() -> None:
    """Lumina 2 would divide 0 by 0; a gradient must see the prediction as it is."""
    _, upgraded = base_and_upgraded("lumina2")
    embeds, mask, _, _ = upgraded.encode_prompt("a fox", do_classifier_free_guidance=False)
    arguments = (torch.randn(1, 4 + DETAILS, 8, 8), torch.tensor([0.5]), embeds.detach(), mask)
    assert not upgraded.transformer(*arguments).sample[:, 4:].any()
    with torch.no_grad():
        silent = upgraded.transformer(*arguments).sample[:, 4:]
    assert silent.all()
    assert silent.abs().max() < 1e-12


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_without_details_the_base_s_own_samples_are_decoded_larger(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_pipeline(name)
    upgraded = upgrade_pipeline(base, autoencoder(name).without_details())
    assert upgraded.transformer is base.transformer
    decoded, sides = [], []
    for pipe, factor in ((base, 1), (upgraded, 2)):
        decode = pipe.vae.decode
        monkeypatch.setattr(pipe.vae, "decode", lambda z, *a, of=decode, **k: decoded.append(z) or of(z, *a, **k))
        arguments = call_arguments(name, scale=factor) | {"generator": torch.Generator().manual_seed(0)}
        image = torch.as_tensor(pipe(**arguments).images)
        assert image.isfinite().all()
        sides.append(max(image.shape[1:]))
    assert torch.equal(decoded[0], decoded[1])
    assert sides[1] == 2 * sides[0]
