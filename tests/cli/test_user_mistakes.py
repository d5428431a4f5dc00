"""What people get wrong, in every verb: one line that says what, where and what to do; status 2, no traceback."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from davae.bases.debug_pipelines import small_pipeline
from davae.bases.tiny import debug_base
from davae.cli.main import main
from davae.models import AutoencoderDA


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole, damaged and wrong things in it."""
    here = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    vae.save_pretrained(here / "vae")
    vae.save_pretrained(here / "run" / "autoencoder")
    small_pipeline("sd3").save_pretrained(here / "sd3")
    for name in ("cut", "gone"):
        shutil.copytree(here / "sd3", here / f"sd3-{name}")
        shutil.copytree(here / "vae", here / f"vae-{name}")
        for folder in (here / f"sd3-{name}" / "transformer", here / f"vae-{name}"):
            file = next(folder.glob("*.safetensors"))
            if name == "cut":
                file.write_bytes(file.read_bytes()[:1000])
            else:
                file.unlink()
    shutil.copytree(here / "sd3", here / "sd3-new")
    index = here / "sd3-new" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "NextYearsPipeline"))
    for name in ("part", "untold"):
        shutil.copytree(here / "sd3", here / f"sd3-{name}")
    index = here / "sd3-part" / "model_index.json"
    index.write_text(index.read_text().replace("SD3Transformer2DModel", "NextYearsModel"))
    shutil.rmtree(here / "sd3-untold" / "tokenizer")
    for source, copy, config in (
        ("sd3", "sd3-misfit", "vae/config.json"),
        ("vae", "vae-misfit", "config.json"),
    ):
        shutil.copytree(here / source, here / copy)
        values = json.loads((here / copy / config).read_text())
        inner = values.get("base_config", values)
        inner["block_out_channels"] = [2 * channels for channels in inner["block_out_channels"]]
        (here / copy / config).write_text(json.dumps(values))
    (here / "vae-junk").mkdir()
    (here / "vae-junk" / "config.json").write_text("{")
    (here / "photos").mkdir()
    Image.new("RGB", (48, 48), "red").save(here / "photos" / "a.png")
    (here / "broken").mkdir()
    (here / "broken" / "a.png").write_bytes(bytes(99))
    (here / "empty.npz").write_bytes(b"")
    shutil.copytree(here / "sd3", here / "sd3-classless")
    (here / "sd3-classless" / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    shutil.copytree(here / "sd3", here / "sd3-wordless")
    (here / "sd3-wordless" / "tokenizer" / "tokenizer.json").unlink()
    (here / "empty").mkdir()
    (here / "file").write_text("x")
    save_file({"a": torch.zeros(2)}, here / "other.safetensors")
    return here


def _ends(monkeypatch, capsys, arguments: str, *, columns: int = 80) -> tuple[int | str | None, str]:
    """Exit status and standard error. What is no mistake of the person goes through as it is."""
    monkeypatch.setattr(sys, "argv", ["davae", *arguments.split()])
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # what does not exist, is a file, or is damaged
        ("generate /nonexistent --prompt a", "no pipeline in /nonexistent: there is no such folder"),
        ("generate file --prompt a", "it is a file, not a folder"),
        ("generate empty --prompt a", "empty holds no pipeline"),
        ("generate sd3-cut --prompt a", "the pipeline in sd3-cut cannot be read"),
        ("generate sd3-gone --prompt a", "the pipeline in sd3-gone cannot be read"),
        ("generate sd3-new --prompt a", "of a class that diffusers"),
        ("generate sd3-part --prompt a", "the pipeline in sd3-part is of a class that diffusers"),
        ("generate sd3-misfit --prompt a", "the model in sd3-misfit/vae cannot be opened: decoder.conv_in.bias"),
        ("generate sd3-untold --prompt a", "the pipeline in sd3-untold lacks tokenizer/"),
        ("generate sd3-classless --prompt a", "scheduler/scheduler_config.json is damaged (it names no class)"),
        ("generate sd3-wordless --prompt a", "sd3-wordless/tokenizer lacks"),
        ("upgrade debug-sd3 --autoencoder vae-misfit --out up", "vae-misfit: config.json has block_out_channels"),
        ("evaluate generation sd3-gone --reference procedural:4 --count 2 --out g", "the pipeline in sd3-gone"),
        ("evaluate generation /nonexistent --reference procedural:4 --count 2 --out g", "no pipeline in /nonexistent"),
        ("upgrade debug-sd3 --autoencoder /nonexistent --out up", "no autoencoder in /nonexistent: there is no such"),
        ("upgrade debug-sd3 --autoencoder file --out up", "it is a file, not a folder"),
        ("upgrade debug-sd3 --autoencoder run --out up", "did you mean run/autoencoder?"),
        ("upgrade debug-sd3 --autoencoder sd3/vae --out up", "of class AutoencoderKL, not an AutoencoderDA"),
        ("upgrade /nonexistent --autoencoder vae --out up", "no pipeline in /nonexistent"),
        ("reconstruct /nonexistent photos", "no autoencoder in /nonexistent"),
        ("reconstruct vae-cut photos", "the autoencoder in vae-cut cannot be read"),
        ("reconstruct vae-gone photos", "the autoencoder in vae-gone cannot be read"),
        ("reconstruct vae-junk photos", "vae-junk/config.json is damaged"),
        ("reconstruct vae /nonexistent", "no images at '/nonexistent'"),
        ("inspect vae-gone --data photos --resolution 32", "the autoencoder in vae-gone cannot be read"),
        ("evaluate reconstruction sd3/vae --data photos --resolution 32", "not an AutoencoderDA"),
        ("compare autoencoder a=vae-cut --data photos --resolution 32", "the autoencoder in vae-cut cannot be read"),
        ("compare autoencoder a=vae-junk --data photos --resolution 32", "vae-junk/config.json is damaged"),
        ("train autoencoder --recipe debug base=/nonexistent", "no pipeline in /nonexistent"),
        ("train autoencoder --recipe debug autoencoder.model.start_from=empty", "no result of this stage in empty"),
        ("train diffusion --recipe debug --autoencoder empty", "no autoencoder in empty"),
        ("cache --recipe debug --autoencoder vae-gone --out c", "the autoencoder in vae-gone cannot be read"),
        ("convert vavae empty --out c", "there is no file empty"),
        ("convert davae-sd3 other.safetensors --out c --base /nonexistent", "/nonexistent holds no autoencoder"),
        ("plan sd3-gone/vae", "an autoencoder by itself"),
        ("plan sd3 --resolution 1024", "`pos_embed_max_size`: 32. Try another resolution"),
        ("evaluate generation debug --reference photo --out g", "no images at 'photo'"),
        ("evaluate generation debug --reference empty --out g", "no images in empty"),
        ("evaluate generation debug --reference photos --base empty --out g", "empty holds no pipeline"),
        ("evaluate generation debug --reference photos --beside a=file --out g", "no pipeline in file: it is a file"),
        ("evaluate generation debug --reference empty.npz --out g", "cannot read statistics from empty.npz"),
        ("evaluate reconstruction vae --data photos --resolution 32 --crops a=broken", "broken/a.png: not an image"),
        ("plan sd35-meduim", "(the closest: sd35-medium"),
        ("export /nonexistent --out e", "holds no pipeline or autoencoder"),
        ("report file", "there is no run directory file"),
        # what cannot be written
        ("generate debug 1 --out file", "file cannot be a folder"),
        ("upgrade debug --autoencoder vae --out file/up", "file/up cannot be a folder"),
        ("reconstruct vae photos --out empty", "empty is a folder, and a file is to be written"),
        ("reconstruct vae photos --out picture", "name it picture.png"),
        ("reconstruct vae photos --out x.psd", "PSD can be read, not written; name it x.png"),
        ("plan debug --resolution 64 --json empty", "empty is a folder"),
        ("bench autoencoder debug --json file/a.json", "file cannot be a folder"),
        ("evaluate reconstruction vae --data photos --json empty", "empty is a folder"),
        ("evaluate generation debug --reference procedural:4 --save-statistics empty", "empty is a folder"),
        ("train autoencoder --recipe debug --out file", "file cannot be a folder"),
        ("cache --recipe debug --autoencoder vae --out file", "file cannot be a folder"),
        ("demo --out file", "file cannot be a folder"),
        # devices and precisions
        ("generate debug 1 --device gpu", "device 'gpu' (--device): there is none of that name"),
        ("generate debug 1 --device meta", "davae does not run on it"),
        ("generate debug 1 --dtype bf16", "dtype must be float32, bfloat16, float16, not 'bf16' (--dtype)"),
        ("reconstruct vae photos --dtype int8", "dtype must be"),
        ("bench autoencoder debug --dtype bf16", "dtype must be"),
        ("bench inference debug --dtype bf16", "dtype must be"),
        # sizes
        ("generate debug-sd3 --prompt a --height 30", "have to be divisible by 8"),
        ("bench autoencoder debug --resolution 64 --tile 5", "tile must be a multiple of 8 pixels"),
    ],
)  # fmt: skip
def test_a_mistake_has_one_line(arguments, words, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    status, err = _ends(monkeypatch, capsys, arguments)
    assert status == 2
    (line,) = [text for text in err.splitlines() if text.startswith("davae: ")]
    assert words in line
    assert sorted(place.iterdir()) == before, "something was written"


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        ("generate someone/absent --prompt a", DiffusionPipeline),
        ("generate absent --prompt a", DiffusionPipeline),
        ("upgrade debug-sd3 --autoencoder someone/absent --out up", AutoencoderDA),
    ],
)
def test_a_name_that_the_hub_does_not_give(arguments, model, monkeypatch, capsys, tmp_path) -> None:
    """Without a network: what was looked for is told, without the advice of libraries that nobody here can follow."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Cannot load model: the model is not fully cached locally (pass 'local_files_only=False').")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "from_pretrained", unreachable)
    status, err = _ends(monkeypatch, capsys, arguments)
    assert status == 2
    (line,) = [text for text in err.splitlines() if text.startswith("davae: ")]
    assert "absent': there is no such folder, it is not in the local cache, and the hub was not reached" in line


def test_below_a_folder_that_may_not_be_entered(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for one who is not root: what lies there cannot be looked at."""
    monkeypatch.chdir(place)
    stat, access, locked = os.stat, os.access, str(place / "empty")

    def closed(path: object, **options: Any) -> os.stat_result:
        if isinstance(path, str | Path) and str(Path(path).absolute()).startswith(f"{locked}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", closed)
    monkeypatch.setattr(os, "access", lambda path, mode, **o: str(path) != locked and access(path, mode, **o))
    for arguments in ("reconstruct vae photos --out empty/a/x.png", "generate debug 1 --out empty/a"):
        status, err = _ends(monkeypatch, capsys, arguments)
        assert status == 2
        assert "you may not write in" in err


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ("reconstruct vae photos", "vae/config.json"),
        ("generate sd3 --prompt a", "sd3/model_index.json"),
        ("generate sd3 --prompt a", "sd3/vae/config.json"),
    ],
)
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    arguments: str, file: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    opened = os.open

    def closed(path: Any, *options: Any, **named: Any) -> int:
        if str(path).endswith(file):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *options, **named)

    monkeypatch.setattr(os, "open", closed)
    status, err = _ends(monkeypatch, capsys, arguments)
    assert status in (1, 2)
    (line,) = [text for text in err.splitlines() if text.startswith("davae: ")]
    assert file in line
    assert "Permission denied" in line
    assert "damaged" not in line
    assert "save it again" not in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        "generate debug 1",
        "reconstruct vae photos",
        "inspect vae --data photos --resolution 32",
        "bench autoencoder debug",
        "bench inference debug",
        "compare autoencoder a=vae --data photos --resolution 32",
        "evaluate reconstruction vae --data photos --resolution 32",
        "evaluate generation debug --reference procedural:4",
    ],
)
def test_a_gpu_that_is_not_there(arguments, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    status, err = _ends(monkeypatch, capsys, f"{arguments} --device cuda")
    assert status == 2
    assert "finds no GPU on this machine; give cpu" in err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("generate debug 1", "--count"),
        ("generate debug 1", "--steps"),
        ("generate debug 1", "--height"),
        ("reconstruct vae photos", "--count"),
        ("reconstruct vae photos", "--resolution"),
        ("inspect vae", "--images"),
        ("inspect vae", "--resolution"),
        ("evaluate reconstruction vae --data photos", "--images"),
        ("evaluate generation debug --reference procedural:4", "--batch"),
        ("evaluate generation debug --reference procedural:4", "--count"),
        ("evaluate generation debug --reference procedural:4", "--steps"),
        ("compare autoencoder a=vae --data photos --resolution 32", "--images"),
        ("compare autoencoder a=vae --data photos --resolution 32", "--batch"),
        ("compare autoencoder a=vae --data photos --resolution 32", "--samples"),
        ("bench inference debug", "--batch"),
        ("bench inference debug", "--repeats"),
        ("bench autoencoder debug", "--batch"),
        ("bench autoencoder debug", "--scale"),
        ("bench training debug", "--batch"),
        ("bench training debug", "--repeats"),
        ("plan debug", "--resolution"),
        ("plan debug", "--batch"),
        ("convert lightningdit other.safetensors --out x", "--heads"),
    ],
)
def test_counts_begin_at_one(arguments, option, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    for count in (0, -3):
        status, err = _ends(monkeypatch, capsys, f"{arguments} {option} {count}")
        assert status == 2
        assert f"Invalid value for '{option}'" in err


@pytest.mark.parametrize("arguments", ["generate debug 1", "demo", "evaluate generation debug --reference x"])
@pytest.mark.parametrize("seed", [-1, 10**30])
def test_seeds_are_those_that_generators_take(arguments, seed, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    status, err = _ends(monkeypatch, capsys, f"{arguments} --seed {seed}")
    assert status == 2
    assert "Invalid value for '--seed'" in err


def test_plan_writes_figures_into_folders_that_are_not_there_yet(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = "plan debug --resolution 64 --json new/dir/p.json"
    monkeypatch.setattr(sys, "argv", ["davae", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert '"resolution": 64' in (tmp_path / "new" / "dir" / "p.json").read_text()


def test_a_message_in_a_file_is_one_line_however_long(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(sys, "argv", ["davae", "doctor"])
    with pytest.raises(SystemExit):
        main()
    capsys.readouterr()
    logging.getLogger("davae.training").warning("%s/%s", "a" * 70, "b" * 70)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{'a' * 70}/{'b' * 70}")
