"""Shards, index and fingerprint: what was written comes back, what was not finished goes on, what differs is named."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from davae.data import BatchStream, item_generator
from davae.data.cache import (
    LATENTS,
    TEXTS,
    CacheWriter,
    Fingerprint,
    LatentCache,
    Record,
    SourceFact,
    caption_key,
    verify_cache,
    weights_hash,
)
from davae.data.cache.index import merge_journals
from davae.errors import DavaeError

FORMATS = ["safetensors", "webdataset"]
CAPTIONS = ["", "a fox", "a cat"]


def fingerprint(dtype: str = "float32", **facts: Any) -> Fingerprint:
    sources = {f"{i}.jpg": SourceFact(f"{i} bytes", i, caption_key("x")) for i in range(6)}
    return Fingerprint({"vae weights": "sha256:1", "data": {"resolution": 64}, **facts, "dtype": dtype}, sources)


def latent(position: int, flip: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * position + flip)
    return torch.randn(4, 2, 3, generator=generator)


def records(flips: tuple[bool, ...] = (False, True)) -> list[Record]:
    found = []
    for position in range(6):
        for flip in flips:
            facts = {
                "position": position,
                "flip": flip,
                "id": f"{position}.jpg",
                "label": position,
                "caption": CAPTIONS[position % 3],
                "bucket": 0,
                "skipped": [["bad.jpg", "damaged"]] if position == 2 else [],
            }
            tensors = {"latent": latent(position, flip)}
            found.append(Record(f"{position}{'-flip' if flip else ''}", tensors, facts))
    return found


def texts() -> list[Record]:
    return [
        Record(
            caption_key(caption),
            {"embeds": torch.full((3, 2), float(i)), "mask": torch.tensor([1, 0, i])},
            {"text": caption},
        )
        for i, caption in enumerate(CAPTIONS)
    ]


def write(folder: Path, form: Any = "safetensors", dtype: str = "float32", **options: Any) -> Path:
    writer = CacheWriter(folder, fingerprint(dtype), form=form, about={"classes": ["a"]}, shard_records=5, **options)
    for record in records():
        writer.add(LATENTS, record)
    for record in texts():
        writer.add(TEXTS, record)
    writer.finish({"images": 6, "texts": 3})
    return folder


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_written_comes_back(form: str, tmp_path: Path) -> None:
    cache = LatentCache(write(tmp_path / "c", form), wanted=fingerprint(), seed=3)
    assert len(cache) == 6
    assert cache.classes == ["a"]
    drawn = set()
    for epoch in range(4):
        for i in range(6):
            item = cache.item(i, epoch)
            flip = item_generator(3, epoch, i).random() < 0.5  # as the data set of images draws it
            drawn.add(flip)
            assert torch.equal(item["latent"], latent(i, flip))
            assert (item["label"], item["caption"], item["id"]) == (i, CAPTIONS[i % 3], f"{i}.jpg")
            assert item["conditioning"]["embeds"].mean() == i % 3
            assert item["conditioning"]["mask"].tolist() == [1, 0, i % 3]
    assert drawn == {True, False}
    assert cache.item(2, 0)["skipped"] == [("bad.jpg", "damaged")]
    assert cache.empty_conditioning is not None
    assert cache.empty_conditioning["mask"].dtype == torch.int64
    assert len(list((tmp_path / "c").glob("latents-*"))) == 3  # 12 records, 5 a shard
    with pytest.raises(IndexError):
        cache[6]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_batches(form: str, workers: int, tmp_path: Path) -> None:
    cache = LatentCache(write(tmp_path / "c", form))
    cache[0]  # opens a file that the workers must not share
    batch = next(iter(BatchStream(cache, 6, workers=workers)))
    assert batch["latent"].shape == (6, 4, 2, 3)
    assert batch["conditioning"]["embeds"].shape == (6, 3, 2)
    assert torch.equal(batch["conditioning"]["mask"][:, 2], batch["label"] % 3)
    copied = pickle.loads(pickle.dumps(cache))  # noqa: S301 (our own, as spawned workers get it)
    assert torch.equal(copied.item(1, 0)["latent"], cache.item(1, 0)["latent"])


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_precision_halves_the_file_and_rounds(dtype: str, error: float, tmp_path: Path) -> None:
    half = LatentCache(write(tmp_path / "half", dtype=dtype))
    found = half.item(1, 0)["latent"]
    exact = [latent(1, flip) for flip in (False, True)]
    assert found.dtype == torch.float32
    assert 0 < min(float((found - e).abs().max()) for e in exact) < 4 * error
    assert half.conditioning("a cat")["mask"].dtype == torch.int64
    with pytest.raises(DavaeError, match=rf'dtype: "{dtype}" -> "float32"'):
        LatentCache(tmp_path / "half", wanted=fingerprint())


def test_a_slow_run_closes_its_shards_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run has lost no more than ``shard_seconds`` of work, however small its shards are by then."""
    now = [100.0]
    monkeypatch.setattr("davae.data.cache.writer.time.monotonic", lambda: now[0])
    writer = CacheWriter(tmp_path / "c", fingerprint(), shard_records=1000, shard_seconds=60.0)
    for record in records()[:7]:  # at 0, 25, 50, 75 | 100, 125, 150
        writer.add(LATENTS, record)
        now[0] += 25.0
    again = CacheWriter(tmp_path / "c", fingerprint(), shard_records=1000)
    assert again.done[LATENTS] == {record.key for record in records()[:4]}


