"""`davae cache` and training from it: the same losses as from images, and refusal of what does not fit."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tests.data.files import picture
from typer.testing import CliRunner

from davae.bases.open import load_base
from davae.cli.main import app
from davae.data.cache import LATENTS, TEXTS, LatentCache, caption_key, weights_hash
from davae.diffusion import FlowProcess
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families import family_of
from davae.recipes.data import DataSettings
from davae.recipes.read import load_recipe
from davae.recipes.settings import UpgradeRecipe
from davae.runtime import pixel_budget
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.cache import write as caching
from davae.training.cache.write import open_cache, write_cache
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.data import open_training_part, token_side
from davae.training.diffusion import DiffusionObjective
from davae.training.runs.cache import run_cache, run_verify
from davae.training.runs.train import train_autoencoder, train_diffusion

STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tall, square and wide pictures with captions, two of them the same; one without, one damaged."""
    root = tmp_path_factory.mktemp("pictures")
    sizes = {"tall": (40, 80), "square": (64, 64), "wide": (90, 48)}
    for number, (name, size) in enumerate(sizes.items()):
        (root / name).mkdir()
        for i in range(4):
            picture(10 * number + i, size).save(root / name / f"{i}.png")
            if i:
                (root / name / f"{i}.txt").write_text(f"a {name} picture{'' if i < 3 else ', again'}")
    whole = (root / "wide" / "2.png").read_bytes()
    (root / "wide" / "2.png").write_bytes(whole[: len(whole) // 2])
    return root


def base_and_vae(name: str) -> tuple[DiffusionPipeline, AutoencoderDA]:
    base = load_base(name)
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    torch.manual_seed(1)
    vae.set_detail_statistics(torch.randn(8) * 0.1, torch.rand(8) + 0.5)
    return base, vae.eval()


def settings(base: str, path: Path, *more: str) -> UpgradeRecipe:
    recipe = load_recipe(
        "debug",
        [
            f"base={base}",
            f"data.path={path}",
            "data.hold_out=2",
            "data.flip=true",
            "data.cache_latents=false",
            f"diffusion.loop.steps={STEPS}",
            "diffusion.loop.batch_size=3",
            "diffusion.loop.checkpoint_every=100",
            "diffusion.loop.validation_images=1",
            "diffusion.sample.num_inference_steps=1",
            *more,
        ],
    )
    assert isinstance(recipe, UpgradeRecipe)
    return recipe


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ("debug", []),
        ("debug-sd3", ["diffusion.tune.mode=lora"]),
        ("debug-sd3", ["data.buckets=true", "data.resolution=64"]),
        ("debug-flux", ["data.more=[{path: PICTURES, resolution: 64}]"]),
    ],
    ids=["class", "text", "text, buckets", "text, resolutions"],
)
def test_losses_are_those_of_training_from_images(base: str, more: list[str], pictures: Path, tmp_path: Path) -> None:
    """Order, mirroring, noise and dropped prompts are the same, in the sizes of buckets and of resolutions."""
    more = [text.replace("PICTURES", str(pictures)) for text in more]
    _, vae = base_and_vae(base)
    vae.save_pretrained(tmp_path / "vae")
    run_cache_of = settings(base, pictures, *more)
    made = write_cache(run_cache_of.data, vae, load_base(base), tmp_path / "cache")
    assert made.entries == 2 * made.images == 20 * len(run_cache_of.data.resolutions)
    assert made.texts == (0 if base == "debug" else 6)  # "" among them, each once

    train_diffusion(run_cache_of, tmp_path / "images", tmp_path / "vae")
    cached = settings(base, pictures, *more, f"data.cache={tmp_path / 'cache'}")
    train_diffusion(cached, tmp_path / "cached", tmp_path / "vae")
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("images", "cached"))
    assert len(a) == STEPS + 1
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    if not run_cache_of.data.of_one_size:
        cache = LatentCache(tmp_path / "cache")
        assert cache.bucket_of is not None
        sizes = 3 if run_cache_of.data.buckets else 2
        assert len({cache[i]["latent"].shape for i in range(len(cache))}) == sizes
    if len(run_cache_of.data.resolutions) > 1:
        other = settings(base, pictures, f"data.more=[{{path: {pictures}, resolution: 48}}]")
        with pytest.raises(DavaeError, match="more resolutions"):
            open_cache(other.data.model_copy(update={"cache": str(tmp_path / "cache")}), vae, load_base(base))


