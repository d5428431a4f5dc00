"""The diffusion stage on pipelines with prompts: what is drawn, what learns, what is shown to whom."""

import math

import pytest
import torch
from tests.data.files import picture
from torch import nn

from davae.bases.debug_pipelines import SMALL_PIPELINES, base_resolution, small_pipeline
from davae.data import open_dataset
from davae.diffusion import FlowLoss, FlowProcess, sd3_sigma_table
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families import PipelineFamily, family_of
from davae.pipelines.saving.adapters import load_adapters
from davae.pipelines.saving.opening import load_pipeline
from davae.recipes.read import load_recipe
from davae.recipes.settings import FlowLossSettings, SigmaTableSettings, TimestepSettings
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.data import require_captions
from davae.training.diffusion import (
    DiffusionObjective,
    DiffusionStage,
    PromptEmbeddings,
    noise_process,
    select_trained,
)
from davae.training.diffusion.inputs import prepare_inputs
from davae.training.diffusion.train import set_sampling_shift
from davae.training.loop.loop import train
from davae.training.runs.train import train_diffusion
from davae.warm_start import channel_parameters

LAYOUT = LatentLayout(2, 4)
SETTINGS = FlowLossSettings()


def _upgraded(name):
    base = small_pipeline(name)
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    return upgrade_pipeline(base, vae)


def _parts(name, length=10):
    side = 2 * base_resolution(name)
    return (
        open_dataset(f"procedural:{length}", resolution=side),
        open_dataset("procedural", resolution=side, hold_out=2, part="held_out"),
    )


def _stage(name, *overrides, **options):
    recipe = load_recipe("debug-text", ["diffusion.loop.validation_images=1", *overrides])
    pipe = _upgraded(name)
    torch.manual_seed(1)
    inputs = prepare_inputs(pipe, pipe.vae, recipe.diffusion, *_parts(name), **options)
    return DiffusionStage(pipe, pipe.vae.layout, recipe.diffusion, inputs)


# What is drawn


def test_latents_in_memory_and_images_give_the_same_losses(tmp_path):
    """Over 20 steps to 1e-6: noise, levels and dropped prompts do not depend on where latents come from."""
    losses = []
    for cached in (True, False):
        overrides = ["diffusion.loop.steps=20", "diffusion.prompts.dropout=0.3"]
        train(_stage("sd3", *overrides, cache_latents=cached), tmp_path / str(cached), {})
        lines = read_metrics(tmp_path / str(cached) / "metrics.jsonl")
        losses.append([line["total"] for line in lines if "total" in line])
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


class _Told(PipelineFamily):
    """Keeps what it is told and predicts nothing."""

    pipelines = ("Told",)
    lora_targets = ()

    def __init__(self):
        self.seen = []

    def _encode(self, pipe, prompts, length, empty):
        raise NotImplementedError

    def _predict(self, transformer, noisy, level, conditioning, guidance):
        self.seen.append({k: v.clone() for k, v in conditioning.items()} | {"noisy": noisy.clone()})
        return torch.zeros_like(noisy)


def _summary(dropout):
    family = _Told()
    process = FlowProcess(FlowLoss(LAYOUT))
    unconditional = {"embeds": torch.full((1, 3, 5), -1.0), "mask": torch.zeros(1, 3, dtype=torch.long)}
    objective = DiffusionObjective(
        family, nn.Identity(), LAYOUT, process, SETTINGS, unconditional=unconditional, dropout=dropout
    )
    count = 2000
    batch = {
        "latent": torch.zeros(count, 6, 1, 1),
        "conditioning": {"embeds": torch.ones(count, 3, 5), "mask": torch.ones(count, 3, dtype=torch.long)},
    }
    return family, objective, batch


def test_a_share_of_prompts_is_dropped_whole_in_training_only():
    family, objective, batch = _summary(0.1)
    torch.manual_seed(0)
    objective.train()(batch, 0)
    objective.eval()(batch, 0)
    dropped = family.seen[0]["embeds"][:, 0, 0] == -1
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(family.seen[0]["mask"][:, 0] == 0, dropped), "mask and embeddings go together"
    assert (family.seen[0]["embeds"] == torch.where(dropped, -1.0, 1.0)[:, None, None]).all()
    assert (family.seen[1]["embeds"] == 1).all()


