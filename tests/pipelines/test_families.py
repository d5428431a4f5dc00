"""Every family against its own pipeline: prompts, prediction, latents, shift."""

import inspect
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tests.pipelines.parts import without_encoders

import davae
from davae.bases.debug_pipelines import SMALL_PIPELINES, call_arguments, small_pipeline
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families import (
    PipelineFamily,
    family_of,
    find_family,
    register_family,
    registered_pipelines,
    scheduler_shift,
)
from davae.pipelines.families.family import _FAMILIES, pack, unpack

TRAINING_DOC, README = (
    (Path(__file__).parents[2] / page).read_text(encoding="utf-8") for page in ("docs/training.md", "README.md")
)
TEXT_PIPELINES = [name for name in SMALL_PIPELINES if name != "dit"]


@pytest.fixture(scope="module")
def pipelines():
    """Small pipelines, made once: of scale 1 the base, of scale 2 upgraded with details that are not silent."""
    made: dict[tuple[str, int], DiffusionPipeline] = {}

    def get(name, scale=1):
        if (name, scale) not in made:
            base = small_pipeline(name)
            made[name, 1] = base
            if scale > 1:
                torch.manual_seed(0)
                vae = AutoencoderDA.from_base(base.vae, scale=scale, detail_channels=8).eval()
                pipe = upgrade_pipeline(base, vae)
                for parameter in pipe.transformer.parameters():
                    parameter.data += 0.02 * torch.randn_like(parameter)
                made[name, scale] = pipe
        return made[name, scale]

    return get