def test_drawn_details_are_the_same_from_a_cache_from_memory_and_from_images(pictures: Path, tmp_path: Path) -> None:
    """Of the class-conditional base, whose transformer draws labels: noise and mirroring are the same too."""
    _, vae = base_and_vae("debug")
    vae.save_pretrained(tmp_path / "vae")
    draws = ["diffusion.sample_details=true", "diffusion.loop.steps=4"]
    cache = f"data.cache={tmp_path / 'cache'}"
    run = settings("debug", pictures, *draws)
    write_cache(run.data, vae, load_base("debug"), tmp_path / "cache", details_seed=run.diffusion.loop.seed)
    ways = {"images": [], "memory": ["data.cache_latents=true"], "cached": [cache], "means": []}
    for name, more in ways.items():
        changed = [*more, "diffusion.sample_details=false"] if name == "means" else more
        train_diffusion(settings("debug", pictures, *draws, *changed), tmp_path / name, tmp_path / "vae")
    images, memory, cached, means = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ways)
    for one, two, three in zip(images, memory, cached, strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-6)
        assert one == pytest.approx(three, rel=1e-6, abs=1e-6)
    assert abs(images[0]["detail"] - means[0]["detail"]) > 1e-3
    for other, words in (
        (["diffusion.sample_details=false"], r"seed of the details' draws: 0 -> "),
        (["diffusion.loop.seed=1"], r"seed of the details' draws: 0 -> 1"),
    ):
        with pytest.raises(DavaeError, match=f"was made of something else.*{words}"):
            train_diffusion(settings("debug", pictures, *draws, cache, *other), tmp_path / "no", tmp_path / "vae")


def test_drawn_details_have_the_posterior_s_deviation_and_one_draw_an_image() -> None:
    base, vae = base_and_vae("debug")
    family, images = family_of(base), torch.rand(3, 3, 32, 32) * 2 - 1
    means, drawn = family.latents_of(vae, images), family.latents_of(vae, images, details_seed=5)
    alone = torch.cat([family.latents_of(vae, image[None], details_seed=5) for image in images])
    torch.testing.assert_close(alone, drawn)
    torch.testing.assert_close(drawn[:, :4], means[:, :4])  # the base's part is its mean
    std = vae.encode(images).latent_dist.std[:, 4:].detach() * vae.config.scaling_factor
    noise = ((drawn - means)[:, 4:] / std).flatten(1)
    assert abs(float(noise.std()) - 1) < 0.1
    assert abs(float(torch.corrcoef(noise[:2])[0, 1])) < 0.25  # another image, another draw
    other = ((family.latents_of(vae, images[:1], details_seed=6) - means[:1])[:, 4:] / std[:1]).flatten()
    assert abs(float(torch.corrcoef(torch.stack([noise[0], other]))[0, 1])) < 0.25  # another seed
    with pytest.raises(DavaeError, match="has no details to draw"):
        family.latents_of(base.vae, images, details_seed=5)


