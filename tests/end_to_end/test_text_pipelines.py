"""Eight pipelines of diffusers, from a folder of captioned images to a tuned pipeline that opens again."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from davae.bases.debug_pipelines import SMALL_PIPELINES, base_resolution, call_arguments
from davae.bases.open import load_base
from davae.data import CLASSES, render_scene
from davae.models import AutoencoderDA
from davae.pipelines import load_adapters, load_pipeline
from davae.pipelines.families import family_of
from davae.recipes.read import load_recipe
from davae.training.checkpoints.checkpoint import checkpoints
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.runs.train import train_diffusion

SCALE = 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten procedural scenes with a caption in a text file beside each."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(10):
        Image.fromarray(render_scene(i, i, 128)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of a {CLASSES[i]}")
    return folder


def _train(name, photos, out, *overrides):
    base = load_base(f"debug-{name}")
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=SCALE, detail_channels=8)
    vae.save_pretrained(out / "vae")
    recipe = load_recipe(
        "debug-text",
        [
            f"base=debug-{name}",
            f"data.path={photos}",
            f"data.resolution={SCALE * base_resolution(name)}",
            "data.hold_out=2",
            "diffusion.loop.steps=2",
            "diffusion.loop.validation_images=1",
            *overrides,
        ],
    )
    return base, train_diffusion(recipe, out / "run", out / "vae")


def _image_and_tokens(name, pipe, scale):
    """A picture from seed 3, and the tokens that the transformer saw."""
    seen, forward = [], pipe.transformer.forward
    packed = family_of(pipe).packed

    def recording(*args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        patch = pipe.transformer.config.patch_size
        seen.append(hidden.shape[1] if packed else math.prod(hidden.shape[-2:]) // patch**2)
        return forward(*args, **kwargs)

    pipe.transformer.forward = recording
    pipe.set_progress_bar_config(disable=True)
    try:
        arguments = call_arguments(name, scale=scale)
        images = pipe(**arguments, generator=torch.Generator().manual_seed(3)).images
    finally:
        del pipe.transformer.forward
    assert len(set(seen)) == 1
    return images, seen[0]


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_a_pipeline_is_tuned_saved_and_opened(name, photos, tmp_path):
    text = name != "dit"
    mode = [] if text else ["diffusion.tune.mode=new_channels"]
    base, result = _train(name, photos, tmp_path, *mode)
    assert all(math.isfinite(v) for v in result.metrics.values())
    assert "held_out_total" in result.metrics

    pipe = load_pipeline(result.result)
    assert type(pipe) is type(base)
    assert not any("lora" in key for key in pipe.transformer.state_dict())
    image, tokens = _image_and_tokens(name, pipe, SCALE)
    again, _ = _image_and_tokens(name, pipe, SCALE)
    assert torch.equal(image, again)

    small, base_tokens = _image_and_tokens(name, base, 1)
    assert image.shape[-2:] == tuple(SCALE * side for side in small.shape[-2:])
    assert tokens == base_tokens

    vae = AutoencoderDA.from_pretrained(tmp_path / "vae")
    adapted = load_adapters(load_base(f"debug-{name}"), vae, tmp_path / "run" / "adapters")
    unmerged, _ = _image_and_tokens(name, adapted, SCALE)
    torch.testing.assert_close(unmerged, image, atol=2e-4, rtol=0)


def test_the_contact_sheet_shows_now_and_base(photos, tmp_path):
    _, result = _train("auraflow", photos, tmp_path, "diffusion.loop.validation_images=3")
    sheet = Image.open(result.out / "samples" / "step-2.png")
    assert sheet.text["Rows"] == "samples 0 | base"
    side = SCALE * base_resolution("auraflow")
    assert sheet.width >= 3 * side
    assert sheet.height >= 2 * side
    prompts = (result.out / "samples" / "prompts.txt").read_text().splitlines()
    assert len(prompts) == 2, "captions of the held-out images"
    assert all(prompt.startswith("a picture of a ") for prompt in prompts)


def test_a_base_folder_with_frozen_weights_in_bfloat16(photos, tmp_path):
    load_base("debug-sd3").save_pretrained(tmp_path / "base")
    overrides = ["diffusion.tune.frozen_dtype=bfloat16", "diffusion.loop.precision=bf16"]
    _, result = _train("sd3", photos, tmp_path, f"base={tmp_path / 'base'}", *overrides)
    assert math.isfinite(result.metrics["held_out_total"])
    file = result.result / "transformer" / "diffusion_pytorch_model.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}
    pipe = load_pipeline(result.result, dtype=torch.bfloat16)
    image, _ = _image_and_tokens("sd3", pipe, SCALE)
    assert image.isfinite().all()


def test_a_text_run_stopped_and_continued_equals_an_undisturbed_one(photos, tmp_path, monkeypatch):
    from davae.training.diffusion import train as run_module

    loop = ["diffusion.loop.steps=4", "diffusion.loop.checkpoint_every=1", "diffusion.prompts.dropout=0.5"]
    _, whole = _train("sd3", photos, tmp_path / "whole", *loop)
    train = run_module.train
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "train", lambda *args: train(*args, stop_after=2))
        with pytest.raises(AssertionError):  # an interrupted run has no result
            _train("sd3", photos, tmp_path / "halves", *loop)
    halves = tmp_path / "halves" / "run"
    assert [path.name for path in checkpoints(halves / "checkpoints")][-1] == "step-2"
    assert not (halves / "pipeline").exists()
    _, continued = _train("sd3", photos, tmp_path / "halves", *loop)
    assert read_metrics(continued.out / "metrics.jsonl") == read_metrics(whole.out / "metrics.jsonl")
    ours, theirs = (DiffusionPipeline.from_pretrained(r.result).transformer.state_dict() for r in (continued, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
