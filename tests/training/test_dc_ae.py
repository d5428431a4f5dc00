"""DC-AE's three phases: what each trains, what it leaves alone, what it starts from."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderDC

from davae.cli.main import main
from davae.errors import DavaeError
from davae.latents import ChannelPrefixes
from davae.models import AutoencoderDA
from davae.models.dc_ae import PlainAutoencoderDC
from davae.models.latent_space import encode
from davae.recipes.dc_ae import DcAeRecipe
from davae.recipes.read import load_recipe, recipe_names
from davae.training.autoencoder.plain_objective import PlainObjective
from davae.training.dc_ae.stage import DcAeStage, build_autoencoder, trained_layers
from davae.training.dc_ae.train import (
    find_phase,
    layer_hashes,
    load_autoencoder,
    run_dc_ae,
    train_dc_ae,
    training_images,
)
from davae.training.loop.loop import train

LOOP = {
    "steps": 2,
    "batch_size": 2,
    "validation_images": 2,
    "checkpoint_every": 1,
    "log_every": 1,
    "report_to": [],
}
OPTIMIZER = {"learning_rate": 1e-3}
DC = {
    "family": "dc",
    "block_out_channels": [8, 8, 16, 16],
    "latent_channels": 4,
    "encoder_layers": [0, 1, 1, 1],
    "decoder_layers": [0, 1, 1, 1],
    "attention_head_dim": 8,
}
KL = {
    "family": "kl",
    "block_out_channels": [8, 8, 8, 8],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def _recipe(architecture=DC, **changes):
    values = {
        "kind": "dc-ae",
        "description": "a network of a test",
        "data": {"path": "procedural:6", "hold_out": 2},
        "architecture": architecture,
        "phase1": {"resolution": 16, "optimizer": OPTIMIZER, "loop": LOOP},
        "phase2": {"resolution": 32, "optimizer": OPTIMIZER, "loop": LOOP},
        "phase3": {
            "resolution": 16,
            "optimizer": OPTIMIZER,
            "loop": LOOP,
            "reconstruction": {"gan": {"weight": 0.5, "filters": 4, "layers": 1}},
        },
        "measure": {"resolutions": [16, 32]},
    }
    return DcAeRecipe.model_validate({**values, **changes})


def _three_phases(recipe, folder):
    results = []
    for phase in (1, 2, 3):
        start = results[-1].out if results else None
        results.append(train_dc_ae(recipe, folder / f"phase{phase}", phase=phase, start=start))
    return results


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """The three runs of a tiny DC-AE."""
    return _three_phases(_recipe(), tmp_path_factory.mktemp("dc-ae"))


def _summary(result):
    return json.loads((result.out / "summary.json").read_text())


# ---------------------------------------------------------------- what changes, and what does not


def _changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that differ between two saved autoencoders."""
    a, b = (load_autoencoder(folder).state_dict() for folder in (before, after))
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_phase_two_changes_only_the_layers_around_the_latent(phases):
    changed = _changed(phases[0].result, phases[1].result)
    own = ("encoder.down_blocks.3.", "encoder.conv_out.", "decoder.conv_in.", "decoder.up_blocks.3.")
    assert changed
    assert all(name.startswith(own) for name in changed)
    assert {name.split(".")[1] for name in changed} == {"down_blocks", "conv_out", "conv_in", "up_blocks"}


def test_phase_three_changes_only_the_head(phases):
    changed = _changed(phases[1].result, phases[2].result)
    assert changed
    assert all(name.startswith(("decoder.up_blocks.1.", "decoder.norm_out.", "decoder.conv_out.")) for name in changed)


def test_batch_norm_of_a_frozen_layer_keeps_its_averages(phases):
    """Phase 2 runs images through the decoder's batch norms, which it does not train."""
    one, two, three = (load_autoencoder(p.result).state_dict() for p in phases)
    averages = [n for n in one if n.endswith("running_mean")]
    assert averages
    assert all(torch.equal(one[n], two[n]) for n in averages)
    head = [n for n in averages if n.startswith("decoder.up_blocks.1.")]
    assert head
    assert all(not torch.equal(two[n], three[n]) for n in head)