def _recorded_steps(pipe, arguments):
    """What the pipeline hands to its scheduler: (prediction, timestep, latents) of every step."""
    found, step = [], pipe.scheduler.step

    def recording(prediction, timestep, sample, *args, **kwargs):
        found.append((prediction.clone(), timestep, sample.clone()))
        return step(prediction, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = recording
    try:
        pipe(**arguments, generator=torch.Generator().manual_seed(0))
    finally:
        del pipe.scheduler.step
    return found


def _no_guidance(name):
    if name == "qwenimage":
        return {"true_cfg_scale": 1.0}
    return {"guidance_scale": 3.5 if name == "flux" else 1.0}  # FLUX is told its guidance


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_predict_is_what_the_pipeline_steps_with(name, scale, pipelines):
    """Packing, ids, guidance, masks, sign and time: `predict` at a step equals what the scheduler is given."""
    pipe = pipelines(name, scale)
    family = family_of(pipe)
    arguments = (
        call_arguments(name, scale=scale) | _no_guidance(name) | {"output_type": "latent" if name != "dit" else "pt"}
    )
    steps = _recorded_steps(pipe, arguments)
    prompt = "class 17" if name == "dit" else arguments["prompt"]
    conditioning = family.encode_prompts(pipe, [prompt])
    assert steps
    for prediction, timestep, latents in steps:
        if family.packed:
            side = 2 * math.isqrt(latents.shape[1])
            prediction, latents = unpack(prediction, side, side), unpack(latents, side, side)
        level = torch.as_tensor(timestep).reshape(1)
        level = level / 1000 if family.kind == "flow" else level
        with torch.no_grad():
            ours = family.predict(pipe.transformer, latents, level, conditioning)
        assert ours.shape == latents.shape
        assert prediction.std() > 1e-3, "the comparison would prove nothing"
        torch.testing.assert_close(ours, prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_prompts_have_one_length_and_keep_their_order(name, pipelines):
    pipe = pipelines(name)
    family = family_of(pipe)
    prompts = ["a fox", "", "a very much longer text about a fox in the snow", ""]
    together = family.encode_prompts(pipe, prompts, max_length=64)
    for i, prompt in enumerate(prompts):
        alone = family.encode_prompts(pipe, [prompt], max_length=64)
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            assert value.shape[1:] == together[key].shape[1:]
            torch.testing.assert_close(together[key][i : i + 1], value, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together["prompt_embeds"][0], together["prompt_embeds"][2])


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "sana", "lumina2", "auraflow"])
def test_an_empty_prompt_is_the_unconditional_one_of_guidance(name, pipelines):
    """The first half of the batch that the pipeline runs under guidance (or its second call, in Lumina 2)."""
    pipe = pipelines(name)
    family = family_of(pipe)
    seen, forward = [], pipe.transformer.forward

    def recording(*args, **kwargs):
        seen.append(kwargs["encoder_hidden_states"].clone())
        return forward(*args, **kwargs)

    pipe.transformer.forward = recording
    try:
        pipe(**call_arguments(name) | {"guidance_scale": 2.0, "output_type": "latent"})
    finally:
        del pipe.transformer.forward
    unconditional = seen[1] if name == "lumina2" else seen[0][:1]
    ours = family.encode_prompts(pipe, [""])["prompt_embeds"]
    torch.testing.assert_close(ours, unconditional, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_latents_are_what_the_pipeline_decodes(name, pipelines):
    """The pipeline's own decoding of `latents_of` gives the autoencoder's reconstruction."""
    pipe = pipelines(name)
    family = family_of(pipe)
    side = 64 if name in ("sana", "lumina2") else 32
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = family.latents_of(pipe.vae, images)
    vae, config = pipe.vae, pipe.vae.config
    with torch.no_grad():
        if name == "qwenimage":
            video = images[:, :, None]
            expected = vae.decode(vae.encode(video).latent_dist.mode()).sample[:, :, 0]
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
            decoded = vae.decode((latent * std + mean)[:, :, None]).sample[:, :, 0]
        else:
            encoded = vae.encode(images)
            raw = encoded.latent if name == "sana" else encoded.latent_dist.mode()
            expected = vae.decode(raw).sample
            shift = config.shift_factor if name in ("sd3", "flux", "lumina2") else 0.0
            decoded = vae.decode(latent / config.scaling_factor + shift).sample
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_samples_are_the_pipelines_own(name, pipelines):
    pipe = pipelines(name)
    family = family_of(pipe)
    seeds = [torch.Generator().manual_seed(3)]
    arguments = call_arguments(name)
    if name == "dit":
        made = family.sample_labels(pipe, [17], num_inference_steps=2, guidance_scale=2.0, generators=seeds)
        arguments |= {"guidance_scale": 2.0, "class_labels": [17]}
    else:
        side = arguments["height"]
        settings = {"height": side, "width": side, "num_inference_steps": 2, "guidance_scale": 2.0}
        made = family.sample(pipe, [arguments["prompt"]], generators=seeds, **settings)
        key = "true_cfg_scale" if name == "qwenimage" else "guidance_scale"
        arguments |= {key: 2.0} | ({"negative_prompt": ""} if name == "qwenimage" else {})
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(3)).images
    torch.testing.assert_close((made + 1) / 2, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", sorted(set(SMALL_PIPELINES) - {"dit"}))
def test_samples_of_embeddings_need_no_text_encoders(name: str, guidance: float) -> None:
    pipe = small_pipeline(name)
    family = family_of(pipe)
    prompts = ["a fox", "a long red fox in the snow"]
    side = call_arguments(name)["height"]
    settings = {"height": side, "width": side, "num_inference_steps": 2, "guidance_scale": guidance}

    def made(**more: Any) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(3 + i) for i in range(2)]
        return family.sample(pipe, prompts, generators=seeds, **settings, **more)

    expected = made()
    encoded = family.encode_prompts(pipe, ["", *prompts])
    embeddings = {text: {k: v[i] for k, v in encoded.items()} for i, text in enumerate(["", *prompts])}
    for part in [part for part in pipe.components if part.startswith("text_encoder")]:
        pipe.register_modules(**{part: None})
    torch.testing.assert_close(made(embeddings=embeddings), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_base_channels_come_first_in_latents_and_predictions(name):
    """An upgraded pipeline: the base's latent of the small image and its prediction, then the details' zeros."""
    base = small_pipeline(name)
    family = family_of(base)
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8).eval()
    pipe = upgrade_pipeline(base, vae)
    side = 128 if name in ("sana", "lumina2") else 64
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = family.latents_of(vae, images)
    small = family.latents_of(base.vae, vae.reduce(images))
    torch.testing.assert_close(latent[:, :4], small, atol=1e-5, rtol=1e-5)

    prompts = ["class 3"] if name == "dit" else ["a fox"]
    conditioning = family.encode_prompts(base, prompts)
    level = torch.tensor([300]) if family.kind == "ddpm" else torch.tensor([0.3])
    noisy = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wide = family.predict(pipe.transformer, noisy, level, conditioning)
        narrow = family.predict(base.transformer, noisy[:, :4], level, conditioning)
    torch.testing.assert_close(wide[:, :4], narrow, atol=1e-5, rtol=1e-5)
    assert wide[:, 4:].abs().max() < 1e-12


