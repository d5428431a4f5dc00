"""What describes a model's weights is whole before a library opens it by that."""

import os
from pathlib import Path

import pytest

from davae.cli.options import figures_file
from davae.errors import DavaeError
from davae.runtime.model_files import check_descriptions

_INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "scheduler_config.json", _INDEX])
@pytest.mark.parametrize("raw", [b"", b"[1]", b"null", b"{", b'\xef\xbb\xbf{"a": 1}', b'{"a": "\xe9"}', b"[" * 99_999])
def test_a_damaged_description_is_named(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DavaeError, match=rf"{name} is damaged \(.+\): copy or save it again"):
        check_descriptions(tmp_path)


@pytest.mark.parametrize(
    "listed", [b"{}", b"null", b"[1]", b'{"a": 1}', b'{"a": ["b"]}', b'{"a": "../vae/x.safetensors"}', b'{"a": ""}']
)
def test_an_index_says_the_file_of_each_weight(tmp_path: Path, listed: bytes) -> None:
    (tmp_path / _INDEX).write_bytes(b'{"weight_map": ' + listed + b"}")
    with pytest.raises(DavaeError, match="its weight_map does not say the file of each weight"):
        check_descriptions(tmp_path)
    (tmp_path / _INDEX).write_bytes(b'{"weight_map": {"a": "x.safetensors"}}')
    (tmp_path / "vocab.json").write_bytes(b"[1]")  # of a tokenizer, which reads it itself
    check_descriptions(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "scheduler_config.json"])
def test_a_description_names_its_class(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"a": 1}')
    with pytest.raises(DavaeError, match=f"{name} is damaged .it names no class"):
        check_descriptions(tmp_path)
    (tmp_path / name).write_bytes(b'{"_class_name": "A"}')
    check_descriptions(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no pipes in folders")
def test_a_pipe_in_place_of_a_description_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DavaeError, match="is a pipe or a device"):
        check_descriptions(tmp_path)


def test_figures_are_written_over_figures_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert figures_file(file) == file
    for text, ours in (('{"psnr": 1.0}', True), ('{"_class_name": "AutoencoderDA"}', False), ("no json", False)):
        file.write_text(text, encoding="utf-8")
        if ours:
            assert figures_file(file) == file
        else:
            with pytest.raises(DavaeError, match="something else than figures"):
                figures_file(file)