def test_dropping_prompts_changes_no_other_draw():
    noisy = []
    for dropout in (0.0, 0.5):
        family, objective, batch = _summary(dropout)
        torch.manual_seed(0)
        objective.train()(batch, 0)
        noisy.append(family.seen[0]["noisy"])
    assert torch.equal(*noisy)


def test_the_unconditional_prompt_stays_out_of_checkpoints():
    _, objective, _ = _summary(0.1)
    assert not objective.state_dict()


def test_levels_from_the_official_table_are_truncated_times():
    pipe, timesteps = small_pipeline("sd3"), TimestepSettings(table=SigmaTableSettings())
    process = noise_process(family_of(pipe), pipe, LAYOUT, SETTINGS, timesteps)
    sample = process.draw(torch.zeros(500, 6, 1, 1))
    table = sd3_sigma_table(3.0, 4.0)
    assert torch.isin(sample.sigma, table.sigmas).all()
    milli = sample.sigma_or_t * 1000
    torch.testing.assert_close(milli, milli.round(), atol=1e-3, rtol=0)
    behind = 1000 * (sample.sigma - sample.sigma_or_t)  # what truncation took, in thousandths
    assert behind.min() > -1e-3
    assert behind.max() < 1.001
    torch.testing.assert_close(sample.noisy, sample.sigma.view(-1, 1, 1, 1) * sample.noise)


def test_a_table_and_a_shift_exclude_each_other():
    with pytest.raises(DavaeError, match="exclude each other"):
        load_recipe("debug-text", ["diffusion.timesteps.shift=3", "diffusion.timesteps.table.train_shift=4"])


def test_noise_levels_follow_the_schedulers_shift_by_default():
    """FLUX at 64 tokens; a shift in the recipe wins."""
    pipe = small_pipeline("flux")
    family, latent = family_of(pipe), torch.zeros(4000, 12, 16, 16)
    process = noise_process(family, pipe, LatentLayout(4, 8), SETTINGS, TimestepSettings())
    mu = 0.5 + (1.15 - 0.5) * (64 - 256) / (4096 - 256)
    assert process.shift(latent) == pytest.approx(math.exp(mu))
    median = process.draw(latent).sigma.median()
    assert float(median) == pytest.approx(math.exp(mu) / (1 + math.exp(mu)), abs=0.02)
    fixed = noise_process(family, pipe, LatentLayout(4, 8), SETTINGS, TimestepSettings(shift=1.0))
    assert float(fixed.draw(latent).sigma.median()) == pytest.approx(0.5, abs=0.02)


# DDPM


def test_a_form_of_flow_matching_is_refused_where_noise_is_predicted():
    pipe = small_pipeline("dit")
    with pytest.raises(DavaeError, match="flow matching"):
        noise_process(family_of(pipe), pipe, LAYOUT, FlowLossSettings(form="x0"), TimestepSettings())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_learned_variance_learns_where_asked(weight):
    stage = _stage("pixart-sigma", "diffusion.tune.mode=full", f"diffusion.loss.variance_weight={weight}")
    batch = {k: stage.dataset[0][k] for k in ("latent", "conditioning")}
    batch = {
        "latent": batch["latent"][None],
        "conditioning": {k: v[None] for k, v in batch["conditioning"].items()},
    }
    stage.objective.train()(batch, 0)["total"].backward()
    head = stage.pipeline.transformer.proj_out
    per_output = head.weight.grad.unflatten(0, (2, 2, 24)).abs().sum((0, 1, 3))  # p p (noise, variance)
    assert ((per_output[12:16] > 0) == bool(weight)).all()
    assert (per_output[16:] == 0).all()  # of the details, whose loss has not begun at step 0
    assert (per_output[:4] > 0).all()


# What learns


@pytest.mark.parametrize("name", [n for n in SMALL_PIPELINES if n != "dit"])
def test_the_usual_targets_fit_and_leave_the_widened_layers_alone(name):
    pipe = _upgraded(name)
    settings = load_recipe("debug-text").diffusion
    widened = channel_parameters(pipe.transformer)
    rates = select_trained(pipe.transformer, family_of(pipe), pipe.vae.layout, settings)
    trained = {n for n, p in pipe.transformer.named_parameters() if p.requires_grad}
    lora = {n for n in trained if ".lora_" in n}
    assert trained - lora == set(widened)
    assert rates == dict.fromkeys(widened, settings.tune.new_channels_learning_rate)
    assert len(lora) >= 8
    for target in family_of(pipe).lora_targets:
        assert any(f".{target}.lora_A" in n for n in lora), target


