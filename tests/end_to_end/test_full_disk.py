"""A disk that fills up under a training or a cache: one line, nothing lost, and the same command goes on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import small_tmpfs

from davae.bases.open import load_base
from davae.data.cache import LatentCache, verify_cache
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.recipes.read import load_recipe
from davae.training.cache.write import write_cache
from davae.training.checkpoints.checkpoint import checkpoints, load_checkpoint
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.runs.train import train_autoencoder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 megabytes, where the tests may make one."""
    with small_tmpfs(tmp_path / "disk", 16) as folder:
        yield folder


def _fill(disk, leave):
    """A file that leaves so many bytes free."""
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - leave))
    return filler


def _recipe():
    loop = ("steps=4", "checkpoint_every=2", "log_every=1", "validation_images=2", "report_to=[]")
    options = [f"autoencoder.loop.{option}" for option in loop]
    return load_recipe("debug", [*options, "data.path=procedural:8", "data.hold_out=2"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps, undisturbed."""
    return train_autoencoder(_recipe(), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("leave", [0, 100_000], ids=["nothing free", "no room for a checkpoint"])
def test_a_training_tells_and_goes_on_where_it_was(leave, small_disk, whole):
    run = small_disk / "run"
    shutil.copytree(whole.out, run)
    for gone in ("checkpoints/step-4", "autoencoder"):  # as a kill after step 2 leaves it
        shutil.rmtree(run / gone)
    filler = _fill(small_disk, leave)
    kept = (run / "config.yaml").read_text()
    with pytest.raises(DavaeError, match=r"the disk is full.*run the same command again"):
        train_autoencoder(_recipe(), run)
    assert (run / "config.yaml").read_text() == kept
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-2"]
    load_checkpoint(run / "checkpoints" / "step-2")

    filler.unlink()
    again = train_autoencoder(_recipe(), run)
    assert again.metrics == whole.metrics
    assert read_metrics(run / "metrics.jsonl") == read_metrics(whole.out / "metrics.jsonl")
    weights = [load_file(out / "checkpoints" / "step-4" / "model.safetensors") for out in (run, whole.out)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_cache_tells_and_goes_on_where_it_was(small_disk):
    base = load_base("debug")
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    vae.set_detail_statistics(torch.zeros(8), torch.ones(8))
    data = load_recipe("debug", ["data.path=procedural:64", "data.hold_out=2"]).data
    filler = _fill(small_disk, 40_000)  # less than 64 latents of 768 bytes, more than 20 of them
    with pytest.raises(DavaeError, match=r"the disk is full.*shards that were written are whole"):
        write_cache(data, vae, base, small_disk / "cache", shard_records=10)
    with pytest.raises(DavaeError, match="not finished"):
        LatentCache(small_disk / "cache")
    filler.unlink()
    assert write_cache(data, vae, base, small_disk / "cache", shard_records=10).images == 64
    assert verify_cache(small_disk / "cache") == 7
    assert len(LatentCache(small_disk / "cache")) == 64