def test_webdataset_shards_are_plain_tars(tmp_path: Path) -> None:
    write(tmp_path / "c", "webdataset")
    with tarfile.open(tmp_path / "c" / "latents-00000.tar") as archive:
        names = archive.getnames()
        assert names[:2] == ["0.safetensors", "0.json"]
        beside = archive.extractfile("0.json")
        assert beside is not None
        assert json.loads(beside.read())["label"] == 0
    write(tmp_path / "d", "webdataset")
    same = [(tmp_path / name / "latents-00000.tar").read_bytes() for name in "cd"]
    assert same[0] == same[1], "the same records make the same file"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stop", range(1, 15))
def test_a_stopped_run_goes_on(form: Any, stop: int, tmp_path: Path) -> None:
    """Stopped anywhere, with a partial shard, an uncommitted shard and half a line of the index left behind."""
    folder = tmp_path / "c"
    writer = CacheWriter(folder, fingerprint(), form=form, about={"classes": ["a"]}, shard_records=5)
    todo = [(LATENTS, r) for r in records()] + [(TEXTS, r) for r in texts()]
    for kind, record in todo[:stop]:
        writer.add(kind, record)
    suffix = ".tar" if form == "webdataset" else ".safetensors"
    (folder / f".latents-00009{suffix}.partial").write_bytes(b"half a shard")
    (folder / f"latents-0000{len(writer.index.shards)}{suffix}").write_bytes(b"renamed, not committed")
    with (folder / "index.jsonl").open("a") as file:
        file.write('{"key": "0", "shard": "latents-00009.safetensors"}\n{"key": "x", "sha')
    if stop < 5:
        with pytest.raises(DavaeError, match=r"not finished.*to continue"):
            LatentCache(folder)

    again = CacheWriter(folder, fingerprint(), form=form, about={"classes": ["a"]}, shard_records=5)
    assert not list(folder.glob(".*"))
    assert sum(map(len, again.done.values())) == stop - stop % 5 if stop <= 12 else True
    for kind, record in todo:
        if record.key not in again.done[kind]:
            again.add(kind, record)
    again.finish({"images": 6, "texts": 3})
    assert verify_cache(folder) == len(again.index.shards)
    whole, found = LatentCache(write(tmp_path / "whole", form)), LatentCache(folder)
    for i in range(6):
        assert torch.equal(whole.item(i, 0)["latent"], found.item(i, 0)["latent"])
    assert CacheWriter(folder, fingerprint(), form=form).complete


