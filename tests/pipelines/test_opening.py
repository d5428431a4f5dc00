"""What opening tells of folders that lack parts, of code beside the weights, and of names that are not there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from davae.bases.open import load_base
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.pipelines.saving.opening import opening
from davae.planner import architectures as planner_architectures


def test_components_that_the_caller_brings_need_no_folder(tmp_path: Path) -> None:
    debug_base().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(DavaeError, match="lacks vae/"), opening("pipeline", str(tmp_path)):
        pytest.fail("opened all the same")
    with opening("pipeline", str(tmp_path), passed={"vae": None}):
        pass


def test_only_a_recipe_is_told_to_say_more(tmp_path: Path) -> None:
    debug_base().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"] = ["brought", "BroughtPipeline"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "brought.py").write_text("class BroughtPipeline:\n    pass\n")
    with pytest.raises(DavaeError, match="say base_remote_code: true in the recipe"):
        load_base(str(tmp_path), remote_code=False)
    with pytest.raises(DavaeError, match="open it in Python with trust_remote_code=True"):
        load_base(str(tmp_path))


def test_other_mistakes_of_value_go_through() -> None:
    for text in ("give trust_remote_code=True", "anything else"):
        with pytest.raises(ValueError, match=text) as caught, opening("pipeline", "someone/some"):
            raise ValueError(text)
        assert not isinstance(caught.value, DavaeError)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("We couldn't connect to the hub.", "the hub was not reached; the path of a copy does as well$"),
        ("no file of safetensors: connect to get one", r"the hub does not provide it \(no file of safetensors"),
    ],
)
def test_names_that_the_hub_does_not_give(message: str, words: str) -> None:
    with pytest.raises(DavaeError, match=words), opening("pipeline", "someone/absent"):
        raise OSError(message)


def test_the_line_of_a_failed_fetch_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        with opening("autoencoder", "someone/some"):
            logger.error("An error occurred while trying to fetch someone/some: no")
            logger.error("something else")
        logger.error("An error occurred while trying to fetch it afterwards")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage().split()[-1] for record in caplog.records} == {"else", "afterwards"}


def test_a_plan_asks_the_hub_for_names_of_the_hub_alone_and_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, asked = logging.getLogger("huggingface_hub"), []
    before = hub.level

    def unreachable(name: str, file: str) -> str:
        asked.append((name, hub.isEnabledFor(logging.WARNING)))
        raise OSError("the hub is not there")

    monkeypatch.setattr(planner_architectures, "hf_hub_download", unreachable)
    with pytest.raises(DavaeError, match="no name of the hub"):
        planner_architectures.find_architecture("nosuch")
    with pytest.raises(DavaeError, match="the hub is not there"):
        planner_architectures.find_architecture("someone/absent")
    assert asked == [("someone/absent", False)]
    assert hub.level == before