@pytest.mark.parametrize("phase", [2, 3])
def test_the_summary_proves_it_with_hashes(phases, phase):
    result, previous = phases[phase - 1], phases[phase - 2]
    summary = _summary(result)
    assert {n: v["before"] for n, v in summary["layers"].items()} == layer_hashes(load_autoencoder(previous.result))
    assert {n: v["after"] for n, v in summary["layers"].items()} == layer_hashes(load_autoencoder(result.result))
    for name, layer in summary["layers"].items():
        assert (layer["before"] == layer["after"]) == (not layer["trained"]), name


def test_a_frozen_layer_that_moved_is_an_error(monkeypatch, phases, tmp_path):
    """The proof is checked, not only written."""

    def careless(stage, out, recipe):
        with torch.no_grad():
            stage.autoencoder.encoder.conv_in.conv.bias.add_(1.0)
        return train(stage, out, recipe)

    monkeypatch.setattr("davae.training.dc_ae.train.train", careless)
    with pytest.raises(RuntimeError, match=r"encoder\.conv_in"):
        train_dc_ae(_recipe(), tmp_path, phase=2, start=phases[0].out)


def test_hashes_see_one_element_and_not_the_memory_order():
    torch.manual_seed(0)
    model = build_autoencoder(_recipe().architecture)
    before = layer_hashes(model)
    model.to(memory_format=torch.channels_last)
    assert layer_hashes(model) == before
    with torch.no_grad():
        model.decoder.up_blocks[2][0].conv.weight[0, 0, 0, 0] += 1e-6
    assert [n for n, h in layer_hashes(model).items() if h != before[n]] == ["decoder.up_blocks.2"]


def test_each_phase_is_measured_before_and_after(phases):
    one, two = _summary(phases[0]), _summary(phases[1])
    assert two["before"] == pytest.approx(one["after"], rel=1e-4)
    assert {"psnr_16", "ssim_16", "spectrum_db_16", "psnr_32", "ssim_32"} <= two["after"].keys()
    assert two["before"] != two["after"]
    assert set(two["spectra"]) == {"16", "32"}


# ---------------------------------------------------------------- the result


def test_the_result_is_plain_diffusers(phases):
    model = AutoencoderDC.from_pretrained(phases[2].result)
    assert type(model) is AutoencoderDC
    assert model(torch.zeros(1, 3, 16, 16)).sample.shape == (1, 3, 16, 16)


def test_the_scaling_factor_makes_unit_variance(phases):
    recipe = _recipe()
    model = AutoencoderDC.from_pretrained(phases[0].result)
    data = training_images(recipe, recipe.phase1)
    with torch.no_grad():
        latents = encode(model, torch.stack([data[i]["image"] for i in range(len(data))]))
    assert float((latents * model.config.scaling_factor).std()) == pytest.approx(1.0, rel=0.01)


def test_phase_three_keeps_the_scaling_factor(phases):
    """Its encoder is that of phase 2."""
    factors = [AutoencoderDC.from_pretrained(p.result).config.scaling_factor for p in phases]
    assert factors[1] == factors[2] != factors[0]


def test_the_result_is_a_base_for_details(phases):
    """f8 to f16 here, f32 to f64 for SANA: base latents stay the trained autoencoder's own."""
    base = AutoencoderDC.from_pretrained(phases[2].result)
    base.requires_grad_(False)  # torch multiplies in another order where a weight takes a gradient
    model = AutoencoderDA.from_base(base, scale=2, detail_channels=8)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latent = model.encode(image).latent_dist.mode()
        assert latent.shape == (1, 12, 2, 2)
        assert torch.equal(latent[:, :4], base.encode(model.reduce(image)).latent)
        assert model.decode(latent).sample.shape == image.shape
    assert model.config.scaling_factor == base.config.scaling_factor


@pytest.mark.parametrize("architecture", [{**DC, "residual_autoencoding": False}, KL], ids=["plain", "kl"])
def test_baselines_run_through_the_same_phases(architecture, tmp_path):
    results = _three_phases(_recipe(architecture), tmp_path)
    plain = architecture is not KL
    assert isinstance(load_autoencoder(results[0].result), PlainAutoencoderDC) == plain
    for result in results[1:]:
        layers = _summary(result)["layers"].values()
        assert all((layer["before"] != layer["after"]) == layer["trained"] for layer in layers)


# ---------------------------------------------------------------- the objective


