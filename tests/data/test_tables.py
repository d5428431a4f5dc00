"""Tables through ``datasets``. Nothing here may touch the network."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from davae.data import TableSource, image_to_tensor, open_dataset
from davae.data.sources.parquet import open_parquet
from davae.data.sources.tables import commit_of
from davae.errors import DavaeError
from tests.data.files import encoded, picture
from tests.data.test_webdataset import png


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("local files must not touch the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table() -> datasets.Dataset:
    features = datasets.Features(
        {
            "caption": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["fox", "owl"]),
            "picture": datasets.Image(),
            "year": datasets.Value("int64"),
        }
    )
    rows = {
        "caption": [" one ", "two", None],
        "kind": [1, 0, 1],
        "picture": [{"bytes": encoded(picture(n, (32, 32)), "PNG"), "path": None} for n in range(3)],
        "year": [2001, 2002, 2003],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def check(data: Any) -> None:
    assert data.classes == ["fox", "owl"]
    items = [data[i] for i in range(3)]
    assert [(i["id"], i["label"], i["caption"]) for i in items] == [
        ("0", 1, "one"),
        ("1", 0, "two"),
        ("2", 1, ""),
    ]
    for n, item in enumerate(items):
        assert torch.equal(item["image"], image_to_tensor(picture(n, (32, 32))))


def test_saved_set_with_and_without_splits(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "one"))
    check(open_dataset(tmp_path / "one", resolution=32))
    both = datasets.DatasetDict({"train": table(), "test": table().select([0])})
    both.save_to_disk(str(tmp_path / "two"))
    check(open_dataset(tmp_path / "two", resolution=32))
    assert len(open_dataset(tmp_path / "two", resolution=32, split="test")) == 1
    with pytest.raises(DavaeError, match="no split 'dev'; it has train, test"):
        open_dataset(tmp_path / "two", resolution=32, split="dev")


def test_parquet_file_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    table().to_parquet(str(folder / "a.parquet"))
    check(open_dataset(folder / "a.parquet", resolution=32))
    table().to_parquet(str(folder / "b.parquet"))
    assert len(open_dataset(folder, resolution=32)) == 6
    assert len(open_dataset(str(folder / "*.parquet"), resolution=32)) == 6


def test_arrow_file(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "s"))
    (file,) = (tmp_path / "s").glob("*.arrow")
    check(open_dataset(file, resolution=32))


def test_parquet_of_other_tools(tmp_path: Path) -> None:
    """Plain bytes, text labels, several captions; and one row without an image."""
    data = [encoded(picture(n, (32, 32)), "PNG") for n in range(3)]
    columns = {
        "jpg": pa.array([*data, None], pa.binary()),
        "label": pa.array(["owl", "fox", "owl", None]),
        "captions": pa.array([["x", "y"], [], ["z"], []], pa.list_(pa.string())),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = open_dataset(tmp_path / "t.parquet", resolution=32)
    assert found.classes == ["fox", "owl"]
    assert [(found[i]["label"], found[i]["caption"]) for i in range(3)] == [(1, "x"), (0, ""), (1, "z")]
    assert found.skipped == [("3", "the row holds no image")]
    struct = pa.array([{"bytes": d, "path": None} for d in data])
    pq.write_table(pa.table({"image": struct, "label": pa.array([0, 3, 1])}), tmp_path / "u.parquet")
    found = open_dataset(tmp_path / "u.parquet", resolution=32)
    assert found.classes == ["0", "1", "2", "3"]
    assert [found[i]["label"] for i in range(3)] == [0, 3, 1]
    assert torch.equal(found[2]["image"], image_to_tensor(picture(2, (32, 32))))


def test_rows_that_name_files(tmp_path: Path) -> None:
    picture(0, (32, 32)).save(tmp_path / "a.png")
    paths = {"image": [str(tmp_path / "a.png"), str(tmp_path / "gone.png"), "https://example.org/x.png"]}
    rows = datasets.Dataset.from_dict(paths).cast_column("image", datasets.Image())
    with pytest.raises(DavaeError, match="only the name of a file"):
        TableSource(rows, "rows").open(0)
    with pytest.raises(DavaeError, match="outside the data set's folder"):
        TableSource(rows, "rows", folder=tmp_path / "below").open(0)
    source = TableSource(rows, "rows", folder=tmp_path)
    assert source.open(0).read() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(FileNotFoundError):
        source.open(1)
    with pytest.raises(DavaeError, match="only the address"):
        source.open(2)


@pytest.mark.timeout(60)
def test_large_labels_are_names_of_classes(tmp_path: Path) -> None:
    """One identifier must not make forty million classes; small numbers stay what they are."""
    images = [encoded(picture(n, (32, 32)), "PNG") for n in range(3)]
    for labels, classes, numbers in (
        ([40_000_000, 7, 40_000_000], ["7", "40000000"], [1, 0, 1]),
        ([2, 0, 2], ["0", "1", "2"], [2, 0, 2]),
    ):
        path = tmp_path / f"{max(labels)}.parquet"
        pq.write_table(pa.table({"image": images, "label": labels}), path)
        data = open_dataset(path, resolution=32)
        assert data.classes == classes
        assert [data[i]["label"] for i in range(3)] == numbers


@pytest.mark.parametrize("column", ["labels", "label"])
def test_a_column_of_lists_is_no_class(tmp_path: Path, column: str, caplog: pytest.LogCaptureFixture) -> None:
    images = [encoded(picture(n, (32, 32)), "PNG") for n in range(2)]
    table = pa.table({"image": images, column: pa.array([[1, 2], []], pa.list_(pa.int64()))})
    pq.write_table(table, tmp_path / "a.parquet")
    data = open_dataset(tmp_path / "a.parquet", resolution=32)
    assert data.classes == []
    assert [data[i]["label"] for i in range(2)] == [-1, -1]
    assert f"column '{column}' holds lists" in caplog.text
    pq.write_table(table.append_column("class", pa.array(["b", "a"])), tmp_path / "b.parquet")
    assert open_dataset(tmp_path / "b.parquet", resolution=32)[0]["label"] == 1  # another one serves


def test_what_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match="no image column: columns are a, b"):
        TableSource(datasets.Dataset.from_dict({"a": [1], "b": ["x"]}), "t")
    with pytest.raises(DavaeError, match="no rows"):
        TableSource(table().select([]), "t")
    (tmp_path / "x.parquet").write_bytes(b"no table at all")
    with pytest.raises(DavaeError, match="cannot be read as a table"):
        open_dataset(tmp_path / "x.parquet", resolution=32)
    (tmp_path / "x.arrow").write_bytes(io.BytesIO(b"nor this").read())
    with pytest.raises(DavaeError, match="cannot be read as a table"):
        open_dataset(tmp_path / "x.arrow", resolution=32)
    with pytest.raises(DavaeError, match="mixed"):
        open_dataset(str(tmp_path / "x.*"), resolution=32)


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: Any, **options: Any) -> datasets.DatasetDict:
        asked.append((*arguments, *options.items()))
        return datasets.DatasetDict({"train": table()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    check(open_dataset("someone/things", resolution=32))
    open_dataset("someone/things:small", resolution=32)
    open_dataset("someone/things", resolution=32, revision="v2")
    assert asked == [
        ("someone/things", None),
        ("someone/things", "small"),
        ("someone/things", None, ("revision", "v2")),
    ]

    def absent(*_: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(DavaeError, match=r"'someone/things' is not a local folder .* cannot be loaded"):
        open_dataset("someone/things", resolution=32)


def test_the_commit_is_that_of_the_folder_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `datasets` lays its cache out: owner___name/configuration/version/commit/split.arrow."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "someone___things" / "default" / "0.0.0" / commit
    table().save_to_disk(str(tmp_path / "saved"))
    folder.parent.mkdir(parents=True)
    (tmp_path / "saved").rename(folder)
    loaded = datasets.DatasetDict({"train": datasets.load_from_disk(str(folder))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert open_dataset("someone/things", resolution=32).source.commit == commit
    assert commit_of(table()) is None


@pytest.mark.parametrize("path", ["procedural", "./photos", "/data/photos", "shards/{00..03}.tar"])
def test_only_names_on_the_hub_have_revisions(path: str) -> None:
    with pytest.raises(DavaeError, match=r"data.revision is set, but .* is not a name on the hub"):
        open_dataset(path, resolution=32, revision="main")


def arrow(file: Path, columns: dict[str, Any], **options: Any) -> Path:
    whole = pa.table(columns)
    with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_stream(stream, whole.schema, **options) as writer:
        writer.write_table(whole)
    return file


@pytest.mark.parametrize("codec", ["zstd", "lz4", "dictionary"])
def test_arrow_that_could_unpack_to_any_size_is_refused(codec: str, tmp_path: Path) -> None:
    text = pa.array(["x" * 10_000] * 2)
    text = text.dictionary_encode() if codec == "dictionary" else text
    options = None if codec == "dictionary" else pa.ipc.IpcWriteOptions(compression=codec)
    file = arrow(tmp_path / "a.arrow", {"image": [png(0), png(1)], "text": text}, options=options)
    table().save_to_disk(str(tmp_path / "s"))
    (saved,) = (tmp_path / "s").glob("*.arrow")
    saved.write_bytes(file.read_bytes())
    for place in (file, tmp_path / "s"):
        with pytest.raises(DavaeError, match=r"\.arrow has compressed buffers or dictionaries.*: save it as parquet"):
            open_dataset(place, resolution=16)


def test_arrow_offsets_that_lead_elsewhere_are_damage(tmp_path: Path) -> None:
    for start, end in ((0, -5), (0, 10**6), (9, 3)):
        wrong = pa.array([0, start, end], pa.int32()).buffers()[1]
        file = tmp_path / f"{start}{end}.arrow"
        whole = arrow(file, {"image": [png(0), png(1)], "text": ["abc", "defghij"]}).read_bytes()
        right = pa.array([0, 3, 10], pa.int32()).buffers()[1].to_pybytes()[:12]
        assert whole.count(right) == 1
        file.write_bytes(whole.replace(right, wrong.to_pybytes()[:12]))
        with pytest.raises(DavaeError, match="cannot be read as a table"):
            open_dataset(file, resolution=16)


def test_a_table_is_counted_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(0)], "text": ["a"]}), file)
    open_parquet(file)
    monkeypatch.setattr("davae.data.sources.parquet._MOST_UNPACKED", 1)
    monkeypatch.setattr("davae.data.sources.parquet._MOST_TIMES", 1e-9)
    open_parquet(file)
    os.utime(file, (0, 0))
    with pytest.raises(DavaeError, match="perhaps a decompression bomb"):
        open_parquet(file)
