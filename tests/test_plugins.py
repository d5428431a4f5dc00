"""Plug-ins: families, adapters and data sources of an installed package, found by entry points."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from davae import import_hooks
from davae.data import open_dataset
from davae.errors import DavaeError
from davae.models.base_adapters import adapter
from davae.pipelines.families import family, find_family
from davae.recipes.data import check_data_path
from tests.data.files import picture

MODULE = """
from diffusers import AutoencoderKL
from davae.data import FolderSource
from davae.models import register_adapter
from davae.models.base_adapters.image import KLAdapter
from davae.pipelines.families import UpgradeOnlyFamily, register_family

class MyVae(AutoencoderKL):
    pass

class Mine(UpgradeOnlyFamily):
    pipelines = ("MyOwnPipeline",)
    lora_targets = ("to_q",)

def families():
    register_family(Mine())

def adapters():
    register_adapter(MyVae, KLAdapter())

def open_bucket(name, split):
    return FolderSource(FOLDER + "/" + name, split)
"""
ENTRIES = """
[davae.families]
mine = my_plugin:families
[davae.adapters]
mine = my_plugin:adapters
[davae.sources]
bucket = my_plugin:open_bucket
broken = my_plugin:nothing
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with plug-ins, as pip would install it."""
    (tmp_path / "my_plugin.py").write_text(MODULE.replace("FOLDER", repr(str(tmp_path))))
    info = tmp_path / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_plugin", raising=False)
    monkeypatch.setattr(import_hooks, "_called", set())
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    monkeypatch.setattr(adapter, "_ADAPTERS", dict(adapter._ADAPTERS))
    return tmp_path


def test_a_family_and_an_adapter_are_found(plugged: Path) -> None:
    assert find_family("MyOwnPipeline").lora_targets == ("to_q",)
    assert adapter.find_adapter("MyVae")[0].__name__ == "MyVae"


def test_a_source_opens_what_stands_behind_its_name(plugged: Path) -> None:
    (plugged / "photos").mkdir()
    for number in range(3):
        picture(number, (40, 40)).save(plugged / "photos" / f"{number}.png")
    images = open_dataset("bucket://photos", resolution=32)
    assert sorted(images.id(i) for i in range(len(images))) == ["0.png", "1.png", "2.png"]


def test_plug_ins_that_are_not_there_or_broken_are_told_in_one_line(plugged: Path) -> None:
    with pytest.raises(DavaeError, match=r"no plug-in opens cloud:// .*bucket"):
        check_data_path("cloud://photos")
    with pytest.raises(
        DavaeError, match=r"the plug-in broken = my_plugin:nothing .*package my-plugin cannot be loaded"
    ):
        open_dataset("broken://photos", resolution=32)