def test_only_the_phase_s_layers_take_a_gradient():
    recipe = _recipe()
    for phase, share in ((recipe.phase1, 1.0), (recipe.phase2, None), (recipe.phase3, None)):
        model = build_autoencoder(recipe.architecture)
        layers = trained_layers(model, phase)
        objective = PlainObjective(model, layers, recipe.phase1.reconstruction)
        objective({"image": torch.randn(2, 3, 16, 16)}, 0)["total"].backward()
        own = {id(p) for layer in layers for p in layer.parameters()}
        assert all((p.grad is not None) == (id(p) in own) for p in model.parameters())
        if share == 1.0:
            assert len(own) == len(list(model.parameters()))
        else:
            assert 0 < len(own) < len(list(model.parameters()))


def test_frozen_layers_stay_in_eval_mode():
    recipe = _recipe()
    model = build_autoencoder(recipe.architecture)
    objective = PlainObjective(model, trained_layers(model, recipe.phase2), recipe.phase2.reconstruction)
    objective.eval()
    objective.train()
    assert model.encoder.conv_out.training
    assert not model.encoder.conv_in.training
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_one_image_can_be_overfitted():
    torch.manual_seed(0)
    recipe = _recipe()
    model = build_autoencoder(recipe.architecture)
    objective = PlainObjective(model, [model], recipe.phase1.reconstruction)
    data = training_images(recipe, recipe.phase1)
    batch = {"image": data[0]["image"][None].repeat(2, 1, 1, 1)}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        total = objective(batch, step)["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.4 * losses[0]


def test_a_stopped_phase_ends_as_an_uninterrupted_one(phases, tmp_path):
    recipe = _recipe()
    start = load_autoencoder(phases[1].result)
    plain = yaml.safe_load((phases[2].out / "config.yaml").read_text())
    data = training_images(recipe, recipe.phase3)
    train(DcAeStage(start, recipe.phase3, data, {16: data}), tmp_path, plain, stop_after=1)
    again = train_dc_ae(recipe, tmp_path, phase=3, start=phases[1].out)
    assert not _changed(phases[2].result, again.result)


# ---------------------------------------------------------------- recipes


def _names():
    return [n for n in recipe_names() if isinstance(load_recipe(n), DcAeRecipe)]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dc-ae-f32c32", 323.4), ("dc-ae-f64c128", 676.9), ("dc-ae-f128c512", 1120.7)],
)
def test_published_sizes(name, millions):
    """Parameter counts of the published networks, built without memory for weights."""
    with torch.device("meta"):
        model = build_autoencoder(load_recipe(name).architecture)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_comparison_is_fair():
    """Equal steps, images and losses; equal parameters without residual autoencoding, within 10 % for SD-VAE."""
    names = ("dc-ae-small-f64", "dc-ae-small-f64-plain", "sd-vae-small-f64")
    recipes = [load_recipe(n) for n in names]
    assert recipes[0].phase1 == recipes[1].phase1 == recipes[2].phase1
    assert recipes[0].data == recipes[1].data == recipes[2].data
    with torch.device("meta"):
        counts = [sum(p.numel() for p in build_autoencoder(r.architecture).parameters()) for r in recipes]
    assert counts[0] == counts[1]
    assert abs(counts[2] / counts[0] - 1) < 0.1
    assert {r.compression for r in recipes} == {64}


@pytest.mark.parametrize("name", _names())
def test_dry_run_counts_without_weights(name):
    text = run_dc_ae(name, phase=1, dry_run=True)
    assert yaml.safe_load(text)["kind"] == "dc-ae"
    assert re.search(r"# \w+: [\d.]+ M parameters, phase 1 trains [\d.]+ M\n# \d+ px images, latent \[", text)


