import dataclasses
import json
import re

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import davae.planner.architectures as depth
from davae.bases import open as opening
from davae.bases.debug_pipelines import small_pipeline
from davae.bases.open import load_base
from davae.errors import DavaeError
from davae.pipelines.saving.publishing import public_name
from davae.planner import plan as planner
from davae.planner import recipes
from davae.planner.architectures import find_architecture
from davae.planner.memory import checkpointing, cost_of, drop_gradients
from davae.planner.plan import GPUS, find_gpu, hours
from davae.planner.recipes import new_recipe
from davae.planner.stages import DiffusionRun, diffusion_stage, forward_cost, target_counts
from davae.planner.text import notes, stage_line
from davae.recipes.read import load_recipe, write_recipe
from davae.training.runs import train as runs
from davae.training.runs.train import check_upgrade

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


def _medium_flops(side: int, text: int) -> float:
    """Operations of one pass of SD3.5-medium, by hand from its paper and configuration."""
    width, image = 1536, side**2
    both = image + text
    total = 2 * image * width * 16 * 4 + 2 * text * 4096 * width + 2 * image * width * 16 * 4
    total += 2 * (256 + 2048 + 2 * width) * width  # embeddings of time and pooled text
    for block in range(24):
        dual, last = block < 13, block == 23
        total += 2 * 4 * both * width**2 + 4 * both**2 * width  # joint attention
        total += 2 * 8 * both * width**2  # feed-forward of both streams
        if last:  # the text stream only gives keys, queries and values
            total -= 2 * text * width**2 + 2 * 8 * text * width**2
        if dual:
            total += 2 * 4 * image * width**2 + 4 * image**2 * width
        total += 2 * ((9 if dual else 6) + (2 if last else 6)) * width**2  # modulation
    return total + 2 * 2 * width**2


def test_a_folder_comes_before_a_bundled_configuration_of_its_name_and_after_what_davae_brings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_pipeline("sd3").save_pretrained("sd35-medium")
    (tmp_path / "debug").mkdir()  # such as a run of this name
    assert find_architecture("sd35-medium").source == "folder sd35-medium"
    layers = find_architecture("sd35-medium").transformer["num_layers"]
    assert load_base("sd35-medium").transformer.config.num_layers == layers
    assert find_architecture("debug").pipeline == type(load_base("debug")).__name__
    check_upgrade(load_recipe("debug"), "autoencoder")


def test_the_short_name_of_a_bundled_configuration_is_its_name_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("davae.bases.open.open_pipeline", lambda name, **_: asked.append(name))
    load_base("SD35-medium")
    assert asked == [MEDIUM]
    assert public_name("sd35-medium") == find_architecture("sd35-medium").name == MEDIUM


@pytest.fixture(scope="module")
def medium():
    return find_architecture(MEDIUM)


