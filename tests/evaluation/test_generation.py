"""Runs of many images: stopped, continued, shared; and what is measured on them."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from davae.bases.debug_pipelines import small_pipeline
from davae.bases.open import load_base
from davae.bases.tiny import debug_base
from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation.features import Features
from davae.evaluation.generation import image_run
from davae.evaluation.generation.baselines import generate_variants
from davae.evaluation.generation.compare import compare_generation, open_reference
from davae.evaluation.generation.image_run import ImageRun, RunSettings, write_geneval_folder
from davae.evaluation.generation.prompts import class_set, open_prompt_set
from davae.evaluation.metrics.fid import GaussianStatistics, save_statistics
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.report.recorder import save_png
from tests.data.files import image_folder
from tests.evaluation.test_upscalers import Nearest

_SETTINGS = RunSettings("debug", {"kind": "classes"}, steps=1, guidance=1.0, batch=3)
_COUNT = 40


class _Pixels:
    name = "pixels"

    def describe(self):
        return {"network": self.name}

    def __call__(self, images):
        return Features(torch.nn.functional.adaptive_avg_pool2d(images, 1).flatten(1))


@pytest.fixture(scope="module")
def pipe():
    made = debug_base()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def undisturbed(pipe, tmp_path_factory):
    run = ImageRun(tmp_path_factory.mktemp("undisturbed"), _SETTINGS)
    assert list(run.make(pipe, class_set(12), _COUNT)) == list(range(_COUNT))
    return run


def _same_files(a, b, count=_COUNT):
    return all(a.path(i).read_bytes() == b.path(i).read_bytes() for i in range(count))


def _figures(run):
    reference = open_reference("procedural:30")
    report = compare_generation({"it": lambda: run.batches(_COUNT)}, reference, networks=[_Pixels()])
    return report.to_json()["rows"]["it"]


def test_a_run_killed_twice_ends_as_an_undisturbed_one(pipe, undisturbed, tmp_path):
    for after in (10, 8):  # both in the middle of a batch of three
        run = ImageRun(tmp_path, _SETTINGS)
        made = run.make(pipe, class_set(12), _COUNT)
        for _ in range(after):
            next(made)
        made.close()
        (tmp_path / "images" / f".{run.path(after + 2).name}.1.partial").write_bytes(b"half a pic")
    assert len(run.missing(_COUNT)) == _COUNT - 18
    last = ImageRun(tmp_path, _SETTINGS)
    assert len(list(last.make(pipe, class_set(12), _COUNT))) == _COUNT - 18
    assert list(last.make(pipe, class_set(12), _COUNT)) == []
    files = sorted((tmp_path / "images").glob("*.png"))
    assert len(files) == _COUNT
    assert len({f.read_bytes() for f in files}) == _COUNT, "an image was made twice"
    assert _same_files(last, undisturbed)
    assert _figures(last) == _figures(undisturbed)


def test_processes_share_a_run_without_overlap(pipe, undisturbed, tmp_path):
    made = []
    for rank in (2, 0, 1):
        run = ImageRun(tmp_path, _SETTINGS)
        made += run.make(pipe, class_set(12), _COUNT, rank=rank, world=3)
    assert sorted(made) == list(range(_COUNT))
    assert _same_files(run, undisturbed)


def test_batches_are_cut_by_number_and_belong_to_one_process(tmp_path, monkeypatch):
    calls = []

    def paint(_pipe, subjects, seeds, **_options):
        calls.append(list(zip(subjects, seeds, strict=True)))
        return [Image.new("RGB", (4, 4))] * len(seeds)

    monkeypatch.setattr(image_run, "generate_batch", paint)
    run = ImageRun(tmp_path, replace(_SETTINGS, seed=100))
    (tmp_path / "images" / "0000001.png").write_bytes(b"made before")
    shares = [list(run.make(None, class_set(4), 10, rank=rank, world=2)) for rank in range(2)]
    assert shares == [[0, 2, 6, 7, 8], [3, 4, 5, 9]]
    # The interrupted batch and the last one are whole: their arithmetic is that of any other run.
    assert [[seed for _, seed in call] for call in calls] == [
        [100, 101, 102],
        [106, 107, 108],
        [103, 104, 105],
        [109, 110, 111],
    ]
    assert [subject for subject, _ in calls[1]] == ["2", "3", "0"]
    assert run.path(1).read_bytes() == b"made before"


def test_the_clip_score_pairs_every_image_with_its_own_prompt():
    class Clip:
        def __call__(self, images):
            return Features(images[:, :, 0, 0])

        def texts(self, texts):
            return torch.eye(3)[[int(text) for text in texts]]

        def describe(self):
            return {}

    images = torch.eye(3).repeat(2, 1)[:, :, None, None].expand(-1, -1, 16, 16)  # image i shows i % 3
    report = compare_generation(
        {"it": lambda: images.split([2, 3, 1])},
        open_reference("procedural:4"),
        clip=Clip(),
        prompts=replace(class_set(3), categories=["a", "b", "a"]),
    )
    row = report.rows["it"]
    assert row.figures["clip_score"] == pytest.approx(100)
    assert [row.categories[name].figures["clip_score"] for name in "ab"] == pytest.approx([100, 100])
    # One image of category b shows another prompt: its category suffers, the other does not.
    report = compare_generation(
        {"it": lambda: [images[[0, 2, 2, 0, 1, 2]]]},
        open_reference("procedural:4"),
        clip=Clip(),
        prompts=replace(class_set(3), categories=["a", "b", "a"]),
    )
    found = report.rows["it"].categories
    assert [found[name].figures["clip_score"] for name in "ab"] == pytest.approx([100, 50])


def _mjhq(tmp_path):
    """Prompts of two categories in turn, reference folders of their names, and six images."""
    entries = {f"{i:02d}": {"prompt": str(i % 3), "category": ("animals", "food")[i % 2]} for i in range(6)}
    (tmp_path / "meta_data.json").write_text(json.dumps(entries))
    generator = torch.Generator().manual_seed(0)
    for category, level in (("animals", -0.5), ("food", 0.5)):
        for i in range(5):
            image = (level + 0.2 * torch.randn(3, 16, 16, generator=generator)).clamp(-1, 1)
            save_png(image, tmp_path / "real" / category / f"{i}.png")
    images = torch.rand(6, 3, 16, 16, generator=generator) - 0.5
    return open_prompt_set(tmp_path / "meta_data.json"), images


def test_categories_of_prompts_are_measured_apart(tmp_path):
    prompts, images = _mjhq(tmp_path)
    report = compare_generation(
        {"it": lambda: images.split(4)},
        open_reference(str(tmp_path / "real")),
        networks=[_Pixels()],
        prompts=prompts,
    )
    assert report.categories == {"animals": 3, "food": 3}
    for category, ours in (("animals", images[::2]), ("food", images[1::2])):
        alone = compare_generation(
            {"it": lambda ours=ours: [ours]},
            open_reference(str(tmp_path / "real" / category)),
            networks=[_Pixels()],
        )
        found = report.rows["it"].categories[category].figures
        for metric in ("fid/pixels", "kid/pixels"):
            assert found[metric] == pytest.approx(alone.rows["it"].figures[metric], rel=1e-6)
    json.dumps(report.to_json())


def test_a_reference_without_the_categories_is_told(tmp_path):
    prompts, images = _mjhq(tmp_path)
    report = compare_generation(
        {"it": lambda: [images]},
        open_reference(str(tmp_path / "real" / "food")),
        networks=[_Pixels()],
        prompts=prompts,
    )
    assert "fid/pixels" in report.rows["it"].figures
    assert "no class 'animals'" in report.rows["it"].categories["animals"].unavailable["fid/pixels"]


def test_a_run_can_be_made_longer_and_keeps_its_settings(pipe, undisturbed, tmp_path):
    run = ImageRun(tmp_path, _SETTINGS)
    list(run.make(pipe, class_set(12), 4))
    list(run.make(pipe, class_set(12), 8))
    assert _same_files(run, undisturbed, 8)
    with pytest.raises(DavaeError, match="started with seed = 0, not 1"):
        ImageRun(tmp_path, replace(_SETTINGS, seed=1))
    run.path(3).unlink()
    with pytest.raises(DavaeError, match="image 3 of the run"):
        list(run.batches(8))


def test_prompt_sets_of_every_form(tmp_path):
    (tmp_path / "p.txt").write_text("# words\na fox\n\na house\n")
    (tmp_path / "m.json").write_text(json.dumps({"0a": {"prompt": "a fox", "category": "animals"}}))
    lines = [{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    text, mjhq, geneval = (open_prompt_set(tmp_path / name) for name in ("p.txt", "m.json", "g.jsonl"))
    assert (text.kind, list(text.subjects)) == ("lines", ["a fox", "a house"])
    assert (mjhq.kind, list(mjhq.subjects)) == ("mjhq", ["a fox"])
    assert (geneval.kind, list(geneval.metadata)) == ("geneval", lines)
    assert [text.subject(i) for i in range(3)] == ["a fox", "a house", "a fox"]
    assert [prompts.category(3) for prompts in (text, mjhq, geneval)] == ["", "animals", "counting"]
    for content, words in (('{"a": {"text": 1}}', "entry 'a'"), ("[]", "MJHQ-30K"), ("{", "not JSON")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DavaeError, match=words):
            open_prompt_set(tmp_path / "bad.json")


@pytest.fixture(scope="module")
def sd3():
    base = small_pipeline("sd3")
    torch.manual_seed(0)
    upgraded = upgrade_pipeline(small_pipeline("sd3"), AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8))
    for made in (base, upgraded):
        made.set_progress_bar_config(disable=True)
    return {"base": base, "upgraded": upgraded}


def test_a_text_pipeline_beside_its_baselines_and_the_geneval_folder(sd3, tmp_path):
    rows = [{"tag": "single_object", "prompt": f"a photo of a {name}"} for name in ("fox", "boat")]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = RunSettings("upgraded", steps=1, guidance=1.0, height=64, width=64, batch=2)
    variants = generate_variants(sd3.__getitem__, settings, tmp_path, base="base", prompts=tmp_path / "g.jsonl")
    assert variants.count == 8
    sizes = {name: Image.open(run.path(0)).size for name, run in variants.runs.items()}
    assert sizes == {"upgraded": (64, 64), "base": (32, 32), "decoder alone": (64, 64), "native": (64, 64)}
    assert {tuple(next(iter(make())).shape[-2:]) for make in variants.models.values()} == {(64, 64)}
    report = compare_generation(variants.models, open_reference("procedural:12"), prompts=variants.prompts)
    assert list(report.rows) == ["upgraded", "decoder alone", "base, enlarged", "base, native"]
    assert list(variants.meanings) == list(variants.seconds) == list(report.rows)
    assert min(variants.seconds.values()) > 0
    assert report.rows["upgraded"].figures["spectrum_db"] > 0
    out = write_geneval_folder(variants.runs["upgraded"], variants.prompts, variants.count, tmp_path / "geneval")
    assert sorted(p.name for p in out.iterdir()) == ["00000", "00001"]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == rows[1]
    samples = sorted((out / "00001" / "samples").iterdir())
    assert [s.name for s in samples] == [f"{i:05d}.png" for i in range(4)]
    assert samples[2].read_bytes() == variants.runs["upgraded"].path(5).read_bytes()


def _pictures(folder):
    return [file.read_bytes() for file in sorted((folder / "images").iterdir())]


def test_the_decoder_alone_decodes_the_base_s_own_samples(sd3, tmp_path):
    """It is the upgrade without details, whose latents the base samples as if there were no upgrade."""
    (tmp_path / "p.txt").write_text("a fox\na boat\n")
    settings = RunSettings("upgraded", steps=1, guidance=1.0, height=64, width=64, batch=2)
    asked = {"base": "base", "prompts": tmp_path / "p.txt"}
    variants = generate_variants(sd3.__getitem__, settings, tmp_path / "out", **asked)
    alone = sd3["upgraded"].vae.without_details()
    options = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    latents = [
        sd3["base"](prompt=text, generator=torch.Generator().manual_seed(seed), **options).images
        for seed, text in enumerate(("a fox", "a boat"))
    ]
    vae = sd3["base"].vae
    raw = torch.cat(latents) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        expected = alone.decode(raw).sample.clamp(-1, 1)
    found = next(iter(variants.models["decoder alone"]()))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)  # 8 bits
    again = generate_variants(sd3.__getitem__, settings, tmp_path / "out", **asked)
    assert again.seconds == variants.seconds  # nothing was made, and the times are those noted
    with pytest.raises(DavaeError, match="cannot be called 'decoder-alone'"):
        generate_variants(sd3.__getitem__, settings, tmp_path / "out", others={"decoder-alone": "base"}, **asked)


def test_where_there_is_no_decoder_alone_the_reason_is_told(sd3, tmp_path):
    (tmp_path / "p.txt").write_text("a fox\na boat\n")
    without = upgrade_pipeline(small_pipeline("sd3"), sd3["upgraded"].vae.without_details())
    torch.manual_seed(1)
    stranger = small_pipeline("sd3")
    for parameter in stranger.vae.parameters():
        parameter.data.mul_(1.1)
    opened = sd3 | {"without": without, "stranger": stranger}
    for i, (pipeline, base, reason) in enumerate(
        [
            ("without", "base", "it is its decoder alone itself"),
            ("base", "base", "the pipeline is not upgraded"),
            ("upgraded", "stranger", "made from another"),
        ]
    ):
        settings = RunSettings(pipeline, steps=1, guidance=1.0, height=64, width=64, batch=2)
        found = generate_variants(
            opened.__getitem__, settings, tmp_path / str(i), base=base, prompts=tmp_path / "p.txt"
        )
        assert "decoder alone" not in found.models
        assert reason in found.unavailable["decoder alone"]


def test_upscalers_enlarge_the_base_s_images_from_their_seeds_and_prompts(sd3, tmp_path):
    (tmp_path / "p.txt").write_text("a fox\na boat\na tree\n")
    settings = RunSettings("upgraded", steps=1, guidance=1.0, height=64, width=64, batch=2, seed=5)
    upscaler = Nearest(noise=0.1)
    asked = {"prompts": tmp_path / "p.txt", "upscalers": {"noisy": lambda: upscaler}}
    with pytest.raises(DavaeError, match="--base"):
        generate_variants(sd3.__getitem__, settings, tmp_path / "out", **asked)
    variants = generate_variants(sd3.__getitem__, settings, tmp_path / "out", base="base", **asked)
    assert list(variants.models) == ["upgraded", "decoder alone", "base, enlarged", "base, native", "noisy"]
    assert upscaler.asked == [([5, 6], ["a fox", "a boat"]), ([7], ["a tree"])]
    small = variants.runs["base"].images(range(3))
    expected = Nearest(noise=0.1)(small, (64, 64), seeds=[5, 6, 7])
    torch.testing.assert_close(variants.runs["noisy"].images(range(3)), expected, atol=0.01, rtol=0)
    assert variants.seconds["noisy"] > variants.seconds["base, enlarged"]
    before = _pictures(variants.runs["noisy"].folder)
    variants.runs["noisy"].path(1).unlink()
    again = generate_variants(sd3.__getitem__, settings, tmp_path / "out", base="base", **asked)
    assert _pictures(again.runs["noisy"].folder) == before
    other = Nearest(noise=0.2)
    other.weights = "others"
    with pytest.raises(DavaeError, match="images are of other weights"):
        generate_variants(
            sd3.__getitem__, settings, tmp_path / "out", base="base", **asked | {"upscalers": {"noisy": lambda: other}}
        )


def test_another_pipeline_of_equal_tokens_stands_beside(sd3, tmp_path):
    (tmp_path / "p.txt").write_text("a fox\na boat\n")
    settings = RunSettings("upgraded", steps=1, guidance=1.0, height=64, width=64, batch=2)
    asked = {"prompts": tmp_path / "p.txt", "others": {"equal tokens": "upgraded"}}
    variants = generate_variants(sd3.__getitem__, settings, tmp_path / "out", **asked)
    assert list(variants.models) == ["upgraded", "equal tokens"]
    assert _same_files(variants.runs["upgraded"], variants.runs["equal tokens"], 2)
    assert torch.equal(*(next(iter(make())) for make in variants.models.values()))
    for name in ("native", "a/b", "..", ""):
        with pytest.raises(DavaeError, match=f"cannot be called '{name}'"):
            generate_variants(sd3.__getitem__, settings, tmp_path / "out", others={name: "base"})


def test_without_prompts_the_captions_of_the_reference_are_taken(sd3, tmp_path):
    folder = image_folder(tmp_path / "photos", {"a": 4})
    for number, text in enumerate(("a fox", "a boat", "a fox")):
        (folder / "a" / f"{number:03d}.txt").write_text(text)
    reference = open_reference(str(folder))
    assert reference.captions() == ["a fox", "a boat"]
    settings = RunSettings("base", steps=1, guidance=1.0, height=32, width=32)
    variants = generate_variants(sd3.__getitem__, settings, tmp_path / "out", captions=reference.captions)
    assert (variants.prompts.kind, variants.count) == ("captions", 2)
    assert [variants.prompts.subject(i) for i in range(3)] == ["a fox", "a boat", "a fox"]
    other = generate_variants(sd3.__getitem__, settings, tmp_path / "other", captions=lambda: ["a fox"], count=2)
    assert other.prompts.sha256 != variants.prompts.sha256


def test_prompts_and_classes_are_not_mixed_up(sd3, pipe, tmp_path):
    with pytest.raises(DavaeError, match="--prompts"):
        generate_variants(sd3.__getitem__, RunSettings("base"), tmp_path)
    with pytest.raises(DavaeError, match="leave --prompts out"):
        generate_variants(lambda _: pipe, RunSettings("debug"), tmp_path, prompts="p.txt", count=2)


def test_the_reference_as_statistics_gives_the_distance_of_the_images(undisturbed, tmp_path):
    dataset = open_dataset("procedural:30", resolution=16)
    moments = GaussianStatistics()
    for i in range(30):
        moments.update(_Pixels()(dataset[i]["image"][None]).rows)
    message = save_statistics(moments.gaussian(), tmp_path / "reference.npz")
    report = compare_generation(
        {"it": lambda: undisturbed.batches(_COUNT)},
        open_reference(str(tmp_path / "reference.npz")),
        networks=[_Pixels()],
    )
    expected = _figures(undisturbed)["figures"]["fid/pixels"]
    assert report.rows["it"].figures["fid/pixels"] == pytest.approx(expected, rel=1e-9)
    assert report.reference["sha256"] == message
    assert report.reference["images"] == 30


def test_images_of_other_weights_at_the_same_path_are_not_measured(tmp_path):
    """A pipeline that was trained further is another one; a copy of it elsewhere is the same."""

    def opened(pipeline, name="debug"):
        asked = {"count": 2, "others": None}
        return generate_variants(lambda _: pipeline, replace(_SETTINGS, pipeline=name), tmp_path, **asked)

    pipe = debug_base()
    pipe.set_progress_bar_config(disable=True)
    opened(pipe).runs["upgraded"]
    before = (tmp_path / "upgraded" / "images" / "0000000.png").read_bytes()
    assert opened(debug_base(), "elsewhere").runs["upgraded"].missing(2) == []
    for change in (
        lambda p: p.transformer.proj_in.weight.data.mul_(1.01) if hasattr(p.transformer, "proj_in") else None,
        lambda p: next(iter(p.transformer.parameters())).data.add_(1e-3),
        lambda p: next(iter(p.vae.parameters())).data.add_(1e-3),
        lambda p: p.vae.register_to_config(scaling_factor=2.0),
        lambda p: p.scheduler.register_to_config(shift=3.0),
    ):
        other = debug_base()
        kept = image_run.contents_hash(other)
        change(other)
        if image_run.contents_hash(other) == kept:  # nothing of that name in it
            continue
        with pytest.raises(DavaeError, match="images are of other weights than debug has now"):
            opened(other)
    assert (tmp_path / "upgraded" / "images" / "0000000.png").read_bytes() == before
    file = tmp_path / "upgraded" / "settings.json"
    settings = json.loads(file.read_text())
    del settings["weights"]  # as an earlier version wrote it
    file.write_text(json.dumps(settings))
    with pytest.raises(DavaeError, match="an earlier davae, which did not note the weights"):
        opened(debug_base())


def test_what_a_pipeline_holds_is_known_wherever_it_lies(tmp_path):
    small_pipeline("sd3").save_pretrained(tmp_path / "a")
    made = [image_run.contents_hash(load_base(str(tmp_path / "a")))]
    (tmp_path / "a").rename(tmp_path / "b")
    made.append(image_run.contents_hash(load_base(str(tmp_path / "b"))))
    assert made[0] == made[1]
    other = load_base(str(tmp_path / "b"))
    other.tokenizer.add_tokens(["fox"])
    assert image_run.contents_hash(other) != made[0]


def test_models_beside_have_folders_of_their_own(sd3, tmp_path):
    (tmp_path / "p.txt").write_text("a fox\na boat\n")
    settings = RunSettings("upgraded", steps=1, guidance=1.0, height=64, width=64, batch=2)
    others = {"CFG": "upgraded", "cfg": "base", "equal tokens": "base", "equal-tokens": "upgraded"}
    out = tmp_path / "out"
    variants = generate_variants(sd3.__getitem__, settings, out, prompts=tmp_path / "p.txt", others=others)
    folders = {name: run.folder for name, run in variants.runs.items()}
    assert len({str(folder).casefold() for folder in folders.values()}) == 5
    assert {folder.parent for folder in folders.values()} == {out}
