"""Two processes share validation, encoding and caching out, and find what one finds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tests.end_to_end import children
from tests.end_to_end.shared_work import IMAGES, main, work

from davae.data.cache import LatentCache, verify_cache


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    children.together(main, two, log=two / "log")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seen = work(one)
    torch.set_num_threads(threads)
    return (one, seen), (two, json.loads((two / "seen.json").read_text()))


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion-debug", "diffusion-debug-sd3"])
def test_metrics_and_pictures_are_those_of_one_process(stage, both):
    (one, alone), (two, shared) = both
    assert shared[stage] == pytest.approx(alone[stage], rel=1e-5, abs=1e-6)  # the drift of previews is all rounding
    names = {"psnr", "alignment"} if stage == "autoencoder" else {"held_out_total", "swd/finest"}
    assert names <= shared[stage].keys()
    pictures = [np.asarray(Image.open(out / stage / "step-1.png")).astype(int) for out in (one, two)]
    assert pictures[0].shape == pictures[1].shape
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_latents_and_texts_in_memory_are_those_of_one_process(both):
    (_, alone), (_, shared) = both
    for name in ("latents-debug", "latents-debug-sd3", "texts"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("base", ["debug", "debug-sd3"])
def test_the_cache_holds_what_one_process_writes(base, both):
    folders = [out / f"cache-{base}" for out, _ in both]
    alone, shared = map(LatentCache, folders)
    assert alone.fingerprint == shared.fingerprint
    assert len(alone) == len(shared) == IMAGES
    for index in range(len(alone)):
        for epoch in range(4):  # both mirrorings
            a, b = alone.item(index, epoch), shared.item(index, epoch)
            assert torch.equal(a.pop("latent"), b.pop("latent"))
            texts = a.pop("conditioning", {}), b.pop("conditioning", {})
            assert texts[0].keys() == texts[1].keys()
            assert all(torch.equal(value, texts[1][name]) for name, value in texts[0].items())
            assert a == b
    assert verify_cache(folders[1]) >= 4
    assert not list(folders[1].glob(".index-*")), "one index is left"
