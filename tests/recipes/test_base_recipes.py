"""Base recipes: which data settings are honoured, and that large sets are never held in memory unasked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from davae.data import BatchStream, RenderedDataset
from davae.errors import DavaeError
from davae.recipes.read import load_recipe
from davae.training.base import train as base
from davae.training.base.autoencoder_stage import BaseAutoencoderStage
from davae.training.base.train import dry_run_base
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.diffusion import DiffusionStage, inputs
from davae.training.runs.cache import run_cache
from davae.training.runs.train import run_base
from davae.training.stage import Stage

SMALL = ["data.path=procedural:40", "data.resolution=32", "data.hold_out=6", "data.flip=true"]
NATIVE = ["start_from.pipeline=debug", "transformer.sample.num_inference_steps=1"]
LOOP = ["report_to=[]", "batch_size=4", "validation_images=2", "log_every=1", "precision=no"]


def loop(section: str, *more: str) -> list[str]:
    return [f"{section}.loop.{change}" for change in (*LOOP, *more)]


class Stopped(Exception):
    """Where a test ends a training."""


def test_a_base_has_no_base_to_be_taught_by():
    with pytest.raises(DavaeError, match="base_distillation is for an upgrade"):
        load_recipe("tiny-base", ["transformer.loss.base_distillation=1"])


def test_a_native_fine_tune_reads_images_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = RenderedDataset.item
    monkeypatch.setattr(RenderedDataset, "item", lambda self, i, e: (read.append(i), plain(self, i, e))[1])
    original = BatchStream.__iter__

    def iterate(stream: BatchStream) -> Iterator[dict[str, Any]]:
        counts.append(len(read))
        for batch in original(stream):
            counts.append(len(read))
            yield batch

    counts: list[int] = []
    monkeypatch.setattr(BatchStream, "__iter__", iterate)
    monkeypatch.setattr(inputs, "MEASURED", 6)
    assert load_recipe("imagenet-512-native").data.cache_latents is False
    recipe = [*SMALL, *NATIVE, *loop("transformer", "steps=3", "gradient_accumulation=1"), "data.workers=0"]
    run_base("imagenet-512-native", [*recipe, "data.hold_out=30", "data.cache=null"], tmp_path)
    assert counts[0] <= 6 + 4
    assert [after - before for before, after in pairwise(counts)] == [4, 4, 4]


def test_losses_are_the_same_from_images_from_memory_and_from_a_cache(tmp_path: Path) -> None:
    """Over two epochs of images that are mirrored anew in each."""
    recipe = [*SMALL, *NATIVE, *loop("transformer", "steps=20"), "data.cache_latents=false"]
    message = run_cache("imagenet-small-native", recipe, tmp_path / "kept")
    assert "40 images as 80 latents" in message
    assert "`davae train base --recipe imagenet-small-native data.path=procedural:40" in message
    for name, more in (
        ("images", "data.cache_latents=false"),
        ("memory", "data.cache_latents=true"),
        ("cache", f"data.cache={tmp_path / 'kept'}"),
    ):
        run_base("imagenet-small-native", [*recipe, more], tmp_path / name)
    a, b, c = (
        read_metrics(tmp_path / name / "transformer" / "metrics.jsonl") for name in ("images", "memory", "cache")
    )
    assert len(a) == 21
    for one, second, third in zip(a, b, c, strict=True):
        assert one == pytest.approx(second, rel=1e-5, abs=1e-6)
        assert one == pytest.approx(third, rel=1e-5, abs=1e-6)


def test_the_large_recipe_trains_from_a_cache_that_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match=r"run `davae cache --recipe imagenet-512-native .*data\.cache=null"):
        run_base("imagenet-512-native", NATIVE, tmp_path)
    with pytest.raises(DavaeError, match="remove --autoencoder"):
        run_cache("imagenet-small-native", NATIVE, tmp_path / "cache", tmp_path)
    with pytest.raises(DavaeError, match="'imagenet-small-base' trains an autoencoder first, from images"):
        run_cache("imagenet-small-base", [], tmp_path / "cache")
    assert "encoding images" not in dry_run_base(load_recipe("imagenet-512-native"))
    assert "encoding images" in dry_run_base(load_recipe("imagenet-512-native", ["data.cache=null"]))
    assert "encoding images" in dry_run_base(load_recipe("tiny-base", ["data.cache_latents=false"]))


@pytest.mark.parametrize("kept", ["true", "false"])
def test_loader_processes_and_their_time_are_those_of_the_recipe(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Stage] = []

    def stop(started: Stage, *_: Any) -> None:
        seen.append(started)
        raise Stopped

    monkeypatch.setattr(base, "train", stop)
    data = [*SMALL, "data.workers=1", "data.timeout_s=77", f"data.cache_latents={kept}"]
    with pytest.raises(Stopped):
        run_base("imagenet-small-native", [*data, *NATIVE], tmp_path)
    with pytest.raises(Stopped):
        run_base("imagenet-small-base", [*data, "data.resolution=64"], tmp_path)
    assert [type(stage) for stage in seen] == [DiffusionStage, BaseAutoencoderStage]
    assert [(stage.workers, stage.timeout_s) for stage in seen] == [(1, 77.0)] * 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("downsample=2 data.cache=caches/x", r"data\.cache and data\.cache_dtype need start_from"),
        ("downsample=2 data.cache_dtype=float16", r"data\.cache and data\.cache_dtype need start_from"),
        ("data.buckets=true", "data: the training of a base has one size"),
        ('data.more=[{"path":"a","resolution":64}]', "data: the training of a base has one size"),
        ("data.crop=random", r"data\.crop=random .*data\.cache_latents"),
        ("full_resolution_crops=0.5", "full_resolution_crops are for training an autoencoder"),
    ],
)
def test_what_a_base_recipe_cannot_honour_is_refused(override: str, message: str) -> None:
    with pytest.raises(DavaeError, match=rf"^recipe 'imagenet-small-native': {message}"):
        load_recipe("imagenet-small-native", override.split())