def test_entries_are_the_latents_and_embeddings_of_the_pipeline(pictures: Path, tmp_path: Path) -> None:
    base, vae = base_and_vae("debug-sd3")
    data = settings("debug-sd3", pictures).data
    write_cache(data, vae, base, tmp_path / "c")
    cache = open_cache(data.model_copy(update={"cache": str(tmp_path / "c")}), vae, base)
    images = open_training_part(data, vae, base)
    family = family_of(base)
    for index in range(len(images)):
        item, image = cache.item(index, 5), images.item(index, 5)
        torch.testing.assert_close(item["latent"], family.latents_of(vae, image["image"][None])[0])
        assert (item["id"], item["label"], item["caption"], item["skipped"]) == tuple(
            image[k] for k in ("id", "label", "caption", "skipped")
        )
        for name, value in family.encode_prompts(base, [image["caption"]]).items():
            torch.testing.assert_close(item["conditioning"][name], value[0])
    assert any(cache[i]["skipped"] for i in range(len(cache))), "the damaged file is still named"
    for name, value in family.encode_prompts(base, [""]).items():
        assert cache.empty_conditioning is not None
        torch.testing.assert_close(cache.empty_conditioning[name], value[0])


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_a_run_that_was_stopped_goes_on(
    form: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, vae = base_and_vae("debug-sd3")
    data = settings("debug-sd3", pictures).data
    monkeypatch.setattr(pixel_budget, "PIXELS", 2 * data.resolution**2)
    monkeypatch.setattr(caching, "PROMPTS_TOGETHER", 2)
    write_cache(data, vae, base, tmp_path / "whole", form=form, shard_records=3)
    added: list[str] = []
    add = caching.CacheWriter.add

    def stopping(writer: Any, kind: str, record: Any) -> None:
        add(writer, kind, record)
        added.append(record.key)
        if len(added) in {5, 16, 24}:
            raise KeyboardInterrupt

    monkeypatch.setattr(caching.CacheWriter, "add", stopping)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            write_cache(data, vae, base, tmp_path / "c", form=form, shard_records=3)
    made = write_cache(data, vae, base, tmp_path / "c", form=form, shard_records=3)
    assert len(added) <= 26 + 3 * 2, "committed work is not done again"
    assert (made.entries, made.texts) == (20, 6)
    run_verify(tmp_path / "c")
    whole, found = LatentCache(tmp_path / "whole"), LatentCache(tmp_path / "c")
    for i in range(10):
        a, b = whole.item(i, 0), found.item(i, 0)
        torch.testing.assert_close(a.pop("latent"), b.pop("latent"))
        for name, value in a.pop("conditioning").items():
            torch.testing.assert_close(value, b["conditioning"][name])
        b.pop("conditioning")
        assert a == b
    before = len(added)
    write_cache(data, vae, base, tmp_path / "c", form=form)
    assert len(added) == before, "a finished cache is left as it is"


def test_what_differs_is_named(pictures: Path, tmp_path: Path) -> None:
    base, vae = base_and_vae("debug-sd3")
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    data = settings("debug-sd3", folder, f"data.cache={tmp_path / 'c'}").data
    write_cache(data, vae, base, tmp_path / "c")

    def refusal(changed: DataSettings = data, vae: AutoencoderDA = vae) -> str:
        with pytest.raises(DavaeError, match="made of something else") as caught:
            open_cache(changed, vae, base)
        return str(caught.value)

    assert len(open_cache(data, vae, base)) == 10
    assert "data.resolution: 32 -> 64" in refusal(data.model_copy(update={"resolution": 64}))
    assert "data.flip: true -> false" in refusal(data.model_copy(update={"flip": False}))
    assert "data.buckets: null -> [[" in refusal(data.model_copy(update={"buckets": True}))
    assert 'dtype: "float32" -> "float16"' in refusal(data.model_copy(update={"cache_dtype": "float16"}))

    other = base_and_vae("debug-sd3")[1]
    other.set_detail_statistics(torch.zeros(8), torch.ones(8))
    assert "vae config.detail_mean" in refusal(vae=other)
    other = base_and_vae("debug-sd3")[1]
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if not n.startswith("base")).add_(1e-3)
    assert "vae weights. Use" in refusal(vae=other)
    encoder = base.text_encoder_3.get_input_embeddings().weight
    before = encoder.detach().clone()
    with torch.no_grad():
        encoder.add_(1.0)
    assert "text_encoder_3.weights. Use" in refusal()
    with torch.no_grad():
        encoder.copy_(before)

    (folder / "tall" / "1.txt").write_text("a short picture")
    os.utime(folder / "tall" / "3.png", (1, 1))  # the same bytes, as after a copy
    picture(99, (40, 80)).save(folder / "tall" / "2.png")
    text = refusal()
    assert "1 file changed: tall/2.png; 1 caption changed: tall/1.png" in text
    with pytest.raises(DavaeError, match="random crops cannot be cached"):
        open_cache(data.model_copy(update={"crop": "random"}), vae, base)
    with pytest.raises(DavaeError, match="random crops cannot be cached"):
        write_cache(data.model_copy(update={"crop": "random"}), vae, base, tmp_path / "d")


