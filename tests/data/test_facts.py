"""Captions and labels: one rule for folders, tables and shards; and text from outside as people save it."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from davae.data import open_dataset
from davae.data.sources.facts import caption_of, class_label, class_names
from davae.errors import DavaeError
from davae.evaluation.generation.prompts import open_prompt_set
from davae.pipelines.sampling.generate import Generated, read_prompts
from davae.runtime.text_files import decode_text, lines_of, read_json, read_text, whole_name, whole_text
from tests.data.files import encoded, picture
from tests.data.test_webdataset import png, shard


def put(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, (32, 32)).save(folder / name)
    return folder


def captions(folder: Path, **options: Any) -> dict[str, str]:
    data = open_dataset(folder, resolution=16, **options)
    return {data[i]["id"]: data[i]["caption"] for i in range(len(data))}


# Captions and labels by themselves


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (" a ", "a"),
        (b" a ", "a"),
        ([["", "b"], "c"], "b"),
        ({"en": "a"}, ""),
        (np.nan, ""),
        (True, ""),
        (["b", "c"], "b"),
        ([None, "c"], "c"),
        ([], ""),
        (None, ""),
        (7, "7"),
        ("x\ud800y", "x\ufffdy"),
    ],
)
def test_a_caption(value: Any, caption: str) -> None:
    assert caption_of(value) == caption


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, 3),
        ("002", 2),
        (2.0, 2),
        ("fox", "fox"),
        (-1, None),
        ("-1", None),
        (None, None),
        ("", None),
        (float("nan"), None),
    ],
)
def test_a_label(value: Any, label: int | str | None) -> None:
    assert class_label(value, "here") == label


@pytest.mark.parametrize("value", [0.5, -2, "-7", [1], {"a": 1}])
def test_what_is_no_label(value: Any) -> None:
    with pytest.raises(DavaeError, match=r"^here: the label .* -1 means no class"):
        class_label(value, "here")


def test_classes() -> None:
    assert class_names([2, None, 0], "here") == (["0", "1", "2"], {0: 0, 2: 2})
    assert class_names([10_000_000, 9_000_000], "here") == (["9000000", "10000000"], {9_000_000: 0, 10_000_000: 1})
    assert class_names(["b", "a", None], "here") == (["a", "b"], {"a": 0, "b": 1})
    with pytest.raises(DavaeError, match=r"some labels are numbers \(1\), others names \('fox'\)"):
        class_names([1, "fox"], "here")


# The three sources agree


VALUES: list[dict[str, Any]] = [
    {"prompt": "one", "label": 1},
    {"captions": ["two", "too"], "label": -1},
    {"text": "three", "label": 2.0},
    {"caption": None, "label": None},
]


def test_folders_tables_and_shards_say_the_same(tmp_path: Path) -> None:
    expected = [(1, "one"), (-1, "two"), (2, "three"), (-1, "")]
    folder = put(tmp_path / "f", *(f"{i}.png" for i in range(4)))
    rows = [{"file_name": f"{i}.png", **row} for i, row in enumerate(VALUES)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    members: dict[str, bytes] = {}
    for i, row in enumerate(VALUES):
        members |= {f"{i}.png": png(i), f"{i}.json": json.dumps(row).encode()}
    shard(tmp_path / "s.tar", members)
    for path in (folder, tmp_path / "s.tar"):
        data = open_dataset(path, resolution=16)
        assert [(data[i]["label"], data[i]["caption"]) for i in range(4)] == expected
        assert data.classes == ["0", "1", "2"]
    for number, key in enumerate(("text", "caption", "captions", "prompt", "txt")):
        table = pa.table({"image": [png(0), png(1)], key: ["one", None], "label": [1.0, -1.0]})
        pq.write_table(table, tmp_path / f"{number}.PARQUET")
        data = open_dataset(tmp_path / f"{number}.PARQUET", resolution=16)
        assert [(data[i]["label"], data[i]["caption"]) for i in range(2)] == [(1, "one"), (-1, "")]
    table = pa.table({"image": [png(0)], "label": [0.5]})
    pq.write_table(table, tmp_path / "half.parquet")
    with pytest.raises(DavaeError, match=r"half.parquet, column 'label': the label 0\.5"):
        open_dataset(tmp_path / "half.parquet", resolution=16)


# Folders


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.png.txt", "a.PNG.caption"])
def test_a_text_beside(name: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text("a fox")
    assert captions(tmp_path) == {"a.png": "a fox", "b.png": ""}


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("train", "x/1.png"),
        ("train", "train/x/1.png"),
        (".", "train/x/1.png"),
        ("train", "x\\1.png"),
        (".", "train\\x\\1.png"),
        ("train", "./x/../x/1.png"),
        ("train", "/elsewhere/photos/train/x/1.png"),
        (".", "C:\\photos\\train\\x\\1.png"),
        ("train/x", "/elsewhere/1.png"),
    ],
)
@pytest.mark.parametrize("split", ["train", "Train"])
def test_names_in_metadata(place: str, name: str, split: str, tmp_path: Path) -> None:
    root = put(tmp_path / "photos", f"{split}/x/1.png", f"{split}/x/2.png", "val/x/1.png")
    row = {"file_name": name.replace("train", split), "text": "a fox"}
    other = {"file_name": f"val{os.sep}x{os.sep}1.png", "text": "of the other split"}
    rows = [row, other] if place == "." else [row]
    (root / place.replace("train", split) / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_dataset(root, resolution=16)
    assert {data[i]["id"]: data[i]["caption"] for i in range(2)} == {"x/1.png": "a fox", "x/2.png": ""}
    assert data.source.problems == []


def test_a_name_never_finds_another_image(tmp_path: Path) -> None:
    root = put(tmp_path / "photos", "a/2.png", "1.png", "cat/3.png")
    names = ["/other/dog/3.png", "/other/cat/9.png", "a/1.png", "dog/1.png", "../1.png"]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": n}) for n in names))
    (root / "a" / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "not there"}))
    assert set(captions(root).values()) == {""}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_in_either_composition(form: str, tmp_path: Path) -> None:
    name = unicodedata.normalize(form, "é.png")
    put(tmp_path, name, "b.png")
    other = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], name)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": other, "text": "a fox"}), encoding="utf-8")
    assert captions(tmp_path)[name] == "a fox"


@pytest.mark.parametrize("kind", ["csv", "csv with a mark", "parquet"])
def test_metadata_as_a_table(kind: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": 'one, "quoted"\nand long'}, {"file_name": "b.png", "text": "two"}]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
        encoding = "utf-16" if kind == "csv with a mark" else "utf-8"
        (tmp_path / "metadata.csv").write_bytes(text.getvalue().encode(encoding))
    assert captions(tmp_path) == {row["file_name"]: row["text"] for row in rows}


def test_one_line_says_what_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png", "b.png", "c.png", "@eaDir/a.png", "$RECYCLE.BIN/x.png")
    (tmp_path / "a.txt").write_text("a fox")
    rows = [{"file_name": "b.png", "text": "b"}, {"file_name": "gone.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("x.heic", "y.HEIC", "z.jxl"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.INFO):
        open_dataset(tmp_path, resolution=16)
    assert (
        "3 images, 2 with a caption; 1 rows of metadata.jsonl; 1 rows match no image, such as gone.png; "
        "passed over: 2 .heic, 1 .jxl"
    ) in caplog.text
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.jxl").write_bytes(b"")
    with pytest.raises(DavaeError, match=r"no images in .*; passed over: 1 \.jxl"):
        open_dataset(tmp_path / "only", resolution=16)


def test_a_caption_that_cannot_be_read_costs_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, *(f"{name}.png" for name in ("latin", "long", "pipe", "folder", "sixteen", "mark", "fine")))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "long.txt").write_bytes(b"a" * (2 << 20))
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "sixteen.txt").write_text("größe", encoding="utf-16")
    (tmp_path / "mark.txt").write_text("größe", encoding="utf-8-sig")
    (tmp_path / "fine.txt").write_text("one\u2028two\x0bthree")
    found = captions(tmp_path)
    assert found == {
        "fine.png": "one\u2028two\x0bthree", "folder.png": "", "latin.png": "", "long.png": "", "mark.png": "größe",
        "pipe.png": "", "sixteen.png": "größe",
    }  # fmt: skip
    for name in ("latin.txt", "long.txt", "pipe.txt"):
        assert f"{name}: the caption cannot be read" in caplog.text


def test_pipes_and_devices_are_no_images(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    data = open_dataset(tmp_path, resolution=16)
    assert dict(data.skipped) == dict.fromkeys(("pipe.png", "zero.png"), "a pipe or a device, not a file")
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DavaeError, match="pipe"):
        open_dataset(tmp_path / "x.tar", resolution=16)
    for read in (read_prompts, open_prompt_set, read_json):
        with pytest.raises(DavaeError, match="a pipe or a device"):
            read(tmp_path / "pipe.png")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    put(tmp_path, "a/x.png", "b/x.png")
    for folder in ("a", "b"):
        os.rename(tmp_path / folder / "x.png", os.fsencode(tmp_path / folder) + b"/caf\xe9.png")
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/b\xff")
    data = open_dataset(tmp_path, resolution=16)
    assert [data[i]["id"] for i in range(2)] == ["a/caf\\xe9.png", "b\\xff/caf\\xe9.png"]
    assert json.dumps([data.classes, data[1]["id"]], ensure_ascii=False).encode()


# Shards


def test_members_with_dots_masks_and_labels_in_text(tmp_path: Path) -> None:
    shard(
        tmp_path / "a.tar",
        {
            "1.jpg": encoded(picture(1), "JPEG"), "1.txt": b"one", "1.mask.png": png(9), "1.cls": b"002",
            "x.v2.png": png(2), "x.v2.txt": b"two", "x.v2.cls": b"-1",
            "3.png": png(3), "3.png.txt": b"three", "3.cls": b"0",
            "4.png": png(4), "4.txt": "größe".encode("utf-16"), "4.json": b'{"prompt": "not asked", "label": 1.0}',
        },
    )  # fmt: skip
    data = open_dataset(tmp_path / "a.tar", resolution=16)
    found = [(data[i]["id"], data[i]["label"], data[i]["caption"]) for i in range(len(data))]
    assert found == [
        ("a.tar/1.jpg", 2, "one"),
        ("a.tar/x.v2.png", -1, "two"),
        ("a.tar/3.png", 0, "three"),
        ("a.tar/4.png", 1, "größe"),
    ]
    assert data.classes == ["0", "1", "2"]
    assert "passed over: 1 further images of a key" in data.source.summary


def test_brackets_in_a_folder_are_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "shards [1]{a}"
    folder.mkdir()
    for n in range(2):
        shard(folder / f"{n}.tar", {"k.png": png(n)})
    assert len(open_dataset(folder, resolution=16)) == 2
    assert len(open_dataset(f"{folder}/*.tar", resolution=16)) == 2


# Tables


def test_damaged_tables_end_in_one_line(tmp_path: Path) -> None:
    """Every twentieth byte of a table, cut off or changed: an error of ours, images, or images that are skipped."""
    pq.write_table(pa.table({"image": [png(i) for i in range(3)], "text": list("abc")}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    failed = 0
    for at in range(0, len(whole), max(1, len(whole) // 20)):
        for number, raw in enumerate((whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])):
            file = tmp_path / f"{at}-{number}.parquet"
            file.write_bytes(raw)
            try:
                data = open_dataset(file, resolution=16)
                [data[i] for i in range(len(data))]
            except DavaeError:
                failed += 1
    assert failed > 20


def test_a_table_that_unpacks_to_a_thousand_times_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davae.data.sources.tables._MOST_UNPACKED", 1000)
    pq.write_table(pa.table({"image": [b"\0" * 400_000] * 3}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(DavaeError, match="perhaps a decompression bomb"):
        open_dataset(tmp_path / "a.parquet", resolution=16)


def test_a_damaged_saved_set(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"_data_files": [{"filename": "gone.arrow"}]}'):
        folder = tmp_path / str(len(content))
        folder.mkdir()
        (folder / "state.json").write_text(content)
        (folder / "dataset_info.json").write_text("{}")
        with pytest.raises(DavaeError, match="cannot be read as a table"):
            open_dataset(folder, resolution=16)


# Text


def test_text_from_outside(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode_text("größe".encode(encoding), "x") == "größe"
    assert lines_of("a\r\nb\u2028c\x85d\x0b\x0ce\n") == ["a", "b\u2028c\x85d\x0b\x0ce", ""]
    with pytest.raises(DavaeError, match=r"x is not UTF-8 text .* at byte 3"):
        decode_text(b"caf\xe9", "x")
    (tmp_path / "a").write_bytes(b"a" * 100)
    with pytest.raises(DavaeError, match="more than 99 bytes"):
        read_text(tmp_path / "a", most_bytes=99)
    (tmp_path / "b.json").write_text("{", encoding="utf-16")
    with pytest.raises(DavaeError, match=r"b\.json is not JSON"):
        read_json(tmp_path / "b.json")
    assert whole_text("a\ud83d\ude00\ud800") == "a😀\ufffd"
    assert whole_name("caf\udce9") == "caf\\xe9"


def test_prompts(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("# a comment\na fox\u2028in snow\r\n\r\na dog\n", encoding="utf-16")
    assert read_prompts(file) == ["a fox\u2028in snow", "a dog"]
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n', encoding="utf-8-sig")
    assert open_prompt_set(file).subjects == ["a\u2028b", "c"]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deep_grey_takes_no_eightfold_copy(mode: str, tmp_path: Path) -> None:
    import tracemalloc

    values = np.linspace(0, 1, 1024 * 1024, dtype=np.float32).reshape(1024, 1024)
    image = Image.fromarray((values * 65535).astype(np.uint16) if mode == "I;16" else values)
    image.save(tmp_path / "a.tiff")
    tracemalloc.start()
    data = open_dataset(tmp_path, resolution=64)
    picture_of = data[0]["image"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 1024 * 1024  # what numpy and Python hold; a float64 copy alone would be 8 MiB
    assert float(picture_of.min()) < -0.9
    assert float(picture_of.max()) > 0.9


def test_images_of_other_prompts_have_other_names() -> None:
    same = "a " + "very " * 20
    subjects = ["a red fox", "a red fox,", "a red-fox", same + "red fox", same + "grey fox", "...", "image"]
    names = {Generated(subject, 7, Image.new("RGB", (1, 1))).file_name for subject in subjects}
    assert len(names) == len(subjects)
    assert "a-red-fox-7.png" in names


def test_tables_of_other_tools(tmp_path: Path) -> None:
    """Columns of bytes, dictionaries, decimals and categories; a folder whose metadata is a pipe."""
    images = [png(0), png(1)]
    columns: dict[str, tuple[pa.Array, pa.Array, list[tuple[int, str]]]] = {
        "bytes": (pa.array([b"one", None]), pa.array([b"002", b"-1"]), [(2, "one"), (-1, "")]),
        "large": (pa.array(["one", None], pa.large_string()), pa.array([1, None], pa.uint8()), [(1, "one"), (-1, "")]),
        "categories": (
            pa.array(["one", "two"]).dictionary_encode(),
            pa.array(["b", "a"]).dictionary_encode(),
            [(1, "one"), (0, "two")],
        ),
        "booleans": (pa.array([["", "one"], []]), pa.array([True, False]), [(1, "one"), (0, "")]),
    }
    for name, (captions_of, labels, expected) in columns.items():
        pq.write_table(
            pa.table({"image": images, "caption": captions_of, "label": labels}), tmp_path / f"{name}.parquet"
        )
        data = open_dataset(tmp_path / f"{name}.parquet", resolution=16)
        assert [(data[i]["label"], data[i]["caption"]) for i in range(2)] == expected, name
    table = pa.table({"image": images, "label": pa.array([Decimal("1.5"), None])})
    pq.write_table(table, tmp_path / "decimal.parquet")
    with pytest.raises(DavaeError, match="neither a class number nor a name"):
        open_dataset(tmp_path / "decimal.parquet", resolution=16)
    put(tmp_path / "f", "a.png")
    os.mkfifo(tmp_path / "f" / "metadata.parquet")
    with pytest.raises(DavaeError, match="pipe"):
        open_dataset(tmp_path / "f", resolution=16)
    with pytest.raises(DavaeError, match="a folder, a pipe or a device"):
        open_dataset(tmp_path / "f" / "*.parquet", resolution=16)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metadata.csv", "file_name, text\r\na.png, hello\r\n", "hello"),  # spaces behind the commas
        ("Metadata.JSONL", '{"file_name": "a.png", "text": "hello"}', "hello"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "", "caption": "hello"}', "hello"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": NaN, "prompt": "hello"}', "hello"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": true}', ""),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n{"file_name": "./a.png", "text": "two"}', "one"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1}\n{"file_name": "a.png", "text": "two"}', "two"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a\x0bb\x0c\x85\u2028c"}', "a\x0bb\x0c\x85\u2028c"),
    ],
)
def test_captions_as_tools_and_people_write_them(tmp_path: Path, name: str, text: str, expected: str) -> None:
    put(tmp_path, "a.png")
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert open_dataset(tmp_path, resolution=16)[0]["caption"] == expected


def test_labels_in_one_metadata_file_and_captions_in_another(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "hello"}', encoding="utf-8")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,2\n", encoding="utf-8")
    item = open_dataset(tmp_path, resolution=16)[0]
    assert (item["label"], item["caption"]) == (2, "hello")


def test_a_table_whose_first_column_of_texts_is_empty(tmp_path: Path) -> None:
    columns = {"image": [png(0), png(1)], "text": ["", None], "caption": ["one", None], "prompt": [None, "two"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    data = open_dataset(tmp_path / "t.parquet", resolution=16)
    assert [data[i]["caption"] for i in range(2)] == ["one", "two"]


def test_class_names_that_look_the_same_are_one_class() -> None:
    assert class_label("caf\u00e9", "") == class_label("cafe\u0301", "")
    assert class_label(Decimal(3), "") == 3
    with pytest.raises(DavaeError, match="neither a class number nor a name"):
        class_label(Decimal("NaN"), "")