def test_another_fingerprint_is_refused_and_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    wanted = fingerprint(**{"vae weights": "sha256:2", "data": {"resolution": 128, "crop": "center"}})
    sources = dict(wanted.sources)
    for i in range(5):
        sources[f"{i}.jpg"] = sources[f"{i}.jpg"]._replace(stamp="other")
    sources["0.jpg"] = sources["0.jpg"]._replace(caption=caption_key("y"), label=9)
    del sources["5.jpg"]
    sources["6.jpg"] = SourceFact("6 bytes", 0, caption_key("x"))
    with pytest.raises(DavaeError) as caught:
        LatentCache(folder, wanted=dataclasses.replace(wanted, sources=sources))
    text = str(caught.value)
    for part in (
        "vae weights;",
        "data.resolution: 64 -> 128",
        'data.crop: absent -> "center"',
        "5 files changed: 0.jpg, 1.jpg, 2.jpg and 2 more",
        "1 caption changed: 0.jpg",
        "1 label changed: 0.jpg",
        "1 file added: 6.jpg",
        "1 file gone: 5.jpg",
    ):
        assert part in text
    with pytest.raises(DavaeError, match="vae weights"):
        CacheWriter(folder, wanted)
    turned = dataclasses.replace(fingerprint(), sources=dict(reversed(fingerprint().sources.items())))
    assert fingerprint().differences(turned) == ["the order of the files"]
    assert fingerprint().differences(fingerprint()) == []
    assert fingerprint().hash != wanted.hash


def test_a_fingerprint_changed_by_hand_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    file = folder / "fingerprint.json"
    file.write_text(file.read_text().replace("64", "128"))
    with pytest.raises(DavaeError, match="changed by hand"):
        LatentCache(folder)


def test_weights_are_told_apart() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    before = weights_hash(layer)
    assert weights_hash(layer) == before
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    assert weights_hash(layer) != before
    assert weights_hash(layer.to(torch.bfloat16)) != before


