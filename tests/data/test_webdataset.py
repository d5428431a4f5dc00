from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch

from davae.data import BatchStream, ShardSource, SkipLedger, image_to_tensor, open_dataset
from davae.data.sources.webdataset import expand_braces
from davae.errors import DavaeError
from tests.data.files import encoded, picture


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def png(seed: int) -> bytes:
    return encoded(picture(seed, (32, 32)), "PNG")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    shard(tmp_path / "w/part-000.tar", {"0.png": png(0), "0.cls": b"2", "0.txt": b"a fox\n", "1.png": png(1)})
    second = {"2.cls": b"0", "2.png": png(2), "3.json": json.dumps({"caption": "owl", "label": 1}).encode()}
    shard(tmp_path / "w/part-001.tar", second | {"3.jpg": encoded(picture(3), "JPEG"), "3.note": b"-"})
    return tmp_path / "w"


def test_pixels_labels_and_captions(shards: Path) -> None:
    data = open_dataset(shards, resolution=32)
    items = [data[i] for i in range(len(data))]
    assert data.classes == ["0", "1", "2"]
    assert [(i["id"], i["label"], i["caption"]) for i in items] == [
        ("part-000.tar/0.png", 2, "a fox"),
        ("part-000.tar/1.png", -1, ""),
        ("part-001.tar/2.png", 0, ""),
        ("part-001.tar/3.jpg", 1, "owl"),
    ]
    for n in range(3):
        assert torch.equal(items[n]["image"], image_to_tensor(picture(n, (32, 32))))
        assert data.source.open(n).read() == png(n)  # and not a byte of the next member