def test_packing_inverts_and_agrees_with_the_pipelines():
    latent = torch.randn(2, 3, 4, 6)
    assert torch.equal(unpack(pack(latent), 4, 6), latent)
    assert torch.equal(pack(latent), diffusers.FluxPipeline._pack_latents(latent, 2, 3, 4, 6))
    with pytest.raises(DavaeError, match="3 x 4"):
        pack(torch.zeros(1, 1, 3, 4))


def test_shifts_follow_the_schedulers(pipelines):
    """FLUX: exp(0.63) at 1024 tokens and exp(1.15) at 4096; a fixed shift is read from the configuration."""
    flux = pipelines("flux").scheduler.config
    assert scheduler_shift(flux, 4096) == pytest.approx(math.exp(1.15))
    assert scheduler_shift(flux, 1024) == pytest.approx(math.exp(0.63))
    assert scheduler_shift(flux | {"time_shift_type": "linear"}, 4096) == pytest.approx(1.15)
    expected = {"sd3": 3.0, "sana": 3.0, "lumina2": 6.0, "auraflow": 1.73}
    for name, shift in expected.items():
        pipe = pipelines(name)
        assert family_of(pipe).timestep_shift(pipe, 100) == shift
    base = debug_base()
    assert family_of(base).timestep_shift(base, 16) == 1.0


def test_the_shift_is_the_schedulers_own(pipelines):
    """A uniform grid through the scheduler at this many tokens equals our shift of it."""
    pipe = pipelines("flux")
    mu = math.log(scheduler_shift(pipe.scheduler.config, 1024))
    grid = [0.9, 0.5, 0.2]
    pipe.scheduler.set_timesteps(sigmas=grid, mu=mu)
    shift = scheduler_shift(pipe.scheduler.config, 1024)
    ours = [shift * s / (1 + (shift - 1) * s) for s in grid]
    assert pipe.scheduler.sigmas[:3].tolist() == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3Pipeline"),
        ("FluxInpaintPipeline", "FluxPipeline"),
        ("QwenImageImg2ImgPipeline", "QwenImagePipeline"),
    ],
)
def test_image_to_image_pipelines_belong_to_their_family(name, family):
    assert family_of(getattr(diffusers, name)).name == family


def test_an_unknown_pipeline_is_named_with_its_nearest():
    with pytest.raises(DavaeError, match=r"FluxFillPipeline.*did you mean Flux.*register_family"):
        family_of(diffusers.FluxFillPipeline)


def test_a_family_can_be_added_and_a_class_has_one():
    class Mine(DiffusionPipeline):
        pass

    class MyFamily(PipelineFamily):
        pipelines = ("Mine",)
        lora_targets = ("to_q",)
        _encode = _predict = lambda *args: None

    ours = register_family(MyFamily())
    try:
        assert family_of(Mine) is ours
        with pytest.raises(DavaeError, match="already"):
            register_family(MyFamily())
    finally:
        del _FAMILIES["Mine"]


def _shift_in_words(pipe):
    """Where the training's shift comes from: two token counts and the scheduler's keys tell."""
    family, config = family_of(pipe), pipe.scheduler.config
    if family.kind == "ddpm" or family.timestep_shift(pipe, 256) == 1.0:
        return "none"
    if family.shift_reads_pixels:
        return "from the size in pixels"
    if family.timestep_shift(pipe, 256) != family.timestep_shift(pipe, 4096):
        return "from the token count"
    return "`flow_shift`" if config.get("flow_shift") else "`shift`"


