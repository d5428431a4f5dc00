"""``import davae``: light, with every public name, and seen by diffusers whichever is imported first."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import davae
from davae.bases.tiny import debug_base
from davae.import_hooks import after_import

OPEN = """
folder = sys.argv[1]
pipe = DiffusionPipeline.from_pretrained(folder)
assert type(pipe) is davae.ClassConditionalPipeline, type(pipe)
assert type(pipe.vae) is davae.AutoencoderDA, type(pipe.vae)
assert diffusers.ClassConditionalPipeline is davae.ClassConditionalPipeline
assert diffusers.pipelines.davae is davae
"""


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upgraded")
    base = debug_base()
    vae = davae.AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    davae.upgrade_pipeline(base, vae).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import davae\nassert 'torch' not in sys.modules\nimport diffusers\nfrom diffusers import DiffusionPipeline",
        "import diffusers\nfrom diffusers import DiffusionPipeline\nimport davae",
        "from davae import AutoencoderDA\nimport davae\nimport diffusers\nfrom diffusers import DiffusionPipeline",
    ],
    ids=["davae first", "diffusers first", "a name of davae first"],
)
def test_plain_diffusers_opens_what_davae_saved(imports: str, upgraded: Path) -> None:
    code = f"import sys\n{imports}\n{OPEN}"
    result = subprocess.run([sys.executable, "-c", code, str(upgraded)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there() -> None:
    for name in davae.__all__:
        assert getattr(davae, name) is getattr(davae, name)
        assert name in dir(davae)
    assert davae.pipelines.upgrade_pipeline is davae.upgrade_pipeline
    with pytest.raises(AttributeError, match="'davae' has no attribute 'upgrade_pipelin'"):
        _ = davae.upgrade_pipelin  # type: ignore[attr-defined]


def test_an_action_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called once, after the module's code, with what stands in sys.modules; the module keeps its own loader."""
    (tmp_path / "imported_late.py").write_text(
        "import sys, types\nvalue = 1\nother = types.ModuleType(__name__)\nother.value = value + 1\n"
        "other.__spec__ = __spec__\nsys.modules[__name__] = other\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    after_import("imported_late", lambda module: seen.append(module.value))
    assert importlib.util.find_spec("imported_late") is not None  # looked for, not imported
    assert seen == []
    import imported_late  # type: ignore[import-not-found]

    assert seen == [imported_late.value] == [2]
    assert isinstance(imported_late.__spec__.loader, importlib.machinery.SourceFileLoader)
    after_import("imported_late", lambda module: seen.append(-module.value))  # there already: at once
    assert seen == [2, -2]
    del sys.modules["imported_late"]
    importlib.import_module("imported_late")
    assert seen == [2, -2]