def test_webdataset_writer_is_understood(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for n in range(3):
            writer.write({"__key__": f"x/{n:04d}", "png": png(n), "cls": n, "json": {"text": f"number {n}"}})
    data = open_dataset(tmp_path / "a.tar", resolution=32)
    assert [(data[i]["label"], data[i]["caption"]) for i in range(3)] == [(n, f"number {n}") for n in range(3)]


def test_patterns_and_class_names(tmp_path: Path) -> None:
    for n, name in enumerate(["cat", "ant", "bee"]):
        shard(tmp_path / f"s-{n:02d}.tar", {"k.png": png(n), "k.cls": name.encode()})
    data = open_dataset(str(tmp_path / "s-{00..01}.tar"), resolution=32)
    assert data.classes == ["ant", "cat"]
    assert [data[i]["label"] for i in range(2)] == [1, 0]
    assert len(open_dataset(str(tmp_path / "s-*.tar"), resolution=32)) == 3
    with pytest.raises(DavaeError, match=r"s-03\.tar does not exist"):
        open_dataset(str(tmp_path / "s-{02..03}.tar"), resolution=32)
    with pytest.raises(DavaeError, match="no shard matches"):
        open_dataset(str(tmp_path / "t-*.tar"), resolution=32)


def test_braces() -> None:
    assert list(expand_braces("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(expand_braces("{x,y}/{1..2}")) == ["x/1", "x/2", "y/1", "y/2"]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]


def test_members_lead_nowhere(tmp_path: Path) -> None:
    """Names that climb out and absolute names are only names; links are passed over; nothing is written."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(7))
    path = shard(tmp_path / "w/a.tar", {"../../out.png": png(0), "/tmp/davae-out.png": png(1)})
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    data = open_dataset(path, resolution=32)
    assert [data[i]["id"] for i in range(len(data))] == ["a.tar/../../out.png", "a.tar//tmp/davae-out.png"]
    assert data.skipped == []
    assert before == sorted(str(p) for p in tmp_path.rglob("*"))
    assert not os.path.exists("/tmp/davae-out.png")


def test_damaged_shards(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"0.png": png(0), "0.json": b"{", "1.png": png(1), "2.png": png(2)})
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        cut = archive.getmember("2.png").offset_data + len(png(2)) // 2  # a whole header
    path.write_bytes(whole[:cut])
    data = open_dataset(path, resolution=32)
    assert len(data) == 2
    reasons = dict(data.source.problems)
    assert "damaged after" in reasons["a.tar"]
    assert "cannot be read" in reasons["a.tar/0.json"]
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(DavaeError, match="compressed shards must be unpacked"):
        open_dataset(tmp_path / "b.tar", resolution=32)
    shard(tmp_path / "c.tar", {"a.csv": b"1,2"})
    with pytest.raises(DavaeError, match="no images in the 1 shards"):
        open_dataset(tmp_path / "c.tar", resolution=32)


def headers(path: Path, *members: tarfile.TarInfo, end: bytes = bytes(1024)) -> Path:
    """An archive of headers alone: what they say of their contents is a lie."""
    path.write_bytes(b"".join(member.tobuf(tarfile.GNU_FORMAT) for member in members) + end)
    return path


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


@pytest.mark.timeout(20)
def test_a_member_of_negative_size_leads_back_to_itself(tmp_path: Path) -> None:
    """A Python without the remedy of 2025 gives the same member for ever; others call it damaged."""
    path = headers(tmp_path / "a.tar", member("0.jpg"), member("1.jpg", -512), member("2.jpg"))
    data = ShardSource([path], "a.tar")
    assert [data.id(i) for i in range(len(data))] == ["a.tar/0.jpg"]
    assert data.problems[0][1].startswith("damaged after 1 members")
    with pytest.raises(DavaeError, match=r"first\.tar is not a plain tar file"):
        ShardSource([headers(tmp_path / "first.tar", member("1.jpg", -512))], "first.tar")


@pytest.mark.timeout(20)
def test_a_json_of_brackets_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"1.png": png(1), "1.json": b"[" * 200_000})
    data = open_dataset(path, resolution=32)
    assert (len(data), data[0]["label"]) == (1, -1)
    assert "cannot be read" in dict(data.source.problems)["a.tar/1.json"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("field", ["GNU.sparse.size", "GNU.sparse.realsize"])
def test_a_header_whose_numbers_are_none_is_damage(tmp_path: Path, field: str) -> None:
    whole = shard(tmp_path / "a.tar", {"0.png": png(0)}).read_bytes()
    lie = tarfile.TarInfo("1.png")
    lie.pax_headers = {field: "abc", "GNU.sparse.major": "0", "GNU.sparse.minor": "0"}
    end = 512 + -(-len(png(0)) // 512) * 512
    path = tmp_path / "b.tar"
    path.write_bytes(whole[:end] + lie.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    data = open_dataset(path, resolution=32)
    assert len(data) == 1
    assert "damaged after 1 members" in dict(data.source.problems)["b.tar"]


@pytest.mark.timeout(20)
def test_names_that_announce_names_without_end_are_damage(tmp_path: Path) -> None:
    long = [member("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME)] * 3000
    data = ShardSource([headers(tmp_path / "a.tar", member("0.jpg"), *long)], "a.tar")
    assert len(data) == 1
    assert "damaged after 1 members" in data.problems[0][1]


def test_workers_read_the_same(shards: Path) -> None:
    data = open_dataset(shards, resolution=32)
    plain, forked = (itertools.islice(BatchStream(data, 3, workers=n), 4) for n in (0, 2))
    for a, b in zip(plain, forked, strict=True):
        assert torch.equal(a["image"], b["image"])


def test_a_shard_that_is_cut_or_goes_away_while_it_is_read(tmp_path: Path) -> None:
    """What is left is used, what is not is named; nothing ends the training."""
    path = shard(tmp_path / "w/a.tar", {f"{n}.png": png(n) for n in range(3)})
    gone = shard(tmp_path / "w/b.tar", {f"{n}.png": png(n) for n in range(3, 5)})
    data = open_dataset(tmp_path / "w", resolution=32)
    with tarfile.open(path) as archive:
        cut = archive.getmember("1.png").offset_data + len(png(1)) // 2
    os.truncate(path, cut)
    gone.unlink()
    for asked in range(5):
        item = data[asked]
        assert item["id"] == "a.tar/0.png"
        assert torch.equal(item["image"], image_to_tensor(picture(0, (32, 32))))
    reasons = dict(data[1]["skipped"])
    assert "truncated" in reasons["a.tar/1.png"]
    assert reasons["b.tar/3.png"] == "no such file"
    with pytest.raises(DavaeError, match=r"4 of 5 images.*more than half"):
        SkipLedger.for_dataset(data).add(data[1]["skipped"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_over_all_processes_and_workers_is_a_permutation(tmp_path: Path, world: int, workers: int) -> None:
    """Three shards of 4, 3 and 5 images; 2 images a process and step, so 12 divides by each of 2, 4 and 6."""
    sizes, start = (4, 3, 5), 0
    for number, size in enumerate(sizes):
        shard(tmp_path / f"part-{number}.tar", {f"{n}.png": png(n) for n in range(start, start + size)})
        start += size
    data = open_dataset(tmp_path, resolution=32)
    everything = sorted(data.id(i) for i in range(12))
    steps = 12 // (2 * world)
    streams = [
        list(itertools.islice(BatchStream(data, 2, seed=3, workers=workers, rank=r, world_size=world), 2 * steps))
        for r in range(world)
    ]
    orders = []
    for epoch in range(2):
        taken = [s[i]["id"] for i in range(epoch * steps, (epoch + 1) * steps) for s in streams]
        orders.append([name for ids in taken for name in ids])
        assert sorted(orders[epoch]) == everything
    assert orders[0] != orders[1]
    one = itertools.islice(BatchStream(data, 12, seed=3), 2)
    assert orders == [batch["id"] for batch in one]  # and it is the order that one process has
