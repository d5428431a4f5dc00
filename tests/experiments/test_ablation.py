"""An ablation trains what differs, once, with every seed, and compares like with like."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from davae.bases.tiny import debug_base
from davae.cli.main import app
from davae.errors import DavaeError
from davae.evaluation.metrics.names import OF_BASE
from davae.evaluation.reconstruction.baselines import compare_reconstructions
from davae.experiments.ablation import Spread, _foundations, ablate
from davae.experiments.variants import _probes, base_images, generated_images, real_images
from davae.models import AutoencoderDA
from davae.pipelines import load_pipeline, upgrade_pipeline
from davae.pipelines.families import family_of
from davae.pipelines.saving.opening import load_autoencoder
from davae.recipes.read import load_recipe, load_variant
from davae.report.ablation import run_ablation
from davae.runtime.resizing import upscaled
from davae.training.cache.write import write_cache
from davae.training.diffusion.tuning import select_trained
from davae.warm_start import new_channel_masks
from tests.data.files import image_folder


def test_spread_by_hand():
    spread = Spread.of([1.0, 2.0, 6.0])
    assert spread.mean == 3.0
    assert spread.std == pytest.approx(7.0**0.5)
    assert Spread.of([4.0]).std == 0.0


VARIANTS = (
    "variants={full: [], without schedule: [diffusion.loss.detail_schedule=constant], "
    "without alignment: [autoencoder.alignment.weight=0]}"
)


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """A finished ablation and its folder."""
    out = tmp_path_factory.mktemp("ablation")
    return ablate(load_recipe("ablation-debug", [VARIANTS]), out), out


def test_variants_share_autoencoders_and_a_second_call_does_nothing(ablated, monkeypatch):
    result, out = ablated
    recipe = load_recipe("ablation-debug", [VARIANTS])
    assert list(result.variants) == list(recipe.variants) == ["full", "without schedule", "without alignment"]
    assert len(list((out / "autoencoders").iterdir())) == 4  # two seeds, with and without alignment
    full, unscheduled = result.variants["full"], result.variants["without schedule"]
    rows = ["base, enlarged", "full, decoder alone", "without alignment, decoder alone"]
    assert list(result.baselines) == rows  # two variants share an autoencoder
    assert all(len(result.baselines[row]["swd/finest"].values) == 2 for row in rows)
    assert full["autoencoder_psnr"] == unscheduled["autoencoder_psnr"]
    assert len(full["swd/finest"].values) == 2
    assert full["swd/finest"].values[0] != full["swd/finest"].values[1]
    assert json.loads((out / "ablation.json").read_text())["seeds"] == [0, 1]

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("davae.experiments.variants.train_diffusion", refuse)
    monkeypatch.setattr("davae.experiments.variants.train_autoencoder", refuse)
    monkeypatch.setattr("davae.experiments.variants.compare_sets", refuse)  # figures lie beside what was measured
    assert ablate(recipe, out) == result
    with pytest.raises(DavaeError, match=r"another ablation \(samples differ\)"):
        ablate(load_recipe("ablation-debug", [VARIANTS, "samples=13"]), out)


def test_variants_share_the_latents_of_their_autoencoder(tmp_path, monkeypatch):
    """Encoded once for each autoencoder; what is trained is the same as from a variant's own."""
    written = []

    def write(data, vae, pipe, out, **options):
        written.append((out, (out / "fingerprint.json").is_file()))
        return write_cache(data, vae, pipe, out, **options)

    monkeypatch.setattr("davae.experiments.variants.write_cache", write)
    settings = ["seeds=[0]", "overrides=[data.cache_latents=true]"]
    found = ablate(load_recipe("ablation-debug", [VARIANTS, *settings]), tmp_path / "shared").variants
    assert [known for _, known in written] == [False, True, False]
    assert written[0][0] == written[1][0] != written[2][0]
    monkeypatch.setattr("davae.experiments.variants._from_cache", lambda recipe, _: recipe)
    own = ablate(load_recipe("ablation-debug", ["variants={full: []}", *settings]), tmp_path / "own").variants["full"]
    assert found["full"]["held_out_total"].mean == pytest.approx(own["held_out_total"].mean, rel=1e-5)