def test_targets_that_name_the_patch_embedder_do_not_reach_it():
    """diffusers' PixArt example targets ``proj`` and ``proj_out``; here these are the widened layers."""
    pipe = _upgraded("pixart-sigma")
    settings = load_recipe("debug-text", ["diffusion.tune.lora.targets=[to_q, proj, proj_out]"]).diffusion
    select_trained(pipe.transformer, family_of(pipe), pipe.vae.layout, settings)
    names = [n for n, _ in pipe.transformer.named_parameters()]
    assert "pos_embed.proj.weight" in names
    assert "proj_out.weight" in names


def test_a_target_that_does_not_exist_is_named_with_its_nearest():
    with pytest.raises(DavaeError, match=r"named 'to_query'.*to_q"):
        _stage("sd3", "diffusion.tune.lora.targets=[to_query]")


def test_frozen_weights_in_bfloat16(tmp_path):
    """What learns stays in float32 and learns; the rest is bfloat16, in training and in the saved pipeline."""
    overrides = ["diffusion.tune.frozen_dtype=bfloat16", "diffusion.loop.precision=bf16"]
    stage = _stage("sd3", *overrides, "diffusion.loop.steps=2")
    named = dict(stage.pipeline.transformer.named_parameters())
    assert {p.dtype for p in named.values() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in named.values() if not p.requires_grad} == {torch.bfloat16}
    before = named["pos_embed.proj.weight"].detach().clone()
    result = train(stage, tmp_path, {})
    assert math.isfinite(result.metrics["held_out_total"])
    after = stage.pipeline.transformer.pos_embed.proj.weight
    assert not torch.equal(after, before.bfloat16())
    assert stage.pipeline.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["diffusion.tune.mode=full", "diffusion.loop.precision=bf16"], "needs frozen weights"),
        (["diffusion.loop.precision=no"], "needs loop.precision=bf16"),
    ],
)
def test_bfloat16_weights_need_what_they_need(overrides, words):
    with pytest.raises(DavaeError, match=words):
        load_recipe("debug-text", ["diffusion.tune.frozen_dtype=bfloat16", *overrides])


# Captions


def test_each_caption_is_encoded_once_and_as_alone():
    pipe = small_pipeline("sd3")
    family = family_of(pipe)
    asked, encode = [], family.encode_prompts

    def counting(pipe, prompts, **options):
        asked.extend(prompts)
        return encode(pipe, prompts, **options)

    family.encode_prompts = counting
    try:
        prompts = PromptEmbeddings(family, pipe, ["fox", "cat", "fox", ""], torch.device("cpu"), 16)
    finally:
        del family.encode_prompts
    assert asked == ["", "fox", "cat"]
    found = prompts.prepare({"caption": "cat"})["conditioning"]
    for name, value in family.encode_prompts(pipe, ["cat"], max_length=16).items():
        torch.testing.assert_close(found[name], value[0])
    empty = family.encode_prompts(pipe, [""], max_length=16)
    torch.testing.assert_close(prompts.unconditional, empty)


def test_images_without_any_caption_are_an_error(caplog):
    pipe = small_pipeline("sd3")
    with pytest.raises(DavaeError, match="none of the 2 images has one"):
        require_captions(["", ""], pipe)
    require_captions(["a fox", "", ""], pipe)
    assert "2 of 3 images have no caption" in caplog.text


def test_a_caption_that_came_later_is_named():
    pipe = small_pipeline("sd3")
    prompts = PromptEmbeddings(family_of(pipe), pipe, ["a fox"], torch.device("cpu"), 16)
    with pytest.raises(DavaeError, match=r"the caption of b\.png changed after the training had started: 'a dog'"):
        prompts.prepare({"id": "b.png", "caption": "a dog"})