@pytest.mark.parametrize("side", [32, 64])
def test_flops_of_sd35_medium_agree_with_torch_and_with_a_hand_count(medium, side):
    transformer = medium.build_transformer()
    latent = torch.empty(1, 16, 2 * side, 2 * side, device="meta")
    ours = forward_cost(transformer, latent, text_tokens=333).flops
    text = torch.empty(1, 333, 4096, device="meta")
    pooled, time = torch.empty(1, 2048, device="meta"), torch.empty(1, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(latent, text, pooled, time)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert ours == pytest.approx(_medium_flops(side, 333), rel=0.02)


def test_sd35_medium_at_1024_costs_a_quarter_of_the_tokens(medium, monkeypatch):
    monkeypatch.setattr(planner, "_stages", lambda *a, **k: ({}, {}))
    monkeypatch.setattr(planner, "_phases", lambda *a: {})
    monkeypatch.setattr(planner, "hours", lambda *a: 0.0)
    made = planner.plan(medium, resolution=1024, scale=2)
    assert made.tokens == {"base": 1024, "native": 4096, "decoder alone": 1024, "upgraded": 1024}
    ratio = made.flops_per_image["native"] / made.flops_per_image["upgraded"]
    assert 4 < ratio < 5
    assert made.speedup["upgraded"] == ratio
    assert 1 < made.speedup_with_decoding["upgraded"] < ratio
    assert made.flops_per_image["upgraded"] == pytest.approx(made.flops_per_image["base"], rel=1e-3)
    alone, faster = "decoder alone", made.speedup_with_decoding  # the base's samples, decoded as the upgrade's are
    assert made.flops_per_image[alone] == made.flops_per_image["base"]
    assert made.decode_flops[alone] == made.decode_flops["upgraded"]
    assert made.decode_flops["native"] == pytest.approx(made.decode_flops[alone], rel=0.01)
    assert faster["upgraded"] <= faster[alone] < faster["base"]
    assert made.parameters["transformer"] == 2_243_171_520
    assert made.detail_channels == 16


def _small(layers: int, device: str) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    with torch.device(device):
        return SD3Transformer2DModel(
            sample_size=32,
            num_layers=layers,
            num_attention_heads=4,
            attention_head_dim=16,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            caption_projection_dim=64,
            pos_embed_max_size=32,
        )


def _step(model: SD3Transformer2DModel, device: str):
    latent, text = torch.ones(1, 16, 32, 32, device=device), torch.ones(1, 20, 64, device=device)
    pooled, time = torch.ones(1, 64, device=device), torch.ones(1, device=device)
    drop_gradients(model.parameters())
    given = [*model.parameters(), *model.buffers(), latent, text, pooled, time]
    return lambda: model(latent, text, pooled, time).sample.float().sum().backward(), given


def _allocated_peak(fn) -> int:
    """Largest number of bytes that torch's CPU allocator held, from the profiler's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn()
    changes = []

    def walk(events):
        for event in events:
            if event.name == "[memory]":
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(recorded.profiler.kineto_results.experimental_event_tree())
    live = peak = 0
    for _, size in sorted(changes):
        live += size
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_memory_of_a_training_step_is_what_torch_allocates(recompute, precision, monkeypatch):
    mixed = precision == "bf16"
    # What the CPU runs in float32 under autocast differs from CUDA, which the planner follows.
    monkeypatch.setattr("davae.planner.memory._WIDE", set())
    real, shapes = _small(4, "cpu"), _small(4, "meta")
    if recompute:
        real.enable_gradient_checkpointing()
        shapes.enable_gradient_checkpointing(checkpointing(mixed))
    step, _ = _step(real, "cpu")

    def measured():
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            step()

    fn, given = _step(shapes, "meta")
    assert cost_of(fn, given=given, autocast=mixed).peak_bytes == pytest.approx(
        _allocated_peak(measured), rel=0.1 if mixed else 0.02
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_short_models_tell_what_deep_ones_cost(recompute):
    def measure(shorten):
        model = shorten(_small(12, "meta"))
        if recompute:
            model.enable_gradient_checkpointing(checkpointing(False))
        fn, given = _step(model, "meta")
        return cost_of(fn, given=given)

    runs = depth.block_runs(_small(12, "meta"))
    assert [run.count for run in runs] == [11, 1]  # the last block is built otherwise
    short, deep = depth.cost_by_depth(measure, runs), measure(lambda model: model)
    assert short.flops == deep.flops
    assert short.peak_bytes == pytest.approx(deep.peak_bytes, rel=0.05)


def test_lora_stage_of_a_small_pipeline():
    architecture = find_architecture("debug-sd3")
    compression = architecture.base_compression
    vae = architecture.build_autoencoder(2, 2 * architecture.base_channels)
    full = DiffusionRun(steps=1, batch_size=2, mode="full", precision="no", gradient_checkpointing=False)
    lora = DiffusionRun(steps=1, batch_size=2, lora_rank=2, lora_targets=("to_q", "to_k"))
    costs = [
        diffusion_stage(architecture, vae, 16 * compression, run, text_tokens=8, encoding_flops=0.0)
        for run in (full, lora)
    ]
    assert costs[1].trained_parameters < costs[0].trained_parameters
    assert costs[1].memory["optimizer"] == 8 * costs[1].trained_parameters
    assert costs[1].memory["activations"] < costs[0].memory["activations"]
    wrong = DiffusionRun(steps=1, batch_size=1, lora_targets=("to_quarry",))
    with pytest.raises(DavaeError, match="to_quarry"):
        diffusion_stage(architecture, vae, 16 * compression, wrong, text_tokens=8, encoding_flops=0.0)


def test_targets_are_counted_as_peft_does(medium):
    counts = target_counts(medium.build_transformer(), ("to_q", "ff.net.2", "q"))
    assert counts == {"to_q": 24 + 13, "ff.net.2": 24, "q": 0}  # thirteen blocks attend twice


def test_plan_of_the_embedded_base_is_complete_and_plain():
    made = planner.plan("tiny", resolution=128, scale=2)
    values = json.loads(json.dumps(made.to_json()))
    assert values["tokens"] == {"base": 64, "native": 256, "decoder alone": 64, "upgraded": 64}
    assert set(values["flops_per_image"]) == {"base", "native", "decoder alone", "upgraded"}
    for stage in ("autoencoder", "diffusion"):
        assert values["memory_bytes"][stage] > 0
        assert values["training_hours"][stage] > 0
    assert values["speedup"]["upgraded"] > 4
    assert stage_line(made, "autoencoder").startswith("autoencoder: ")


def test_mistakes_are_told():
    with pytest.raises(DavaeError, match="multiple of 32"):
        planner.plan("sd35-medium", resolution=1000)
    with pytest.raises(DavaeError, match="unknown scale '3'"):
        planner.plan("sd35-medium", resolution=1024, scale=3)
    with pytest.raises(DavaeError, match="did you mean H100"):
        find_gpu("H10")
    with pytest.raises(DavaeError, match="model_index"):
        find_architecture("tests")


def test_hours():
    assert hours(989e12 * 3600, find_gpu("h100"), 0.5) == pytest.approx(2.0)
    assert find_gpu("RTX 4090") is GPUS["4090"]
    with pytest.raises(DavaeError, match="utilisation"):
        hours(1.0, find_gpu("A100"), 0.0)


@pytest.mark.parametrize(("channels", "scale", "expected"), [(16, 2, 16), (16, 4, 48), (4, 4, 16), (32, 2, 32)])
def test_default_detail_channels(channels, scale, expected):
    assert planner.default_detail_channels(channels, scale) == expected


def test_each_text_encoder_sees_its_own_tokens():
    """SD3's transformer sees 333: 256 of T5 and 77 of both CLIPs, whose features share their places."""
    found = planner.plan(find_architecture("sd35-medium"), resolution=1024, scale=2)
    sizes = find_architecture("sd35-medium").text_encoder_sizes()
    tokens = {"T5EncoderModel": 256, "CLIPTextModelWithProjection": 77}
    assert found.text_flops == sum(2 * size.multiplied * tokens[size.class_name] for size in sizes)
    assert found.speedup_with_decoding["upgraded"] == pytest.approx(4.24, abs=0.005)


@pytest.mark.parametrize(("base", "mode"), [("tiny", "full"), ("debug-sd3", "full"), ("sd35-medium", "lora")])
def test_a_recipe_for_a_pipeline_reads_fits_it_and_follows_its_steps(base, mode, tmp_path):
    text = new_recipe(base, data="my photos", steps=100)
    recipe = load_recipe(write_recipe(text, tmp_path / "mine"))
    assert (recipe.base, recipe.data.path, recipe.diffusion.tune.mode) == (base, "my photos", mode)
    assert (recipe.autoencoder.loop.steps, recipe.diffusion.loss.detail_warmup_steps) == (100, 40)
    longer = load_recipe(tmp_path / "mine.yaml", ["diffusion.loop.steps=1000"])
    assert longer.diffusion.loss.detail_warmup_steps == 400
    assert "tokens for" in text.splitlines()[0]
    with pytest.raises(DavaeError, match="exists: name another"):
        write_recipe(text, tmp_path / "mine.yaml")


def test_a_recipe_for_what_cannot_be_trained_is_refused(monkeypatch):
    other = dataclasses.replace(find_architecture(MEDIUM), pipeline="HiDreamImagePipeline")
    monkeypatch.setattr(recipes, "find_architecture", lambda base: other)
    with pytest.raises(DavaeError, match="how to train a HiDreamImagePipeline"):
        new_recipe("mine")


def test_what_cannot_be_trained_is_told_before_anything_is(monkeypatch, caplog):
    """In the plan, in every dry run and before stage 1, which goes on; stage 2 is refused before images are read."""
    other = dataclasses.replace(find_architecture("debug-sd3"), pipeline="HiDreamImagePipeline")
    for module in (recipes, runs):
        monkeypatch.setattr(module, "find_architecture", lambda base: other)
    why = "how to train a HiDreamImagePipeline"
    recipe = load_recipe("debug-text", ["data.path=procedural:8"])
    assert f"stage 2 cannot be trained: davae does not know {why}" in notes(recipes.recipe_plan(recipe))[0]
    assert f"# stage 2 cannot be trained: davae does not know {why}" in recipes.dry_run(recipe, "autoencoder")
    check_upgrade(recipe, "autoencoder")
    assert f"stage 2 cannot follow this training: davae does not know {why}" in caplog.text
    with pytest.raises(DavaeError, match=why):
        check_upgrade(recipe, "diffusion", without_images=True)
    assert "cannot be trained" not in " ".join(notes(recipes.recipe_plan(recipe, find_architecture("debug-sd3"))))


def test_what_a_pipeline_of_the_hub_is_is_asked_before_stage_1(monkeypatch, caplog, tmp_path):
    """Of a name that no bundled configuration has, the description is fetched with the autoencoder's."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "HiDreamImagePipeline"}')
    monkeypatch.setattr(opening, "snapshot_download", lambda name, **_: {"someone/hidream": tmp_path}[name])
    check_upgrade(load_recipe("debug", ["base=someone/hidream", "data.path=procedural:8"]), "autoencoder")
    assert "stage 2 cannot follow this training: davae does not know how to train a HiDreamImage" in caplog.text


QUANTISED = {"quant_method": "torchao", "quant_type": "int8_weight_only"}


def test_a_base_saved_with_quantised_weights_is_told_before_anything_is_trained(monkeypatch, caplog, tmp_path):
    """Stage 1 only needs its autoencoder, so it goes on; a folder and a name on the hub alike."""
    small_pipeline("sd3").save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": QUANTISED}))
    recipe = load_recipe("debug-text", [f"base={tmp_path}", "data.path=procedural:8"])
    why = r"saved with quantised weights \(torchao\).*take the pipeline that it was quantised from"
    assert re.search(f"stage 2 cannot be trained: .*{why}", notes(recipes.recipe_plan(recipe))[0])
    assert re.search(f"# stage 2 cannot be trained: .*{why}", recipes.dry_run(recipe, "autoencoder"))
    check_upgrade(recipe, "autoencoder")
    assert re.search(f"stage 2 cannot follow this training: .*{why}", caplog.text)
    for checked in (lambda: check_upgrade(recipe, "diffusion", without_images=True), lambda: new_recipe(str(tmp_path))):
        with pytest.raises(DavaeError, match=why):
            checked()
    caplog.clear()
    monkeypatch.setattr(opening, "snapshot_download", lambda name, **_: {"someone/int8": tmp_path}[name])
    check_upgrade(load_recipe("debug-text", ["base=someone/int8", "data.path=procedural:8"]), "autoencoder")
    assert re.search(f"stage 2 cannot follow this training: .*{why}", caplog.text)
