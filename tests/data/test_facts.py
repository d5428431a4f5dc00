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
from davae.evaluation.reconstruction.crops import read_boxes
from davae.models.latent_space import open_autoencoder
from davae.pipelines.sampling.generate import Generated, read_prompts
from davae.pipelines.saving.licence import read_front_matter
from davae.runtime.text_files import decode_text, lines_of, read_object, read_text, whole_name, whole_text
from davae.training.dc_ae.train import load_autoencoder
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
        ("\ufeffa", "a"),
        ("a".encode("utf-16"), "a"),
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
        ("10.0", 10),
        ("-1.0", None),
        (b"+3", 3),
        ("1.2.3", "1.2.3"),
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


@pytest.mark.parametrize("value", [0.5, "0.5", -2, "-7", "-2.0", [1], {"a": 1}])
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
    {"text": " ", "TEXT": float("nan"), "Caption": "five", "Label": "2.0"},
    {"text": [], "prompt": ["", "six"], "labels": [1, 2], "class": 0},
]


def test_folders_tables_and_shards_say_the_same(tmp_path: Path) -> None:
    expected = [(1, "one"), (-1, "two"), (2, "three"), (-1, ""), (2, "five"), (0, "six")]
    folder = put(tmp_path / "f", *(f"{i}.png" for i in range(len(VALUES))))
    rows = [{"file_name": f"{i}.png", **row} for i, row in enumerate(VALUES)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    members: dict[str, bytes] = {}
    for i, row in enumerate(VALUES):
        members |= {f"{i}.png": png(i), f"{i}.json": json.dumps(row).encode()}
    shard(tmp_path / "s.tar", members)
    for path in (folder, tmp_path / "s.tar"):
        data = open_dataset(path, resolution=16)
        assert [(data[i]["label"], data[i]["caption"]) for i in range(len(VALUES))] == expected
        assert data.classes == ["0", "1", "2"]
    for number, key in enumerate(("text", "caption", "captions", "prompt", "txt", "TEXT")):
        table = pa.table({"Image": [png(0), png(1)], key: ["one", None], "Label": [1.0, -1.0]})
        pq.write_table(table, tmp_path / f"{number}.PARQUET")
        data = open_dataset(tmp_path / f"{number}.PARQUET", resolution=16)
        assert [(data[i]["label"], data[i]["caption"]) for i in range(2)] == [(1, "one"), (-1, "")]


FORMS = ["metadata.jsonl", "metadata.csv", "metadata.parquet", "beside", "shard", "table"]


def given(form: str, rows: list[dict[str, Any]], place: Path) -> Path:
    """The same facts of the same images in one of the forms."""
    images = [png(i) for i in range(len(rows))]
    if form == "table":
        pq.write_table(pa.Table.from_pylist([{"image": i, **row} for i, row in zip(images, rows, strict=True)]), place)
    elif form == "shard":
        texts = [{f"{i}.png": image, f"{i}.json": json.dumps(rows[i]).encode()} for i, image in enumerate(images)]
        shard(place, {name: content for members in texts for name, content in members.items()})
    else:
        put(place, *(f"{i}.png" for i in range(len(rows))))
        named = [{"file_name": f"{i}.png", **row} for i, row in enumerate(rows)]
        if form == "beside":
            for i, row in enumerate(rows):
                (place / f"{i}.json").write_text(json.dumps(row))
        elif form == "metadata.jsonl":
            (place / form).write_text("".join(json.dumps(row) + "\n" for row in named))
        elif form == "metadata.parquet":
            pq.write_table(pa.Table.from_pylist(named), place / form)
        else:
            with (place / form).open("w", newline="") as file:
                writer = csv.DictWriter(file, list(named[0]))
                writer.writeheader()
                writer.writerows(named)
    return place


ACCENT = unicodedata.normalize("NFD", "caf\u00e9")
NO_LABEL = r"'label'.* is neither a class number nor a name"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("keys", "rows", "expected"),
    [
        (("TEXT", "Label"), [("a", "002"), ("", "-1.0"), (" b ", "0"), (None, None)], [(2, "a"), -1, (0, "b"), -1]),
        (
            ("caption", "cls"),
            [("a", "owl"), (None, ACCENT), (None, "caf\u00e9")],
            [("owl", "a"), "caf\u00e9", "caf\u00e9"],
        ),
        (("label", "class"), [(None, "3"), ("", "2"), ("1", "0"), ("-1", "0")], [3, 2, 1, -1]),
        (
            ("prompt", "text"),
            [("second", ""), ("second", "first"), ("x", None)],
            [(-1, "second"), (-1, "first"), (-1, "x")],
        ),
        (("label", "x"), [("10000000", ""), ("9000000", "")], ["10000000", "9000000"]),
        (("label", "x"), [("1", ""), ("0.5", "")], NO_LABEL),
        (("label", "x"), [("1", ""), ("-2", "")], NO_LABEL),
        (("label", "x"), [("1", ""), ("fox", "")], "some labels are numbers"),
    ],
)
def test_the_same_facts_say_the_same_in_every_form(
    keys: tuple[str, str], rows: list[tuple[Any, Any]], expected: Any, form: str, tmp_path: Path
) -> None:
    suffix = {"table": "x.parquet", "shard": "x.tar"}.get(form, "x")
    place = given(form, [dict(zip(keys, row, strict=True)) for row in rows], tmp_path / suffix)
    if isinstance(expected, str):
        with pytest.raises(DavaeError, match=expected):
            open_dataset(place, resolution=16)
        return
    data = open_dataset(place, resolution=16)
    items = [data[i] for i in range(len(rows))]
    labels, texts = zip(*(x if isinstance(x, tuple) else (x, "") for x in expected), strict=True)
    assert [item["caption"] for item in items] == list(texts)
    if isinstance(labels[0], str):
        assert [data.classes[item["label"]] for item in items] == list(labels)
    else:
        assert [item["label"] for item in items] == list(labels)
        assert data.classes == [str(n) for n in range(max(labels) + 1)]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"1.png": 0, "1.caption": b"C", "1.txt": b"T"}, [(-1, "T")]),
        ({"1.json": b'{"text": "J", "label": 1}', "1.png": 0, "1.txt": b" ", "1.cls": b"2"}, [(2, "J")]),
        ({"1.png": 0, "1.txt": b"\xff", "1.json": b'{"text": "J", "label": 1}'}, [(1, "J")]),
        ({"1.png": 0, "1.json": b"[1]", "1.png.TXT": b"T"}, [(-1, "T")]),
        ({"A.png": 0, "a.png": 1, "A.txt": b"A", "a.txt": b"a", "A.cls": b"0", "a.cls": b"1"}, [(0, "A"), (1, "a")]),
        ({"A.png": 0, "a.png": 1, "A.txt": b"A", "a.TXT": b"a"}, [(-1, "A"), (-1, "a")]),
        ({"A.png": 0, "a.png": 1, "A.txt": b"A"}, [(-1, "A"), (-1, "")]),
        ({"\u00c9.png": 0, "e\u0301.txt": b"one spelling"}, [(-1, "one spelling")]),
        ({"B.png": 0, "b.png": 1, "c.x.png": 2, "C.X.txt": b"x"}, [(-1, ""), (-1, ""), (-1, "x")]),
        ({"A.png": 0, "a.TXT": b"loud", "a.txt": b"low", "b.cls": b"0.5"}, [(-1, "low")]),
        ({"1.png": 0, "1.cls": b"0.5"}, NO_LABEL.replace("'label'", "1.cls")),
        ({"1.png": 0, "1.cls": b"1", "1.json": b'{"label": -2}'}, NO_LABEL),
    ],
)
def test_texts_beside_say_the_same_in_folders_and_shards(
    members: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    contents = {name: png(content) if isinstance(content, int) else content for name, content in members.items()}
    (tmp_path / "f").mkdir()
    for name, content in contents.items():
        (tmp_path / "f" / name).write_bytes(content)
    if len(os.listdir(tmp_path / "f")) < len(contents):
        pytest.skip("this disk does not tell the names apart")
    for place in (tmp_path / "f", shard(tmp_path / "s.tar", contents)):
        if isinstance(expected, str):
            with pytest.raises(DavaeError, match=expected):
                open_dataset(place, resolution=16)
        else:
            data = open_dataset(place, resolution=16)
            items = [data[i] for i in range(len(data))]
            found = {item["id"].split("/")[-1]: (item["label"], item["caption"]) for item in items}
            assert found == dict(zip(filter(lambda name: name.endswith("png"), members), expected, strict=True))


# Folders


BESIDE = ["a.txt", "a.TXT", "a.caption", "a.png.txt", "a.PNG.caption", "a.json", "a.png.JSON"]


@pytest.mark.parametrize("name", BESIDE)
def test_a_text_beside(name: str, tmp_path: Path) -> None:
    put(tmp_path / "f", "a.png", "b.png")
    text = '{"Caption": ["", "a fox"]}' if name.lower().endswith("json") else "a fox"
    (tmp_path / "f" / name).write_text(text)
    assert captions(tmp_path / "f") == {"a.png": "a fox", "b.png": ""}
    shard(tmp_path / "s.tar", {"a.png": png(0), "b.png": png(1), name.replace("PNG", "png"): text.encode()})
    assert captions(tmp_path / "s.tar") == {"s.tar/a.png": "a fox", "s.tar/b.png": ""}


def test_files_that_differ_in_case_have_their_own_texts(tmp_path: Path) -> None:
    put(tmp_path, "A.png", "a.png")
    if len(os.listdir(tmp_path)) == 1:
        pytest.skip("this disk does not tell them apart")
    (tmp_path / "A.txt").write_text("large")
    (tmp_path / "a.txt").write_text("small")
    assert captions(tmp_path) == {"A.png": "large", "a.png": "small"}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.PNG", "text": "which?"}')
    assert captions(tmp_path) == {"A.png": "large", "a.png": "small"}


def test_a_text_beside_wins_over_json_in_any_order_of_members(tmp_path: Path) -> None:
    for number, names in enumerate((("1.txt", "1.json"), ("1.json", "1.txt"))):
        texts = {"1.txt": b"a text", "1.json": b'{"text": "an object"}'}
        shard(tmp_path / f"{number}.tar", {"1.png": png(0)} | {name: texts[name] for name in names})
        assert list(captions(tmp_path / f"{number}.tar").values()) == ["a text"]


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
        ("train", "x/1.PNG"),
        (".", "TRAIN\\X\\1.Png"),
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
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / other.replace("png", "txt")).write_text("a dog")
    assert captions(tmp_path)[name] == "a dog"
    shard(tmp_path / "s.tar", {name: png(0), other.replace("png", "txt"): b"an owl"})
    assert list(captions(tmp_path / "s.tar").values()) == ["an owl"]