def test_captions_are_stored_once(pictures: Path, tmp_path: Path) -> None:
    base, vae = base_and_vae("debug-sd3")
    write_cache(settings("debug-sd3", pictures).data, vae, base, tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    captions = {cache[i]["caption"] for i in range(len(cache))} | {""}
    assert set(cache._texts) == {caption_key(caption) for caption in captions}
    with pytest.raises(DavaeError, match="does not hold the caption 'a dragon'"):
        cache.conditioning("a dragon")


@pytest.mark.parametrize(("name", "side"), [("debug", 8), ("debug-sd3", 8), ("debug-flux", 8)])
def test_the_side_of_a_token(name: str, side: int) -> None:
    """s f patch: the factor by which an image gets larger when the transformer gets one more token a side."""
    base, vae = base_and_vae(name)
    found = token_side(vae, base)
    latent = torch.zeros(1, 1, 4 * found // vae.spatial_compression, 4 * found // vae.spatial_compression)
    assert family_of(base).tokens(base.transformer, latent) == 16
    assert found % side == 0


class Killed(BaseException):
    """As a kill."""


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_several_resolutions_in_one_run(
    stage: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are of one resolution, noise is shifted by the pipeline's rule, and a killed run goes on exactly."""
    base, vae = base_and_vae("debug-flux")
    vae.save_pretrained(tmp_path / "vae")
    recipe = settings(
        "debug-flux", pictures, f"data.more=[{{path: {pictures}, resolution: 64}}]", "data.workers=2",
        *(f"{stage}.loop.{key}" for key in ("steps=10", "checkpoint_every=4", "log_every=1")),
    )  # fmt: skip
    module = DiffusionObjective if stage == "diffusion" else StructuredObjective
    forward, draw = module.forward, FlowProcess.draw
    seen: list[int] = []
    drawn: list[tuple[int, float]] = []
    die_at = 7

    def recorded(self: Any, batch: dict[str, Any], step: int) -> Any:
        if self.training:
            seen.append(batch["image"].shape[-1])
            if step == die_at:
                raise Killed
        return forward(self, batch, step)

    def shifted(self: FlowProcess, data: torch.Tensor) -> Any:
        sample = draw(self, data)
        drawn.append((data.shape[-1], self.shift(data)))
        return sample

    monkeypatch.setattr(module, "forward", recorded)
    monkeypatch.setattr(FlowProcess, "draw", shifted)

    def run(out: Path) -> list[int]:
        seen.clear()
        if stage == "diffusion":
            train_diffusion(recipe, out, tmp_path / "vae")
        else:
            train_autoencoder(recipe, out)
        return list(seen)

    with pytest.raises(Killed):
        run(tmp_path / "killed")
    before, die_at = list(seen), -1
    after = run(tmp_path / "killed")
    whole = run(tmp_path / "whole")
    assert set(whole) == {32, 64}
    assert before[:-1] == whole[: len(before) - 1]
    assert after == whole[len(whole) * 4 // 10 :]  # from the checkpoint
    runs = tmp_path / "killed", tmp_path / "whole"
    assert read_metrics(runs[0] / "metrics.jsonl") == read_metrics(runs[1] / "metrics.jsonl")
    weights = [sorted((out / "checkpoints" / "step-10").rglob("*.safetensors")) for out in runs]
    assert len(weights[0]) == len(weights[1]) > 0
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*weights))
    if stage == "diffusion":
        for side, shift in drawn:  # f16, a token of two by two latent positions
            config = upgrade_pipeline(base, vae).scheduler.config
            mu = calculate_shift(
                (side // 2) ** 2,
                *(config[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")),
            )
            assert shift == pytest.approx(math.exp(mu))
        assert len({shift for _, shift in drawn}) == 2


def test_both_stages_train_in_buckets(pictures: Path, tmp_path: Path) -> None:
    """The autoencoder too, with its statistics over three shapes, and sizes that a person chose."""
    recipe = settings(
        "debug-sd3", pictures, "data.buckets=[[16, 48], [32, 32]]", "autoencoder.loop.steps=3",
        "diffusion.loop.steps=3",
    )  # fmt: skip
    stage1 = train_autoencoder(recipe, tmp_path / "autoencoder")
    stage2 = train_diffusion(recipe, tmp_path / "diffusion", stage1.result)
    assert stage2.steps == 3
    with pytest.raises(DavaeError, match=r"\[30, 32\] is not \[width, height\] in multiples"):
        train_diffusion(settings("debug-sd3", pictures, "data.buckets=[[30, 32]]"), tmp_path / "x", stage1.result)


def test_the_verb(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, vae = base_and_vae("debug")
    vae.save_pretrained(tmp_path / "vae")
    out = tmp_path / "c"
    arguments = ["cache", "--recipe", "debug", "--autoencoder", str(tmp_path / "vae"), "--out", str(out)]
    data = [f"data.path={pictures}", "data.resolution=32", "data.hold_out=2"]
    result = CliRunner().invoke(app, [*arguments, "--format", "webdataset", *data], catch_exceptions=False)
    assert result.exit_code == 0
    assert "10 images as 10 latents" in result.output
    assert "data.cache=" in result.output
    with monkeypatch.context() as patch:  # a cache that nobody may write to can be compared
        patch.setattr(os, "access", lambda _, mode, **__: not mode & os.W_OK)
        assert CliRunner().invoke(app, [*arguments, "--verify"]).output.startswith("1 shards as they were written")
    with pytest.raises(DavaeError, match="davae train autoencoder"):
        run_cache("debug", [], out, tmp_path / "nothing")
    with pytest.raises(DavaeError, match="cannot use a cache"):
        run_cache("tiny-base", [], out, tmp_path / "vae")
    assert LATENTS != TEXTS


class Encoded:
    """Counts the images and the captions that are encoded."""

    def __init__(self, base: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        family = family_of(base)
        latents_of, encode_prompts = family.latents_of, family.encode_prompts
        self.images, self.captions = 0, list[str]()

        def latents(vae: Any, images: torch.Tensor, **options: Any) -> torch.Tensor:
            self.images += len(images)
            return latents_of(vae, images, **options)

        def prompts(pipe: Any, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
            self.captions += texts
            return encode_prompts(pipe, texts, **options)

        monkeypatch.setattr(family, "latents_of", latents)
        monkeypatch.setattr(family, "encode_prompts", prompts)


def same_items(one: Path, other: Path) -> None:
    caches = [LatentCache(folder) for folder in (one, other)]
    assert len(caches[0]) == len(caches[1])
    for index in range(len(caches[0])):
        for epoch in range(3):
            a, b = (cache.item(index, epoch) for cache in caches)
            for name in ("id", "label", "caption", "skipped"):
                assert a[name] == b[name]
            torch.testing.assert_close(a["latent"], b["latent"])
            torch.testing.assert_close(a["conditioning"], b["conditioning"])


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_a_cache_is_brought_up_to_date(
    form: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded is what is new; the rest is what a cache of the new images holds. A kill in the middle does no harm."""
    base, vae = base_and_vae("debug-sd3")
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    data = settings("debug-sd3", folder, f"data.cache={tmp_path / 'c'}").data
    write_cache(data, vae, base, tmp_path / "c", form=form, shard_records=4)
    old = LatentCache(tmp_path / "c")
    before = {old.id(index) for index in range(len(old))}
    shutil.copytree(folder, tmp_path / "unchanged")

    for number in range(3):  # one of the three is trained on at least, whatever is held out
        picture(50 + number, (64, 64)).save(folder / "square" / f"new-{number}.png")
        (folder / "square" / f"new-{number}.txt").write_text("a new picture")
    (folder / "tall" / "0.png").unlink()
    picture(99, (40, 80)).save(folder / "tall" / "2.png")
    (folder / "wide" / "1.txt").write_text("another text")
    (folder / "wide" / "3.txt").write_text("another text")
    os.utime(folder / "square" / "3.png", (1, 1))  # the same bytes, as after a copy
    with pytest.raises(DavaeError, match="Give the same `davae cache` command again"):
        open_cache(data, vae, base)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("davae.data.cache.fingerprint.Fingerprint.save", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_cache(data, vae, base, tmp_path / "c", form=form)
    with pytest.raises(DavaeError, match="is not finished"):
        LatentCache(tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "back")

    with monkeypatch.context() as patch:
        encoded = Encoded(base, patch)
        write_cache(data, vae, base, tmp_path / "c", form=form)
    write_cache(data, vae, base, tmp_path / "fresh", form=form)
    same_items(tmp_path / "c", tmp_path / "fresh")
    made = LatentCache(tmp_path / "c")
    new = {made.id(index) for index in range(len(made))} - before | {"tall/2.png"}
    assert encoded.images == 2 * (len(new) + 1)  # mirrored too; the damaged image is asked again
    assert set(encoded.captions) <= {"a new picture", "another text"}
    assert len(open_cache(data, vae, base)) == len(LatentCache(tmp_path / "fresh"))
    run_verify(tmp_path / "c")

    for name in ("pictures", "unchanged"):  # the images are as they were before all that
        (tmp_path / name).rename(tmp_path / f"{name}-away")
    (tmp_path / "unchanged-away").rename(folder)
    for copy in ("c", "back"):
        write_cache(data, vae, base, tmp_path / copy, form=form)
    write_cache(data, vae, base, tmp_path / "fresh-before", form=form)
    same_items(tmp_path / "c", tmp_path / "fresh-before")
    same_items(tmp_path / "back", tmp_path / "fresh-before")


def test_a_cache_of_scenes_is_brought_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes are known by the names that their records have; a cache of an earlier version, which had others, opens."""
    base, vae = base_and_vae("debug-sd3")
    few, more = (
        settings("debug-sd3", path, "data.resolution=32", f"data.cache={tmp_path / 'c'}").data
        for path in (Path("procedural:6"), Path("procedural:9"))
    )
    write_cache(few, vae, base, tmp_path / "c")
    with monkeypatch.context() as patch:
        encoded = Encoded(base, patch)
        write_cache(more, vae, base, tmp_path / "c")
        assert encoded.images == 2 * 3  # mirrored too
        assert len(encoded.captions) <= 3
    write_cache(more, vae, base, tmp_path / "fresh")
    same_items(tmp_path / "c", tmp_path / "fresh")
    made, scenes = LatentCache(tmp_path / "c"), open_training_part(more, vae, base)
    assert made.sizes_by_name().keys() == scenes.sizes_by_name().keys()  # a run may go on with either
    facts = [(fact.label, fact.caption) for fact in made.fingerprint.sources.values()]
    assert facts == [(item["label"], caption_key(item["caption"])) for item in scenes]

    monkeypatch.setattr(caching, "version_of", lambda folder: 2)
    write_cache(few, vae, base, tmp_path / "earlier")
    assert "procedural/1" in LatentCache(tmp_path / "earlier").fingerprint.sources
    monkeypatch.undo()
    assert len(open_cache(few.model_copy(update={"cache": str(tmp_path / "earlier")}), vae, base)) == 6


def test_text_is_kept_as_the_encoder_gives_it(pictures: Path, tmp_path: Path) -> None:
    base, vae = base_and_vae("debug-sd3")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(base, name).to(torch.bfloat16)
    write_cache(settings("debug-sd3", pictures).data, vae, base, tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    line = cache._texts[caption_key("")]
    kept = cache._reader.read(line)
    assert {t.dtype for t in kept.values() if t.is_floating_point()} == {torch.bfloat16}
    assert {t.dtype for t in cache.conditioning("").values() if t.is_floating_point()} == {torch.float32}
    assert cache._reader.read(cache._plain[0])["latent"].dtype == torch.float32


def test_captions_are_asked_for_before_the_first_image(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, vae = base_and_vae("debug-sd3")
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    for text in folder.rglob("*.txt"):
        text.unlink()
    encoded = Encoded(base, monkeypatch)
    with pytest.raises(DavaeError, match=r"none of the 1[0-9] images has one"):
        write_cache(settings("debug-sd3", folder).data, vae, base, tmp_path / "c")
    assert encoded.images == 0
    assert not (tmp_path / "c").exists()


def test_a_base_saved_in_half_precision_from_end_to_end(pictures: Path, tmp_path: Path) -> None:
    """Stage 1, cache and stage 2 read it in precisions of their own: the weights are the same ones."""
    load_base("debug-sd3").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    recipe = settings(base, pictures, "autoencoder.loop.steps=1", "diffusion.loop.steps=1", "diffusion.tune.mode=lora")
    stage1 = train_autoencoder(recipe, tmp_path / "autoencoder")
    cached = [
        f"base={base}", f"data.path={pictures}", "data.hold_out=2", "data.flip=true", f"data.cache={tmp_path / 'c'}",
        "diffusion.tune.mode=lora", "diffusion.tune.frozen_dtype=bfloat16", "diffusion.loop.precision=bf16",
        "diffusion.loop.steps=1",
        "diffusion.loop.batch_size=3", "diffusion.loop.validation_images=1", "diffusion.sample.num_inference_steps=1",
    ]  # fmt: skip
    run_cache("debug", cached, tmp_path / "c", stage1.result)
    made = load_recipe("debug", cached)
    assert isinstance(made, UpgradeRecipe)
    train_diffusion(made, tmp_path / "diffusion", stage1.result)
    assert (tmp_path / "diffusion" / "pipeline" / "model_index.json").is_file()


def test_a_weight_s_hash_says_nothing_of_its_precision() -> None:
    layer = torch.nn.Linear(3, 2).to(torch.bfloat16)
    hashes = {weights_hash(layer), weights_hash(layer.float()), weights_hash(layer.to(torch.bfloat16))}
    assert len(hashes) == 1
    assert weights_hash(layer, by_dtype=True) != weights_hash(layer.float(), by_dtype=True)