def test_windows_are_cut_from_larger_images():
    recipe = _recipe(
        phase1={"resolution": 16, "windows_from": 40, "windows": 1.0, "optimizer": OPTIMIZER, "loop": LOOP}
    )
    images = training_images(recipe, recipe.phase1)
    item = images.item(0, 3)["image"]
    whole = images.source[0]["image"]
    windows = whole.unfold(1, 16, 1).unfold(2, 16, 1)  # [3, 25, 25, 16, 16]
    assert item.shape == (3, 16, 16)
    assert (windows == item[:, None, None]).all(dim=(0, 3, 4)).any()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "phase1.resolution=100",
            "phase1.resolution is 100 pixels, which the compression 32 does not divide; take 96 or 128",
        ),
        ("measure.resolutions=[128,500]", "measure.resolutions is 500"),
        ("phase2.resolution=16", "take 32"),
        ("phase2.reconstruction.gan.weight=0.1", "belongs to phase 3"),
        ("phase1.windows_from=64", "below the resolution 128"),
        ("architecture.encoder_layers=[1]", "1 entries for 6 block_out_channels"),
        ("architecture.latent_channels=48", "must divide"),
        ("phase2.stage=2", "did you mean 'phase2.stages'"),
        ("phase1.stages=2", "phase1.stages"),
        ("phase1.prefixes.channels=[8,32]", "phase1.prefixes.channels has 32; a prefix of 32 channels has 1 to 31"),
        ("measure.prefixes=[40]", "measure.prefixes has 40"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(override, words):
    with pytest.raises(DavaeError, match=re.escape(words)) as caught:
        load_recipe("dc-ae-small-f32", [override])
    assert "\n" not in str(caught.value)


def test_a_phase_without_its_predecessor(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DavaeError, match=r"--recipe dc-ae-small-f32 --phase 1` to its end first"):
        run_dc_ae("dc-ae-small-f32", phase=2)
    assert not list(tmp_path.iterdir())


def test_phases_in_the_wrong_order(phases, tmp_path):
    with pytest.raises(DavaeError, match=r"phase 3 starts from phase 2's result, but .* comes from phase 1"):
        train_dc_ae(_recipe(), tmp_path / "run", phase=3, start=phases[0].out)
    with pytest.raises(DavaeError, match="phase 1 starts from random weights"):
        train_dc_ae(_recipe(), tmp_path / "run", phase=1, start=phases[0].out)


def test_a_run_is_refused_for_its_own_settings_only(phases, monkeypatch):
    loop = {**LOOP, "seed": 5}
    later = _recipe(phase2={"resolution": 32, "optimizer": OPTIMIZER, "loop": loop})
    before = layer_hashes(load_autoencoder(phases[0].result))
    train_dc_ae(later, phases[0].out, phase=1)
    assert layer_hashes(load_autoencoder(phases[0].result)) == before  # measuring again changes nothing
    for name in ("open_part", "load_autoencoder"):
        monkeypatch.setattr(f"davae.training.dc_ae.train.{name}", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(DavaeError, match=r"other settings \(phase2\.loop\.seed: 0 -> 5\)"):
        train_dc_ae(later, phases[1].out, phase=2, start=phases[0].out)


def test_a_published_autoencoder_can_be_adapted(tmp_path):
    """It has no record of phases, and its config writes lists where the constructor has tuples."""
    published = build_autoencoder(_recipe().architecture)
    published.save_pretrained(tmp_path / "published")
    result = train_dc_ae(_recipe(), tmp_path / "run", phase=2, start=tmp_path / "published")
    assert _summary(result)["start"] == str(tmp_path / "published")


def test_another_network_is_refused(phases, tmp_path):
    other = _recipe({**DC, "encoder_layers": [0, 1, 2, 1]})
    with pytest.raises(DavaeError, match=r"another network than the recipe's .*encoder_layers_per_block"):
        train_dc_ae(other, tmp_path / "run", phase=2, start=phases[0].out)


def test_phases_that_do_not_exist():
    recipe = _recipe(phase2=None)
    with pytest.raises(DavaeError, match="no section phase2"):
        find_phase(recipe, 2)
    with pytest.raises(DavaeError, match="there is no phase 4"):
        find_phase(recipe, 4)


def test_gradient_checkpointing_that_the_network_lacks():
    recipe = _recipe(
        phase1={"resolution": 16, "optimizer": OPTIMIZER, "loop": {**LOOP, "gradient_checkpointing": True}}
    )
    with pytest.raises(DavaeError, match="AutoencoderDC has none"):
        DcAeStage(build_autoencoder(recipe.architecture), recipe.phase1, [], {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "tiny"], "needs kind: dc-ae"),
        (["--recipe", "dc-ae-small-f32", "--phase", "3"], "phase 3 starts from phase 2's result"),
        (["--recipe", "dc-ae-small-f64", "--phase", "2"], "no section phase2"),
    ],
)
def test_the_verb_s_mistakes_end_with_status_two(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["davae", "train", "dc-ae", *arguments])
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_figures_before_a_phase_are_of_the_weights_that_it_starts_from(tmp_path):
    """A phase that was stopped before its first checkpoint, and begun again when the phase before was trained anew."""
    first = train_dc_ae(_recipe(), tmp_path / "one", phase=1)
    before = train_dc_ae(_recipe(), tmp_path / "two", phase=2, start=first.out)
    other = _recipe(phase1={"resolution": 16, "optimizer": OPTIMIZER, "loop": {**LOOP, "seed": 7}})
    second = train_dc_ae(other, tmp_path / "other", phase=1)
    shutil.rmtree(tmp_path / "two" / "checkpoints")
    shutil.rmtree(tmp_path / "one")
    second.out.rename(tmp_path / "one")
    known = _summary(before)["before"]
    again = _summary(train_dc_ae(_recipe(), tmp_path / "two", phase=2, start=tmp_path / "one"))["before"]
    assert again != known
    fresh = _summary(train_dc_ae(_recipe(), tmp_path / "fresh", phase=2, start=tmp_path / "one"))["before"]
    assert again == fresh