def test_the_documented_table_says_what_the_families_say(pipelines):
    table = TRAINING_DOC.partition("### What is known about each family")[2].partition("\n\n|")[2]
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()[2:]]
    documented = {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    found = {}
    newer = [without_encoders(name)[0] for name in ("Flux2", "Krea2", "Chroma", "Ideogram4", "ZImage")]
    for pipe, options in zip(newer, [{"use_dynamic_shifting": True}] * 3 + [{}] + [{"shift": 3.0}]):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    for pipe in (debug_base(), *map(pipelines, SMALL_PIPELINES), *newer):
        family = family_of(pipe)
        objective = {"flow": "flow", "ddpm": "noise prediction"}[family.kind]
        targets = ", ".join(f"`{target}`" for target in family.lora_targets)
        found[family.name] = [objective, _shift_in_words(pipe), targets]
    for name in ("Flux2Pipeline", "Flux2KleinKVPipeline"):  # as klein
        assert family_of(name).lora_targets == family_of("Flux2KleinPipeline").lora_targets
        found[name] = found["Flux2KleinPipeline"]
    assert documented == found
    assert found.keys() == {family_of(name).name for name in registered_pipelines()}
    said = README.partition("| diffusion stage | ")[2].partition(" pipelines")[0].replace(" and ", ", ")
    short = {"Stable Diffusion 3, 3.5": "SD3", "FLUX.2 klein": "FLUX.2", "PixArt-Sigma": "PixArt-Σ"}
    titles = [row[0].partition(":")[0].removesuffix(" (classes)") for row in rows]
    assert set(filter(None, said.split(", "))) == {short.get(title, title) for title in titles}


def test_the_documented_example_of_a_family_works():
    text = TRAINING_DOC.partition("Another family is one class")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    pipeline = type("MyPipeline", (diffusers.FluxFillPipeline,), {})
    with pytest.raises(DavaeError, match="how to train a MyPipeline"):
        family_of(pipeline)
    try:
        names = {}
        exec(code, names)
        family = family_of(pipeline)
        assert type(family) is names["MyFamily"]
        assert (family.kind, family.sizes, family.shift_rule) == ("flow", "derived", None)
        assert family.lora_targets == ("to_q", "to_k", "to_v", "to_out.0")
        assert "MyPipeline" in registered_pipelines()
    finally:
        del _FAMILIES["MyPipeline"]


def test_every_named_class_is_one_and_prompts_have_the_pipelines_own_length():
    for name, family in _FAMILIES.items():
        pipeline = getattr(diffusers, name, None) or getattr(davae.pipelines, name)
        assert find_family(pipeline) is find_family(name) is family
        if name == family.name and family.trainable and family.conditioned_on == "text":
            default = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
            free = name == "Ideogram4Pipeline"  # padding is masked and nothing is cut: the length changes no image
            assert free or default is None or default.default == family.text_length, name


def test_classes_without_a_family_get_the_defaults_and_are_not_trained():
    family = find_family(diffusers.HunyuanDiTPipeline)
    assert find_family("NoSuchPipeline") is family
    assert (family.trainable, family.sizes, family.shift_rule, family.lora_targets) == (
        False,
        "derived",
        None,
        (),
    )
    assert find_family("HiDreamImagePipeline").shift_rule is not None
    with pytest.raises(DavaeError, match="how to train a HiDreamImagePipeline"):
        family_of("HiDreamImagePipeline")
    assert "HiDreamImagePipeline" not in registered_pipelines()


def test_an_upgraded_dit_keeps_its_class_names(tmp_path, pipelines):
    """Also on disk: diffusers itself forgets them there."""
    pipe = pipelines("dit", 2)
    assert pipe.labels == pipelines("dit").labels
    pipe.save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).labels == pipe.labels


def test_class_names_become_labels():
    base = debug_base()
    family = family_of(base)
    labels = family.encode_prompts(base, ["tree", ""])["class_labels"]
    assert labels.tolist() == [base.labels["tree"], base.transformer.null_label]
    with pytest.raises(DavaeError, match="zebra"):
        family.encode_prompts(base, ["zebra"])