def test_a_random_start_is_random_in_the_new_channels_only():
    base = debug_base()
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    settings = load_recipe("debug", ["diffusion.tune.new_channels_start=random"]).diffusion
    zero, random = (upgrade_pipeline(base, vae).transformer for _ in range(2))
    select_trained(random, family_of(base), vae.layout, settings)
    before, after = dict(zero.named_parameters()), dict(random.named_parameters())
    masks = new_channel_masks(zero, vae.layout)
    for name, weight in after.items():
        mask = masks.get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(weight[~mask], before[name][~mask])
        if mask.any() and weight.ndim > 1:
            spread = float(before[name][~mask].detach().std())
            assert float(weight[mask].detach().std()) == pytest.approx(spread, rel=0.2)


def test_the_verb_prints_a_table_and_draws(ablated):
    _, out = ablated
    (out / "ablation.png").unlink(missing_ok=True)
    done = CliRunner().invoke(app, ["ablate", "--recipe", "ablation-debug", "--out", str(out), VARIANTS])
    assert done.exit_code == 0, done.output
    assert "2 seeds, 12 samples" in done.output
    assert "real images" in done.output
    assert (out / "ablation.png").is_file()
    with pytest.raises(DavaeError, match="kind 'upgrade', not an ablation"):
        CliRunner().invoke(app, ["ablate", "--recipe", "debug"], catch_exceptions=False)


def test_variants_have_folders_of_their_own_inside_the_ablation(tmp_path, monkeypatch):
    """Two names that a disk takes for one had one result; one that leads upward was trained elsewhere."""
    names = ["no gan", "no-gan", "No Gan", "../../../x", "con"]
    trained = {}

    def train(case, folder, out):
        assert str(folder) not in trained
        trained[str(folder)] = case
        assert folder.resolve().is_relative_to((tmp_path / "a" / "out" / "runs").resolve())
        return {"held_out_total": float(len(trained))}

    monkeypatch.setattr("davae.experiments.variants._trained", train)
    monkeypatch.setattr(
        "davae.experiments.variants.generated_images", lambda *_: {"images": torch.zeros(40, 3, 32, 32)}
    )
    variants = json.dumps({name: [] for name in names})
    result = ablate(load_recipe("ablation-debug", [f"variants={variants}", "seeds=[0]"]), tmp_path / "a" / "out")
    assert [result.variants[n]["held_out_total"].values for n in names] == [[1.0], [2.0], [3.0], [4.0], [5.0]]
    assert len({folder.casefold() for folder in trained}) == len(names)


def test_another_base_or_other_images_at_the_same_path_are_another_ablation(ablated, tmp_path, monkeypatch):
    _, out = ablated
    recipe = load_recipe("ablation-debug", [VARIANTS])
    other = debug_base()
    next(iter(other.transformer.parameters())).data.add_(1e-3)
    with monkeypatch.context() as patch:
        patch.setattr("davae.experiments.ablation.load_recipe_base", lambda _: other)
        with pytest.raises(DavaeError, match="weights of a base or the images, differ"):
            ablate(recipe, out)
    kept = (out / "ablation.recipe.json").read_text()
    earlier = json.loads(kept)
    del earlier["stands_on"]
    (out / "ablation.recipe.json").write_text(json.dumps(earlier))
    assert ablate(recipe, out)
    assert (out / "ablation.recipe.json").read_text() == kept