# ---------------------------------------------------------------- DC-AE 1.5: prefixes of channels

STRUCTURED = {**DC, "latent_channels": 8, "residual_stages": 4, "batch_norm": False, "latent_shortcuts": False}


def test_dc_ae_15_is_the_published_network():
    """Parameters as counted from the official configuration: in every stage residual blocks of a convolution with bias,
    one without, and a norm. No shortcuts at the latent, no batch norm, no ReLU.
    """
    shape = load_recipe("dc-ae15-f64c128").architecture
    with torch.device("meta"):
        model = build_autoencoder(shape)
    widths, depths, channels = [128, 256, 512, 512, 1024, 1024, 1024], [0, 5, 10, 4, 4, 4, 4], 128

    def conv(a, b, bias=True):
        return 9 * a * b + bias * b

    blocks = sum(n * (conv(w, w) + conv(w, w, bias=False) + 2 * w) for w, n in zip(widths, depths))
    steps = list(itertools.pairwise(widths[1:]))
    down, up = sum(conv(a, b // 4) for a, b in steps), sum(conv(b, 4 * a) for a, b in steps)
    ends = conv(3, widths[1] // 4) + conv(widths[-1], channels) + conv(channels, widths[-1])
    head = 2 * widths[1] + conv(widths[1], 12)
    assert sum(p.numel() for p in model.parameters()) == 2 * blocks + down + up + ends + head
    assert not any(isinstance(m, torch.nn.BatchNorm2d | torch.nn.ReLU) for m in model.modules())
    assert not model.encoder.out_shortcut
    assert not model.decoder.in_shortcut


def test_outside_its_prefix_a_sample_gives_no_gradient():
    torch.manual_seed(0)
    recipe = _recipe(STRUCTURED)
    model = build_autoencoder(recipe.architecture)

    def gradients(prefixes, *, train=True):
        objective = PlainObjective(model, [model], recipe.phase1.reconstruction, prefixes=prefixes).train(train)
        model.zero_grad()
        torch.manual_seed(0)
        objective({"image": torch.randn(2, 3, 16, 16)}, 0)["total"].backward()
        return model.encoder.conv_out.weight.grad, model.decoder.conv_in.weight.grad.transpose(0, 1)

    nearly_always = ChannelPrefixes(8, [3], share=0.999999)
    for gradient in gradients(nearly_always):
        assert gradient[:3].flatten(1).any(1).all()
        assert not gradient[3:].any()
    for without in (gradients(None), gradients(nearly_always, train=False)):
        assert all(gradient.flatten(1).any(1).all() for gradient in without)


def test_trained_on_prefixes_it_reconstructs_better_from_them(tmp_path):
    """With equal seeds, steps and images."""
    loop = {**LOOP, "steps": 150, "batch_size": 4, "checkpoint_every": 150, "log_every": 150, "validation_images": 8}
    phase = {"resolution": 16, "optimizer": {"learning_rate": 3e-3}, "loop": loop, "reconstruction": {"mse_weight": 4}}
    found = {}
    for name, channels in (("with", [1, 2, 4]), ("without", [])):
        recipe = _recipe(
            STRUCTURED,
            data={"path": "procedural:40", "hold_out": 8, "in_memory": True},
            phase1={**phase, "prefixes": {"channels": channels, "share": 0.75}},
            measure={"resolutions": [16], "prefixes": [1, 2, 4]},
        )
        found[name] = train_dc_ae(recipe, tmp_path / name, phase=1).metrics
    gains = [found["with"][f"psnr_16_first_{n}"] - found["without"][f"psnr_16_first_{n}"] for n in (1, 2, 4)]
    assert min(gains) > 0.2
    assert min(gains[:2]) > 1.0
    assert found["with"]["psnr_16_first_4"] > found["with"]["psnr_16_first_1"]
