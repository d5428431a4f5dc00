"""What the command line answers without torch: help, version, mistyped words, and what is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command

from davae.cli.main import app

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "matplotlib", "numpy", "peft", "datasets")
VERBS = [
    "demo",
    "train",
    "train autoencoder",
    "train diffusion",
    "train base",
    "train dc-ae",
    "plan",
    "recipes",
    "recipes list",
    "recipes show",
    "recipes copy",
    "recipes new",
    "upgrade",
    "cache",
    "bench",
    "bench inference",
    "bench autoencoder",
    "bench training",
    "compare",
    "compare autoencoder",
    "convert",
    "convert lightningdit",
    "convert vavae",
    "convert davae-imagenet",
    "convert comfyui",
    "convert davae-sd3",
    "generate",
    "reconstruct",
    "evaluate",
    "evaluate reconstruction",
    "evaluate generation",
    "inspect",
    "ablate",
    "export",
    "report",
    "studio",
    "configs",
    "comfyui",
    "doctor",
]
NOWHERE = "no images at '/nowhere': there is no such folder or file"
ANSWERS = [
    ("", 2, "Usage"),
    ("--help", 0, "Usage"),
    ("--version", 0, "davae "),
    *((f"{verb} --help", 0, "Usage") for verb in VERBS),
    ("studio --port 65536", 2, "Invalid value for '--port'"),
    ("studio --host 0.0.0.0", 2, "No such option"),
    ("recipes list", 0, "sd35-medium-1024"),
    ("recipes show tiny", 0, "lr_warmup_steps: 0.0625"),
    ("recipes copy tniy", 2, "did you mean 'tiny'"),
    ("trian", 2, "No such command 'trian'"),
    ("train autoencodr", 2, "No such command 'autoencodr'"),
    ("demo --qick", 2, "No such option"),
    ("demo --seed one", 2, "Invalid value for '--seed'"),
    ("bench training tiny --stage third", 2, "Invalid value for '--stage'"),
    ("convert vavae", 2, "Missing argument"),
    ("convert lightningdit a.pt --out o --weights emma", 2, "Invalid value for '--weights'"),
    ("convert davae-sd3 a.pt --out o --base b --order first", 2, "Invalid value for '--order'"),
    ("upgrade tiny --autoencoder a --out o --timestep-shift x", 2, "must be 'base', 'native' or a number"),
    ("compare autoencoder a --data procedural:4 --resolution 32", 2, "autoencoder a: write NAME="),
    ("demo --out file", 2, "file cannot be a folder"),
    ("configs --out file", 2, "file cannot be a folder"),
    ("comfyui --out file", 2, "file cannot be a folder"),
    ("train autoencoder data.pth=x", 2, "unknown key 'data.pth'; did you mean 'data.path'?"),
    ("train diffusion --recipe tinny", 2, "did you mean 'tiny'"),
    ("train base --recipe none.yaml", 2, "no recipe file none.yaml"),
    ("train dc-ae data.pth=x", 2, "unknown key 'data.pth'"),
    ("cache --recipe debug data.resolution=large", 2, "'data.resolution' is 'large'"),
    ("ablate sedes=[0]", 2, "unknown key 'sedes'; did you mean 'seeds'?"),
    ("ablate overrides=[data.pth=x]", 2, "unknown key 'data.pth'"),
    ("ablate --recipe tiny", 2, "is of kind 'upgrade', not an ablation"),
    ("ablate --dry-run", 0, "kind: ablation"),
    ("plan tiny --recipe tinny", 2, "did you mean 'tiny'"),
    ("demo --recipe tinny", 2, "did you mean 'tiny'"),
    ("demo --data /nowhere", 2, NOWHERE),
    ("train autoencoder --recipe debug data.path=/nowhere", 2, NOWHERE),
    ("train diffusion --recipe debug data.path=/nowhere", 2, NOWHERE),
    ("train base data.path=/nowhere", 2, NOWHERE),
    ("train dc-ae data.path=/nowhere", 2, NOWHERE),
    ("train autoencoder --recipe debug data.revision=v1", 2, "data.revision is set, but"),
    ("cache --recipe debug data.path=/nowhere", 2, NOWHERE),
    ("reconstruct vae /nowhere", 2, NOWHERE),
    ("inspect vae --data /nowhere", 2, NOWHERE),
    ("evaluate reconstruction vae --data /nowhere", 2, NOWHERE),
    ("compare autoencoder a=b --data /nowhere --resolution 32", 2, NOWHERE),
]
CHILD = """
import contextlib, io, json, sys
from davae.cli.main import main
answers = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err = ["davae", *arguments.split()], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main() or 0
        except SystemExit as end:
            status = end.code or 0
    heavy = [name for name in HEAVY if name in sys.modules]
    answers.append([status, out.getvalue() + err.getvalue(), heavy])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every answer, given in one process: what one of them imports, the later ones have too."""
    here = tmp_path_factory.mktemp("door")
    (here / "file").write_text("x")
    result = subprocess.run(
        [sys.executable, "-c", CHILD.replace("HEAVY", repr(HEAVY))],
        input=json.dumps([arguments for arguments, *_ in ANSWERS]),
        env={**os.environ, "COLUMNS": "300"},
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [p.name for p in here.iterdir()] == ["file"]
    return dict(zip([arguments for arguments, *_ in ANSWERS], json.loads(result.stdout), strict=True))


@pytest.mark.parametrize(("arguments", "status", "words"), ANSWERS)
def test_answers_without_torch(arguments: str, status: int, words: str, answers: dict[str, Any]) -> None:
    ended, text, heavy = answers[arguments]
    assert ended == status, text
    assert words in text
    assert heavy == []


def test_verbs_are_all_here() -> None:
    group: Any = get_command(app)
    found = set(group.commands)
    for name, command in group.commands.items():
        found |= {f"{name} {inner}" for inner in getattr(command, "commands", ())}
    assert found == set(VERBS)


def test_starting_python_with_davae_in_it_is_as_quick() -> None:
    code = f"import sys, davae; print([name for name in {HEAVY} if name in sys.modules], 'rich' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[] False"
