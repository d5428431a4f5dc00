"""JSON and YAML from outside: every damage is one kind of error."""

from pathlib import Path

import pytest

from davae.errors import DavaeError
from davae.evaluation.images import held_out_images
from davae.recipes.yaml_text import plain_yaml
from davae.runtime.text_files import plain_json, read_json, read_object
from davae.training.checkpoints.run_directory import read_config, read_metrics

DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, "{", "9" * 5000 + "x", "", b"\xff"])
def test_what_is_no_json(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        plain_json(text)


@pytest.mark.parametrize("text", [DEEP, "a: [", "a: 2024-99-99", "!!python/object:os.system x", "a: *b", "\0"])
def test_what_is_no_yaml(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        plain_yaml(text)
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(tmp_path / "config.yaml") is None
    with pytest.raises(DavaeError, match="is in no run"):
        held_out_images(tmp_path / "autoencoder", 32)


def test_files_of_the_wrong_kind_are_named(tmp_path: Path) -> None:
    for text, message in ((DEEP, "is not JSON"), ("[]", "holds no JSON object"), ("{", "is not JSON")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DavaeError, match=rf"a\.json.*{message}"):
            read_object(tmp_path / "a.json")
    with pytest.raises(DavaeError, match="cannot be read"):
        read_json(tmp_path / "gone.json")


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n' + DEEP + '\n{"step": "2"}\n[3]\n{"step": 4, "total": 1.0}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path / "m")] == [1, 4]