@pytest.mark.parametrize("kind", ["csv", "csv with a mark", "parquet"])
@pytest.mark.parametrize("folder", ["", "below/"])
def test_metadata_as_a_table(kind: str, folder: str, tmp_path: Path) -> None:
    put(tmp_path, f"{folder}a.png", f"{folder}b.png")
    rows = [
        {"file_name": f"{folder}a.png", "text": 'one, "quoted"\nand long'},
        {"file_name": f"{folder}b.png", "text": "two"},
    ]
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
    put(tmp_path, "$Recycle.Bin/y.png", "@Recycle/y.png")
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
    names = ("latin", "long", "pipe", "folder", "sixteen", "mark", "fine", "none", "broken")
    put(tmp_path, *(f"{name}.png" for name in names))
    (tmp_path / "none.txt").write_bytes("größe".encode("utf-16-le"))
    (tmp_path / "broken.json").write_text("[" * 200_000)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "long.txt").write_bytes(b"a" * (2 << 20))
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "sixteen.txt").write_text("größe", encoding="utf-16")
    (tmp_path / "mark.txt").write_text("größe", encoding="utf-8-sig")
    (tmp_path / "fine.txt").write_text("one\u2028two\x0bthree")
    found = captions(tmp_path)
    assert found == {
        "broken.png": "", "fine.png": "one\u2028two\x0bthree", "folder.png": "", "latin.png": "",
        "long.png": "", "mark.png": "größe", "none.png": "", "pipe.png": "", "sixteen.png": "größe",
    }  # fmt: skip
    for name in ("latin.txt", "long.txt", "pipe.txt", "none.txt", "broken.json"):
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
    for read in (read_prompts, open_prompt_set, read_object):
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