def test_a_native_fine_tune_has_as_many_tokens(tmp_path):
    settings = ["variants={full: []}", "seeds=[0]", "native=true"]
    result = ablate(load_recipe("ablation-debug", settings), tmp_path)
    folder = tmp_path / "native" / "seed-0" / "pipeline"
    native, full = (load_pipeline(f) for f in (folder, tmp_path / "runs" / "full" / "seed-0" / "pipeline"))
    sides = [p.transformer.config.sample_size // p.transformer.config.patch_size for p in (native, full)]
    assert sides[0] == sides[1]
    assert native.vae_scale_factor * 2 == full.vae_scale_factor
    assert result.baselines["native, equal tokens"].keys() == result.real.keys()
    stamp = folder.stat().st_mtime_ns
    assert ablate(load_recipe("ablation-debug", settings), tmp_path).baselines == result.baselines
    assert folder.stat().st_mtime_ns == stamp


ALONE = [
    "autoencoder_only=true",
    "overrides=[autoencoder.loop.steps=2, autoencoder.loop.validate_every=1, autoencoder.loop.validate_at_start=true, "
    "autoencoder.loop.validation_images=3]",
    "variants={full: [], decoder alone: [autoencoder.model.detail_dropout=1]}",
]


def test_autoencoders_alone_are_measured_with_their_baselines_and_over_the_steps(tmp_path, monkeypatch):
    debug_base().vae.save_pretrained(tmp_path / "vae")
    settings = [
        setting.replace("[autoencoder.loop.steps=2", f"[base={tmp_path / 'vae'}, autoencoder.loop.steps=2")
        for setting in ALONE
    ]
    out = tmp_path / "out"
    result = run_ablation(load_recipe("ablation-debug", settings), out)
    full, alone = result.variants["full"], result.variants["decoder alone"]
    assert len(full["autoencoder_psnr"].values) == 2
    assert full.keys() - alone.keys() >= {"autoencoder_psnr/details drawn", "autoencoder_alignment_relative"}
    assert full["autoencoder_probe/base"].mean == alone["autoencoder_probe/base"].mean
    # The variant of that name was trained so, and has no details to leave out.
    rows = ["full, decoder alone", "base, enlarged", "base, native", "image, reduced"]
    assert list(result.baselines) == rows
    without = result.baselines["full, decoder alone"]
    assert len(without["autoencoder_psnr"].values) == 2
    held_out = real_images(load_variant(load_recipe("ablation-debug", settings), "full", 0), "held_out")
    reports = [
        compare_reconstructions(load_autoencoder(folder), [held_out])
        for folder in (out / "autoencoders").glob("*/autoencoder")
    ]
    report = reports[0]
    rows = [{name: row.figures["psnr"] for name, row in each.rows.items()} for each in reports]
    # On all held-out images, as the baselines, and not on the few of the training's validation.
    for named, found in (("upgraded", full), ("upgraded", alone), ("decoder alone", without)):
        for value in found["autoencoder_psnr"].values:
            assert any(row.get(named) == pytest.approx(value, abs=1e-4) for row in rows)
    expected = {f"autoencoder_{k}": v for k, v in report.rows["base, enlarged"].figures.items()}
    found = {k: spread.mean for k, spread in result.baselines["base, enlarged"].items()}
    assert found == pytest.approx(expected, rel=1e-5)
    curve = result.curves["full"]["psnr"]
    assert list(curve) == [0, 1, 2]
    assert curve[2].mean != pytest.approx(full["autoencoder_psnr"].mean, abs=1e-4)  # of three images
    assert not result.real
    assert (out / "curves.png").is_file()
    monkeypatch.setattr("davae.experiments.variants.train_autoencoder", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("davae.experiments.variants.compare_reconstructions", lambda *_, **__: pytest.fail("measured"))
    assert ablate(load_recipe("ablation-debug", settings), out).variants == result.variants
    (common,) = out.glob("autoencoders/base-*.json")  # measured once for all
    of_base = json.loads(common.read_text())
    assert list(of_base) == list(OF_BASE)
    common.unlink()
    for file in out.glob("autoencoders/*/reconstruction-*.json"):  # as an earlier version kept and named the rows
        kept = json.loads(file.read_text())
        assert not kept.keys() & {*OF_BASE}
        text = json.dumps(kept | of_base)
        file.write_text(text.replace("base, enlarged", "base, upscaled").replace("decoder alone", "details zeroed"))
    assert ablate(load_recipe("ablation-debug", settings), out).baselines == result.baselines


def test_a_class_of_one_image_does_not_take_the_probes_of_the_others():
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    labels = [0, 0, 0, 1, 1, 1, 2]
    images = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    items = [{"image": image, "label": label} for image, label in zip(images, labels)]
    found = _probes(vae, items)
    assert found.keys() == {"probe/base", "probe/detail", "probe/structured"}
    assert found == _probes(vae, items[:-1])
    assert _probes(vae, items[2:4]) == {}
    assert _probes(vae, [{**item, "label": -1} for item in items]) == {}


def test_the_base_s_samples_are_enlarged_and_decoded_alone(ablated, tmp_path):
    _, out = ablated
    case = load_variant(load_recipe("ablation-debug", [VARIANTS]), "full", 0)
    vae = next((out / "autoencoders").glob("*/autoencoder"))
    debug_base().save_pretrained(tmp_path / "base")
    upgrade_pipeline(debug_base(), load_autoencoder(vae).without_details()).save_pretrained(tmp_path / "alone")
    small, larger = (generated_images(case, tmp_path / name, 12, tmp_path)["images"] for name in ("base", "alone"))
    before = sorted((out / "base").iterdir())
    enlarged = base_images(case, None, 12, out / "base")
    assert sorted((out / "base").iterdir()) == before  # it was made by the ablation
    torch.testing.assert_close(enlarged, upscaled(small, (32, 32)), atol=0.02, rtol=0)
    assert torch.equal(base_images(case, vae, 12, tmp_path), larger)


def test_autoencoders_of_an_earlier_version_are_found_by_their_settings(ablated, tmp_path, monkeypatch):
    """Their folders have names that were made of fewer settings; all was trained again."""
    result, out = ablated
    kept = tmp_path / "kept"
    shutil.copytree(out, kept)
    for number, run in enumerate(sorted((kept / "autoencoders").iterdir())):
        file = run / "config.yaml"
        config = yaml.safe_load(file.read_text())
        del config["autoencoder"]["decoder_alone"], config["autoencoder"]["rescale_details"]
        file.write_text(yaml.safe_dump(config))
        run.rename(run.with_name(f"{number:012x}"))
    monkeypatch.setattr("davae.experiments.variants.train_autoencoder", lambda *_: pytest.fail("trained again"))
    assert ablate(load_recipe("ablation-debug", [VARIANTS]), kept).variants == result.variants


def test_previews_are_what_the_base_decodes_from_the_base_channels(ablated):
    """Without a step of training they are the base's own samples."""
    result, out = ablated
    case = load_variant(load_recipe("ablation-debug", [VARIANTS]), "full", 0)
    vae = load_autoencoder(next((out / "autoencoders").glob("*/autoencoder")))
    upgraded = upgrade_pipeline(debug_base(), vae)
    upgraded.save_pretrained(out / "untrained")
    made = generated_images(case, out / "untrained", 12, out / "untrained")
    enlarged = base_images(case, None, 12, out / "base")
    torch.testing.assert_close(made["previews"], enlarged, atol=0.02, rtol=0)
    assert (made["images"] - made["previews"]).abs().mean() > 0.05
    full = result.variants["full"]
    assert full["preview_swd/finest"].values != full["swd/finest"].values
    assert "preview_swd/finest" not in result.baselines["base, enlarged"]


def test_samples_are_of_the_pipeline_that_is_there(ablated, tmp_path):
    _, out = ablated
    case = load_variant(load_recipe("ablation-debug", [VARIANTS]), "full", 0)
    folder = tmp_path / "run"
    shutil.copytree(out / "runs" / "full" / "seed-0", folder)
    first = generated_images(case, folder / "pipeline", 12, folder)["images"]
    file = folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 0 for name, value in load_file(file).items()}, file)
    assert not torch.equal(generated_images(case, folder / "pipeline", 12, folder)["images"], first)


def test_images_to_compare_with_are_squares_at_the_resolution_of_the_data(tmp_path):
    """Also where the training has buckets and sets of other resolutions."""
    photos = image_folder(tmp_path / "photos", {"a": 8})
    more = f"data.more=[{{path: {photos}, resolution: 16}}]"
    recipe = load_recipe("debug", [f"data.path={photos}", "data.hold_out=2", "data.buckets=true", more])
    assert real_images(recipe, "train").shape == (6, 3, 32, 32)
    assert real_images(recipe, "train", 4).shape == (4, 3, 32, 32)
    assert real_images(recipe, "held_out").shape == (2, 3, 32, 32)
    assert len(_foundations([recipe])) == 2
