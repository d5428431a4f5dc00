"""The licence of an exported model, in the hub's terms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from davae.bases.tiny import debug_base
from davae.cli.main import app
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import Licence, find_licence
from davae.pipelines.saving.licence import read_front_matter

NAME, LINK = "stabilityai-ai-community", "https://example.org/LICENSE.md"
SD35 = f"license: other\nlicense_name: {NAME}\nlicense_link: {LINK}"


def _base(folder: Path, entries: str) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{entries}\n---\n# A base\n")
    return folder


@pytest.mark.parametrize("given", ["apache-2.0", "Apache-2.0", "openrail++", "gemma"])
def test_an_id_of_the_hub_stays_one(given: str) -> None:
    assert find_licence("someone/absent", given) == Licence(given.lower())
    with pytest.raises(DavaeError, match="leave --license-name and --license-link out"):
        find_licence("someone/absent", given, link=LINK)


def test_another_licence_is_other_with_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_licence("someone/absent", NAME, link=LINK) == Licence("other", NAME, LINK)
    assert find_licence("someone/absent", "other", name=NAME, link=LINK) == Licence("other", NAME, LINK)
    assert find_licence("someone/absent", name=NAME, link=LINK) == Licence("other", NAME, LINK)
    assert not caplog.records
    assert find_licence("someone/absent", NAME) == Licence("other", NAME)
    assert "--license-link" in caplog.text
    with pytest.raises(DavaeError, match="needs a name"):
        find_licence("someone/absent", "other")


def test_name_and_link_are_the_base_s_where_its_card_has_them(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", SD35)
    for given in (None, "other", NAME):
        assert find_licence(base, given) == Licence("other", NAME, LINK)
        assert find_licence(base, given, link="https://else") == Licence("other", NAME, "https://else")
    assert find_licence(base, "my-own") == Licence("other", "my-own")
    assert find_licence(base, "mit") == Licence("mit")
    loose = _base(tmp_path / "loose", f"license: [{NAME}]\nlicense_link: {LINK}")  # as people write it
    assert find_licence(loose) == find_licence(loose, NAME) == Licence("other", NAME, LINK)
    plain = _base(tmp_path / "plain", "license: mit")
    assert find_licence(plain) == Licence("mit")
    assert find_licence(plain, NAME, link=LINK) == Licence("other", NAME, LINK)


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match=r"has two names, 'mine' .* and 'yours'"):
        find_licence("someone/absent", "mine", name="yours")
    assert find_licence("someone/absent", "mine", name="Mine", link=LINK).id == "other"
    plain = _base(tmp_path / "plain", "license: mit")
    for given in ({}, {"name": "MIT"}):
        with pytest.raises(DavaeError, match="leave --license-link out"):
            find_licence(plain, link=LINK, **given)
    assert find_licence(plain, name="MIT") == Licence("mit")


def test_cards_of_bases_that_say_too_little_or_too_much(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = _base(tmp_path / "listed", "- license\n- mit")
    with pytest.raises(DavaeError, match="names none"):
        find_licence(listed)
    several = _base(tmp_path / "several", "license: [mit, apache-2.0]")
    with pytest.raises(DavaeError, match="names several"):
        find_licence(several)
    assert find_licence(several, "mit") == Licence("mit")
    nameless = _base(tmp_path / "nameless", f"license: other\nlicense_link: {LINK}")
    with pytest.raises(DavaeError, match="licence 'other' without a name"):
        find_licence(nameless)
    assert find_licence(nameless, name=NAME) == Licence("other", NAME, LINK)
    assert not caplog.records
    beside = _base(tmp_path / "beside", f"license: other\nlicense_name: {NAME}\nlicense_link: LICENSE.md")
    assert find_licence(beside, NAME.upper()) == Licence("other", NAME)
    assert "LICENSE.md, which is not copied" in caplog.text


def test_the_verb_writes_what_the_hub_wants(tmp_path: Path) -> None:
    run = tmp_path / "run"
    torch.manual_seed(0)
    AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8).save_pretrained(run / "autoencoder")
    (run / "config.yaml").write_text(yaml.safe_dump({"base": "stabilityai/stable-diffusion-3.5-medium"}))
    arguments = ["export", str(run / ""), "--out", str(tmp_path / "out"), "--license", NAME]
    done = CliRunner().invoke(app, [*arguments, "--license-link", LINK], catch_exceptions=False)
    assert done.exit_code == 0
    entries = read_front_matter(tmp_path / "out" / "README.md")
    assert {key: entries[key] for key in ("license", "license_name", "license_link")} == {
        "license": "other",
        "license_name": NAME,
        "license_link": LINK,
    }