def test_a_class_without_images_is_told_and_keeps_its_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a/1.png", "b/1.png", "c/1.png", "c/2.png")
    for name in ("b/1.png", "c/1.png"):
        (tmp_path / name).write_bytes(b"no image")
    with caplog.at_level(logging.INFO):
        open_dataset(put(tmp_path, "a/2.png", "a/3.png"), resolution=16)
    assert "classes of which no image can be used: b\n" in caplog.text
    assert [open_dataset(tmp_path, resolution=16)[i]["label"] for i in range(4)] == [0, 0, 0, 2]


# Shards


def test_members_with_dots_masks_and_labels_in_text(tmp_path: Path) -> None:
    shard(
        tmp_path / "a.tar",
        {
            "1.jpg": encoded(picture(1), "JPEG"), "1.txt": b"one", "1.mask.png": png(9), "1.cls": b"002",
            "x.v2.png": png(2), "x.v2.txt": b"two", "x.v2.cls": b"-1",
            "3.png": png(3), "3.png.txt": b"three", "3.cls": b"0",
            "@eaDir/1.jpg/THUMB.png": png(9), "__MACOSX/1.png": png(9), ".trash/1.png": png(9),
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
    assert len(open_dataset(f"{folder}/{{0..1}}.tar", resolution=16)) == 2
    with pytest.raises(DavaeError, match=r"2\.tar does not exist"):
        open_dataset(f"{folder}/{{0..2}}.tar", resolution=16)


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
    monkeypatch.setattr("davae.data.sources.parquet._MOST_UNPACKED", 1000)
    pq.write_table(pa.table({"image": [b"\0" * 400_000] * 3}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(DavaeError, match="perhaps a decompression bomb"):
        open_dataset(tmp_path / "a.parquet", resolution=16)


@pytest.mark.parametrize("how", ["dictionary", "structure", "beginnings", "nothing"])
@pytest.mark.parametrize("name", ["a.parquet", "metadata.parquet"])
def test_values_that_share_their_bytes_are_counted(
    how: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that are small as such: the same long value a hundred times."""
    monkeypatch.setattr("davae.data.sources.parquet._MOST_UNPACKED", 1_000_000)
    put(tmp_path, "1.png")
    long, count = "x" * 50_000, 5_000 if how == "nothing" else 100
    columns: dict[str, pa.Array] = {
        "dictionary": pa.array([long] * count),
        "structure": pa.array([{"bytes": long.encode(), "path": None}] * count),
        "beginnings": pa.array([long] * count),
        "nothing": pa.nulls(count, pa.int64()),
    }
    table = pa.table({"file_name": ["1.png"] * count, "text": columns[how]})
    options: dict[str, Any] = {"use_dictionary": ["file_name"], "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(table, tmp_path / name, compression="zstd", **(options if how == "beginnings" else {}))
    if how == "nothing":
        monkeypatch.setattr("davae.data.sources.parquet._MOST_UNPACKED", 60_000)
        monkeypatch.setattr("davae.data.sources.parquet._MOST_TIMES", 1)
    with pytest.raises(DavaeError, match="perhaps a decompression bomb"):
        open_dataset(tmp_path if name == "metadata.parquet" else tmp_path / name, resolution=16)
    assert (tmp_path / name).stat().st_size < 10_000


def test_numbers_and_captions_that_a_table_may_not_hold(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": png(i), "path": None} for i in range(2)]
    for labels in ([0, 2], [1, -1]):
        table = pa.table({"image": pa.array(images), "label": pa.array(labels)}, schema=features.arrow_schema)
        pq.write_table(table, tmp_path / f"{labels[1]}.parquet")
    with pytest.raises(DavaeError, match=r"column 'label': there are 2 classes, and a row has the number 2"):
        open_dataset(tmp_path / "2.parquet", resolution=16)
    data = open_dataset(tmp_path / "-1.parquet", resolution=16)
    assert [data[i]["label"] for i in range(2)] == [1, -1]
    pq.write_table(pa.table({"image": [png(0), png(1)], "text": [b"caf\xe9", b"a fox"]}), tmp_path / "c.parquet")
    data = open_dataset(tmp_path / "c.parquet", resolution=16)
    assert [data[i]["caption"] for i in range(2)] == ["", "a fox"]
    assert [name for name, _ in data.source.problems] == ["0"]
    for name, offsets, content in (("s", (0, 4, 9), b"caf\xe9a fox"), ("l", (0, 1, 2), b"\xe9a")):
        buffers = pa.py_buffer(np.array(offsets, np.int32).tobytes()), pa.py_buffer(content)
        column = pa.StringArray.from_buffers(2, *buffers)  # of type text, and yet not UTF-8
        key = "text" if name == "s" else "label"
        pq.write_table(pa.table({"image": [png(0), png(1)], key: column}), tmp_path / f"{name}.parquet")
    data = open_dataset(tmp_path / "s.parquet", resolution=16)
    assert [data[i]["caption"] for i in range(2)] == ["", "a fox"]
    with pytest.raises(DavaeError, match=r"row 0, 'label' is not UTF-8 text"):
        open_dataset(tmp_path / "l.parquet", resolution=16)


def test_a_damaged_saved_set(tmp_path: Path) -> None:
    cases = (
        ("{", r"state\.json is not JSON"),
        ("[" * 99_999, r"state\.json is not JSON"),
        ("[]", r"state\.json holds no JSON object"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"cannot be read as a table: .*gone\.arrow"),
        ("{}", "cannot be read as a table"),
    )
    for number, (content, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "state.json").write_text(content)
        (folder / "dataset_info.json").write_text("{}")
        with pytest.raises(DavaeError, match=message):
            open_dataset(folder, resolution=16)
    os.mkfifo(tmp_path / "3" / "gone.arrow")
    with pytest.raises(DavaeError, match=r"gone\.arrow is a pipe or a device"):
        open_dataset(tmp_path / "3", resolution=16)


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
        read_object(tmp_path / "b.json")
    assert whole_text("a\ud83d\ude00\ud800") == "a😀\ufffd"
    assert whole_name("caf\udce9") == "caf\\xe9"


def test_prompts(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("# a comment\na fox\u2028in snow\r\n\r\na dog\n", encoding="utf-16")
    assert read_prompts(file) == ["a fox\u2028in snow", "a dog"]
    for name in ("p.jsonl", "P.JSONL"):
        text = '{"prompt": "a\u2028b"}\n{"prompt": "c\\ud800", "tag": "d\\uD83D\\uDE00"}\n'
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        found = open_prompt_set(tmp_path / name)
        assert found.subjects == ["a\u2028b", "c\ufffd"]
        assert found.categories == ["", "d😀"]


def test_boxes_as_a_spreadsheet_saves_them(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "b.csv").write_text("file,name,left,top,right,bottom\r\na.png,x,0,0,4,4\r\n", encoding=encoding)
        assert [box.right for box in read_boxes(tmp_path / "b.csv")["x"]] == [4]
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DavaeError, match="a pipe or a device"):
        read_boxes(tmp_path / "pipe.csv")


def test_the_head_of_a_card_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\r\nlicense: mit\r\n---\r\n", encoding="utf-8-sig")
    assert read_front_matter(tmp_path / "README.md") == {"license": "mit"}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: caf\xe9\n---\n")
    with pytest.raises(DavaeError, match=r"README\.md is not UTF-8 text"):
        read_front_matter(tmp_path / "README.md")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_configuration_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    for read in (read_object, lambda file: open_autoencoder(file.parent), lambda file: load_autoencoder(file.parent)):
        with pytest.raises(DavaeError, match=r"config\.json (is not|holds no)|is damaged"):
            read(tmp_path / "config.json")


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