def test_captions_stay_those_of_the_start(tmp_path):
    """Of a folder whose text files are edited while it is trained on."""
    picture(0, (40, 40)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a fox")
    data = open_dataset(tmp_path, resolution=32)
    assert data.captions() == ["a fox"]
    (tmp_path / "0.txt").write_text("a dog")
    assert data[0]["caption"] == "a fox"
    assert open_dataset(tmp_path, resolution=32)[0]["caption"] == "a dog"


def test_the_held_out_loss_is_the_same_twice_and_leaves_the_random_state(tmp_path):
    stage = _stage("auraflow", "diffusion.prompts.validation=[a red fox, a cat]")
    stage.objective.eval()
    torch.manual_seed(5)
    first, state = stage.validate(tmp_path, 1), torch.get_rng_state()
    assert first == stage.validate(tmp_path, 2)
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())
    assert stage.inputs.validation_prompts == ["a red fox", "a cat"]


@pytest.mark.parametrize(("cache_latents", "place"), [(True, "cpu"), (False, "cuda")])
def test_the_autoencoder_is_off_the_gpu_unless_images_are_encoded_as_they_come(cache_latents, place, monkeypatch):
    stage = _stage("auraflow", cache_latents=cache_latents)
    moves = []
    monkeypatch.setattr(stage.vae, "to", lambda device: moves.append(str(device)))
    stage.to(torch.device("cuda"))
    assert moves == [place]


def test_prompts_that_are_cut_are_counted(caplog):
    pipe = small_pipeline("sd3")
    prompts = ["a fox", "fox " * 400, ""]
    assert family_of(pipe).tell_cut_prompts(pipe, prompts, 16) == 1
    assert "1 of 3 prompts have more than 16 tokens" in caplog.text
    assert family_of(pipe).tell_cut_prompts(pipe, prompts[:1], 16) == 0


# What it samples with


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("sd3", [], 3.0),
        ("sd3", ["timesteps.table.train_shift=4"], 4.0),
        ("sd3", ["timesteps.shift=2"], 2.0),
        ("sd3", ["timesteps.table.train_shift=4", "sampling_shift=5"], 5.0),
        ("sana", ["timesteps.shift=2"], 2.0),
        ("pixart-sigma", ["timesteps.shift=2"], None),  # no flow model: the setting has no meaning there
    ],
)
def test_samples_have_the_shift_of_the_training_unless_told(name, overrides, expected):
    pipe = _upgraded(name)
    before = dict(pipe.scheduler.config)
    set_sampling_shift(pipe, load_recipe("debug-text", [f"diffusion.{o}" for o in overrides]).diffusion)
    changed = {k: v for k, v in pipe.scheduler.config.items() if before.get(k) != v}
    assert set(changed.values()) <= {expected, False}  # and no shift that follows the tokens
    assert expected is None or expected in [pipe.scheduler.config.get(key) for key in ("shift", "flow_shift")]


def test_a_shift_that_a_pipeline_does_not_have_is_refused():
    settings = load_recipe("debug-text", ["diffusion.sampling_shift=2"]).diffusion
    with pytest.raises(
        DavaeError, match=r"diffusion\.sampling_shift=2: PixArtSigmaPipeline samples without a timestep shift"
    ):
        set_sampling_shift(_upgraded("pixart-sigma"), settings)


def test_the_result_and_its_adapters_keep_the_shift_that_a_run_asked_for(tmp_path):
    """With sampling_shift alone, training follows it: both are 6."""
    base = small_pipeline("sd3")
    base.save_pretrained(tmp_path / "base")
    _upgraded("sd3").vae.save_pretrained(tmp_path / "vae")
    recipe = load_recipe(
        "debug-text",
        [
            f"base={tmp_path / 'base'}",
            "data.path=procedural:6",
            "data.hold_out=2",
            "diffusion.sampling_shift=6",
            *(f"diffusion.loop.{change}" for change in ("steps=1", "validation_images=1", "batch_size=2")),
        ],
    )
    result = train_diffusion(recipe, tmp_path / "run", tmp_path / "vae")
    made = load_pipeline(result.result)
    assert made.scheduler.config.shift == 6
    assert family_of(made).timestep_shift(made, 64) == 6
    vae = AutoencoderDA.from_pretrained(tmp_path / "vae")
    assert load_adapters(small_pipeline("sd3"), vae, tmp_path / "run" / "adapters").scheduler.config.shift == 6
