"""Recipes as people write them: text stays text, numbers are numbers, and every mistake is one line that says where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from davae.errors import DavaeError
from davae.recipes.read import load_recipe
from davae.recipes.yaml_text import parse_yaml

BASE = """
description: mine
base: debug
data: {path: procedural:8, resolution: 32}
autoencoder:
  model: {detail_channels: 8}
  optimizer: {learning_rate: 1e-3}
  loop: {steps: 1, batch_size: 1}
diffusion:
  optimizer: {learning_rate: 0.001}
  loop: {steps: 1, batch_size: 1}
"""


def _write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


@pytest.mark.parametrize(
    "text",
    [
        "2024",
        "no",
        "1e5",
        "2024-01-15",
        "{000..003}.tar",
        "12:30",
        "~x",
        "a: b",
        "[x]",
        "#1",
        "*",
        "null",
        "0x1f",
        "- a",
    ],
)
def test_a_text_field_takes_the_text(text: str, tmp_path: Path) -> None:
    assert load_recipe("debug", [f"data.path={text}"]).data.path == text  # type: ignore[union-attr]
    recipe = load_recipe("debug", [f"data.cache={text}", f"diffusion.prompts.validation=['{text}', no]"])
    assert recipe.diffusion.prompts.validation == [text, "no"]  # type: ignore[union-attr]
    assert recipe.data.cache == (None if text == "null" else text)  # type: ignore[union-attr]


def test_a_text_field_takes_the_text_in_a_file_too(tmp_path: Path) -> None:
    for text in ("2024", "no", "1e5", "2024-01-15", "0755", "12:30", "on"):
        file = _write(tmp_path, BASE.replace("procedural:8", text).replace("debug", text))
        recipe = load_recipe(file)
        assert (recipe.data.path, recipe.base) == (text, text)  # type: ignore[union-attr]


def test_numbers_and_truth_values_are_read_by_their_fields() -> None:
    recipe = load_recipe(
        "debug",
        [
            "autoencoder.optimizer.learning_rate=1e-4",
            "autoencoder.loop.steps=010",
            "autoencoder.loop.precision=no",
            "data.flip=yes",
            "data.buckets=[[64, 32], [32, 64]]",
            "diffusion.loop.max_grad_norm=null",
            "diffusion.tune.lora.alpha=0.5",
            "autoencoder.loop.report_to=tensorboard",
            "diffusion.optimizer.betas=[0.5, .9]",
        ],
    )
    stage = recipe.autoencoder  # type: ignore[union-attr]
    assert (stage.optimizer.learning_rate, stage.loop.steps, stage.loop.precision) == (1e-4, 10, "no")
    assert stage.loop.report_to == ["tensorboard"]
    assert recipe.data.flip is True  # type: ignore[union-attr]
    assert recipe.data.buckets == [(64, 32), (32, 64)]  # type: ignore[union-attr]
    assert recipe.diffusion.loop.max_grad_norm is None  # type: ignore[union-attr]
    assert recipe.diffusion.tune.lora.alpha == 0.5  # type: ignore[union-attr]
    assert recipe.diffusion.optimizer.betas == (0.5, 0.9)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("autoencoder.reconstruction.l1_weight=.inf", "l1_weight' is inf.*finite number"),
        ("autoencoder.reconstruction.l1_weight=nan", "l1_weight' is nan.*finite number"),
        ("diffusion.sample.guidance_scale=-.INF", "finite number"),
        ("diffusion.optimizer.learning_rate=1e999", "finite number"),
        ("diffusion.optimizer.betas=[0.9, 2]", r"betas\.1' is 2.*less than 1"),
        ("autoencoder.reconstruction.gan.betas=[-1, 0.9]", r"betas\.0' is -1"),
        ("diffusion.loop.seed=12345678901234567890", "seed' is 12345678901234567890.*less than or equal to 2147483647"),
        ("diffusion.loop.seed=-1", "seed' is -1.*greater than or equal to 0"),
        ("diffusion.loop.report_to=[tensorbord]", r"report_to' is 'tensorbord'.*'tensorboard'"),
        ("diffusion.loop.steps=yes", "steps' is 'yes'.*integer"),
        ("diffusion.loop.steps=12:30", "steps' is '12:30'.*integer"),
        ("diffusion.loop.report_to=[a", "not valid YAML"),
        ("data.resolution=[" + "[" * 2000, "not valid YAML"),
        ("diffusion..steps=1", "section.key=value"),
        ("kind=[a]", "kind is "),
    ],
)
def test_a_value_that_the_field_does_not_take_is_one_line(override: str, message: str) -> None:
    with pytest.raises(DavaeError, match=message) as caught:
        load_recipe("debug", [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "data: {resolution: 64}\n", "'data' is there twice, in line 4 and line 12"),
        (BASE.replace("base: debug", "base: debug\nbase: tiny"), "'base' is there twice, in line 3 and line 4"),
        (BASE.replace("steps: 1, ", "steps: 1, steps: 2, "), "'steps' is there twice, in line 8 and line 8"),
        (BASE.replace("base: debug", BOMB), "stands for more than 100,000 values"),
        ("a: &a [*a]\n", "an alias stands for itself"),
        ("base: *nothing\n", "undefined alias"),
        ("[" * 5000, "nested too deeply"),
        ("base: !python/object:os.system x\n", "could not determine a constructor"),
        ("base: !secret x\n", "could not determine a constructor"),
        ("? [a, b]\n: c\n", "a key must be a name"),
        ("a: b\n---\na: c\n", "expected a single document"),
        ("base: \x07\n", "no text"),
        ("\tbase: x\n", "line 1"),
        ("", "must hold sections with keys, not nothing"),
        ("- a\n", "must hold sections with keys, not a list"),
        ("text\n", "must hold sections with keys, not a single value"),
        (b"base: \xff\xfe\n", "not UTF-8 text .invalid start byte at byte 6"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        ("#" * 1_000_001, "larger than 1 MB"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match=message) as caught:
        load_recipe(_write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("folder", "pipe"):
        with pytest.raises(DavaeError, match=rf"{name}\.yaml is no file"):
            load_recipe(tmp_path / f"{name}.yaml")
    with pytest.raises(DavaeError, match=r"no recipe file .*absent\.YML"):
        load_recipe(tmp_path / "absent.YML")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_recipe_may_have_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    raw = BASE.replace("mine", "größer").encode(encoding)
    raw = b"\xff\xfe" + raw if encoding == "utf-16-le" else raw
    assert load_recipe(_write(tmp_path, raw)).description == "größer"


def test_aliases_and_merged_keys_still_work(tmp_path: Path) -> None:
    text = BASE.replace("loop: {steps: 1, batch_size: 1}", "loop: &loop {steps: 5, batch_size: 1}", 1)
    text = text.replace("loop: {steps: 1, batch_size: 1}", "loop: {<<: *loop, steps: 7}")
    recipe = load_recipe(_write(tmp_path, text))
    assert recipe.autoencoder.loop.steps == 5  # type: ignore[union-attr]
    assert recipe.diffusion.loop.steps == 7  # type: ignore[union-attr]
    assert recipe.diffusion.loop.batch_size == 1  # type: ignore[union-attr]


def test_a_section_without_keys_has_its_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, BASE.replace("data: {path: procedural:8, resolution: 32}", "data:")))
    assert recipe.data.path == "procedural"  # type: ignore[union-attr]
    assert load_recipe(_write(tmp_path, BASE + "  sample:\n"), ["diffusion.sample.guidance_scale=2"])


def test_keys_are_names_whatever_yaml_makes_of_them() -> None:
    assert list(parse_yaml("no: 1\n2024: 2\nnull: 3\n", "here")) == ["no", "2024", "null"]


@pytest.mark.parametrize(
    ("override", "stage", "meant"),
    [
        ("learning_rate=1", "diffusion", "'diffusion.optimizer.learning_rate'?"),
        ("learning_rate=1", "autoencoder", "'autoencoder.optimizer.learning_rate'?"),
        ("learning_rate=1", None, "'autoencoder.optimizer.learning_rate' or 'diffusion.optimizer.learning_rate'?"),
        ("lr=1", "diffusion", "'diffusion.optimizer.learning_rate'?"),
        ("optimizer.lr=1", "diffusion", "'diffusion.optimizer.learning_rate'"),
        ("diffusion.optimizer.lr=1", None, "'diffusion.optimizer.learning_rate'?"),
        ("diffusion.lr=1", None, "'diffusion.optimizer.learning_rate'?"),
        ("autoencoder.gan.learning_rate=1", None, "'autoencoder.reconstruction.gan.learning_rate'?"),
        ("diffusion.loop.max_train_steps=1", None, "'diffusion.loop.steps'?"),
        ("batch_size=1", "diffusion", "'diffusion.loop.batch_size'?"),
        ("diffusion.lora.alpha=1", None, "'diffusion.tune.lora.alpha'?"),
        ("resolution=1", "diffusion", "'data.resolution'?"),
        ("dataset=x", None, "'data.path'?"),
        ("diffusoin.loop.steps=1", None, "'diffusion.loop.steps'?"),
        ("autoencoder.modle.scale=2", None, "'autoencoder.model.scale'?"),
        ("diffusion.loop.grad_clip=1", None, "'diffusion.loop.max_grad_norm'?"),
        ("qwertz=1", None, "known here: kind, description, base"),
    ],
)
def test_a_hint_means_the_right_key(override: str, stage: str | None, meant: str) -> None:
    with pytest.raises(DavaeError) as caught:
        load_recipe("debug", [override], stage=stage)
    assert meant in str(caught.value)