@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_found(form: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", form)
    assert verify_cache(folder) == 4
    shard = sorted(folder.glob("latents-*"))[1]
    body = bytearray(shard.read_bytes())
    body[-1 if form == "safetensors" else 700] ^= 1
    shard.write_bytes(body)
    with pytest.raises(DavaeError, match=f"1 of 4 shards .* damaged: {shard.name}"):
        verify_cache(folder)
    shard.write_bytes(body[:-20])
    with pytest.raises(DavaeError, match=rf"{shard.name} has {len(body) - 20} bytes, the index says {len(body)}"):
        LatentCache(folder)
    shard.unlink()
    with pytest.raises(DavaeError, match=f"lacks its shard {shard.name}"):
        LatentCache(folder)


@pytest.mark.parametrize("damage", ["sources gone", "fingerprint edited", "index short", "about gone"])
def test_a_damaged_cache_is_made_again_elsewhere(damage: str, tmp_path: Path) -> None:
    """Writing into its folder again would meet the same damage, and the advice says so."""
    folder = write(tmp_path / "c")
    index = folder / "index.jsonl"
    if damage == "sources gone":
        (folder / "sources.jsonl").unlink()
    elif damage == "fingerprint edited":
        (folder / "fingerprint.json").write_text(
            (folder / "fingerprint.json").read_text().replace("float32", "float16")
        )
    elif damage == "index short":
        lines = index.read_text().splitlines(keepends=True)
        last = max(i for i, line in enumerate(lines) if '"commit": "latents' in line)
        first = max(i for i, line in enumerate(lines[:last]) if '"commit"' in line) + 1
        index.write_text("".join(lines[:first] + lines[last + 1 :]))
    else:
        (folder / "cache.json").unlink()
    with pytest.raises(DavaeError, match=r"make it again in another folder, with `davae cache --out` and data\.cache"):
        LatentCache(folder)
    assert len(LatentCache(write(tmp_path / "another"))) > 0


@pytest.mark.parametrize(
    "name", ["../outside-00000.safetensors", "/etc/passwd", "latents-00000.pt", "a/latents-00000.tar", 3]
)
def test_an_index_leads_nowhere_else(name: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    shutil.copy(folder / "latents-00000.safetensors", tmp_path / "outside-00000.safetensors")
    index = folder / "index.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for line in lines:
        for key in ("shard", "commit"):
            if line.get(key) == "latents-00000.safetensors":
                line[key] = name
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DavaeError, match="no shard's name"):
        LatentCache(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c")
    shard = folder / "latents-00000.safetensors"
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(DavaeError, match="link that leads out"):
        LatentCache(folder)


def test_offsets_beyond_the_shard_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "webdataset")
    cache = LatentCache(folder)
    for line in cache._plain.values():
        line["offset"] = 10**9
    cache._mirrored = {}
    with pytest.raises(DavaeError, match=r"record '0' cannot be read .*of a file of"):
        cache.item(0, 0)


def test_folders_that_are_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match=r"no cache of latents.*davae cache"):
        LatentCache(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(DavaeError, match=r"holds other files \(photo.jpg\)"):
        CacheWriter(tmp_path, fingerprint())
    with pytest.raises(DavaeError, match="no cache in"):
        verify_cache(tmp_path)
    with pytest.raises(DavaeError, match="known are safetensors, webdataset"):
        CacheWriter(tmp_path, fingerprint(), form="zip")  # type: ignore[arg-type]
    folder = write(tmp_path / "c")
    with pytest.raises(DavaeError, match="format safetensors, not webdataset"):
        CacheWriter(folder, fingerprint(), form="webdataset")
    with pytest.raises(DavaeError, match="holds '0' already"):
        CacheWriter(folder, fingerprint()).add(LATENTS, records()[0])
    with pytest.raises(DavaeError, match="letters, digits"):
        Record("../x", {})


def test_several_processes_write_one_cache_and_fewer_go_on(tmp_path: Path) -> None:
    """Two writers, stopped at different points, one of them between a shard and its commit; then a single one."""
    folder, options = tmp_path / "c", {"shard_records": 2}
    writers = [CacheWriter(folder, fingerprint(), rank=rank, world_size=2, **options) for rank in (0, 1)]
    every = records()
    for rank, count in ((0, 5), (1, 4)):
        for record in every[rank::2][:count]:
            writers[rank].add(LATENTS, record)
    names = {p.name for p in folder.glob("latents-*")}
    assert names == {f"latents-0000{n}.safetensors" for n in (0, 1, 2, 3)}
    shutil.copy(folder / "latents-00003.safetensors", folder / "latents-00005.safetensors")
    journals = sorted(folder.glob(".index-*.jsonl"))
    assert len(journals) == 2
    with journals[1].open("a") as file:
        file.write('{"key": "torn')

    writer = CacheWriter(folder, fingerprint(), **options)
    assert len(writer.done[LATENTS]) == 8, "what was committed is kept"
    assert not list(folder.glob(".index-*.jsonl"))
    assert not (folder / "latents-00005.safetensors").exists(), "what was not is gone"
    for record in every:
        if record.key not in writer.done[LATENTS]:
            writer.add(LATENTS, record)
    for record in texts():
        writer.add(TEXTS, record)
    writer.finish({"images": 6, "texts": 3})
    cache, whole = LatentCache(folder), LatentCache(write(tmp_path / "whole"))
    for index in range(6):
        assert torch.equal(cache.item(index, 0)["latent"], whole.item(index, 0)["latent"])
    assert verify_cache(folder) == 6 + 2


def test_journals_that_were_taken_in_before_a_kill_are_not_taken_twice(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    first = CacheWriter(folder, fingerprint(), rank=0, world_size=2, shard_records=3)
    second = CacheWriter(folder, fingerprint(), rank=1, world_size=2, shard_records=3)
    for record in records():
        (first if "flip" in record.key else second).add(LATENTS, record)
    journal = (folder / ".index-1.jsonl").read_bytes()
    merge_journals(folder)
    (folder / ".index-1.jsonl").write_bytes(journal)  # as a kill before its removal leaves it
    writer = CacheWriter(folder, fingerprint())
    assert [line["key"] for line in writer.index.records].count("0") == 1
    assert len(writer.done[LATENTS]) == len(writer.index.records) == 12
