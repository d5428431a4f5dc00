"""The card: entries, inherited licence, figures, how to use; and publishing with a stub of the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from tests.pipelines.parts import upgraded

import davae
from davae.bases.debug_pipelines import small_pipeline
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.pipelines import Licence, Making, attach_lora, find_licence, write_model_card
from davae.pipelines.saving import model_card, publishing, saving
from davae.pipelines.saving.licence import read_front_matter

SD35 = "license: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md"


def base_folder(folder: Path, entries: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{entries}\n---\n# A base\n")
    return folder


def test_the_licence_is_the_given_one_or_the_base_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_folder(tmp_path / "base", SD35)
    assert find_licence(base) == Licence("other", "stabilityai-ai-community")
    assert find_licence(base, link="https://x/L") == Licence("other", "stabilityai-ai-community", "https://x/L")
    assert find_licence(base, "mit") == Licence("mit")
    assert find_licence(base).title == "stabilityai-ai-community"
    with pytest.raises(DavaeError, match=r"README\.md names none"):
        find_licence(base_folder(tmp_path / "other", "tags: [x]"))
    with pytest.raises(DavaeError, match="not valid YAML"):
        find_licence(base_folder(tmp_path / "other", "license: [x"))
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "someone/unknown", "not a name of the hub//"):
        with pytest.raises(DavaeError, match="give it as license="):
            find_licence(name)
    monkeypatch.setattr(
        "davae.pipelines.saving.licence.try_to_load_from_cache", lambda name, file: str(base / "README.md")
    )
    link = "https://huggingface.co/stabilityai/sd/blob/main/LICENSE.md"
    assert find_licence("stabilityai/sd") == Licence("other", "stabilityai-ai-community", link)


def test_card_of_a_pipeline(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", SD35)
    making = Making(
        figures={"psnr": 31.415926, "tokens": {"base": 64, "native": 256}, "note": "not a number"},
        commands=["davae train autoencoder --recipe tiny", "davae train diffusion --recipe tiny"],
        hardware={"on": "one GPU"},
        datasets=["someone/pictures"],
        recipe="base: tiny\n",
    )
    out = davae.save_pipeline(
        upgraded(small_pipeline("sd3")), tmp_path / "out", base_model=str(base), making=making, name="me/fox"
    )
    card = ModelCard.load(out / "README.md")  # the hub's own reader
    entries = card.data.to_dict()
    assert entries["library_name"] == "diffusers"
    assert entries["license"] == "other"
    assert entries["license_name"] == "stabilityai-ai-community"
    assert entries["base_model"] == "base"  # a name of the hub stays, a folder of this disk is cut
    assert entries["base_model_relation"] == "finetune"
    assert entries["pipeline_tag"] == "text-to-image"
    assert entries["tags"] == ["davae", "autoencoder"]
    assert entries["datasets"] == ["someone/pictures"]
    for said in (
        "2 times the base's resolution",
        "4 base channels",
        "8 x 8 pixels",
        "| psnr | 31.42 |",
        "| tokens.native | 256 |",
        "    davae train diffusion --recipe tiny",
        'davae.load_pipeline("me/fox")',
        'DiffusionPipeline.from_pretrained("me/fox")',
        'DiffusionPipeline.from_pretrained("me/fox", trust_remote_code=True)',
        "applies to this model too: stabilityai-ai-community.",
    ):
        assert said in card.text, said
    assert "not a number" not in card.text


def test_card_of_classes_says_that_the_pipeline_is_custom_too(tmp_path: Path) -> None:
    out = davae.save_pipeline(upgraded(debug_base()), tmp_path, base_model="x/y", license="apache-2.0")
    card = ModelCard.load(out / "README.md")
    assert 'custom_pipeline="pipeline", trust_remote_code=True' in card.text
    assert card.data.pipeline_tag == "unconditional-image-generation"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lumina2", "assumes 8 pixels per latent position"),
        ("pixart-sigma", "pass `use_resolution_binning=False`"),
        ("sana", "pass `use_resolution_binning=False`"),
        ("sd3", None),
    ],
)
def test_cards_warn_of_the_classes_that_write_sizes_down(tmp_path: Path, name: str, said: str | None) -> None:
    out = davae.save_pipeline(upgraded(small_pipeline(name)), tmp_path, base_model="x/y", license="mit")
    card = (out / "README.md").read_text()
    assert said in card if said else "loaded in another way" not in card


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("StableDiffusion3Pipeline", "text-to-image"),
        ("StableDiffusion3InpaintPipeline", "image-to-image"),
        ("QwenImageImg2ImgPipeline", "image-to-image"),
        ("FluxKontextPipeline", "image-to-image"),
        ("Flux2Pipeline", "text-to-image"),
        ("DiTPipeline", "unconditional-image-generation"),
        ("ClassConditionalPipeline", "unconditional-image-generation"),
        ("SomebodysPipeline", "text-to-image"),
    ],
)
def test_the_task_of_a_pipeline(name: str, task: str) -> None:
    assert model_card._task(name, text=True) == task


def test_card_of_an_autoencoder_with_levels_and_of_adapters(tmp_path: Path) -> None:
    pipe = upgraded(debug_base())
    two = davae.AutoencoderDA.from_base(pipe.vae, scale=2, detail_channels=16)
    two.save_pretrained(tmp_path / "vae")
    card = write_model_card(tmp_path / "vae", base_model="x/y", license="mit").read_text()
    assert "4 times the base's resolution" in card
    assert "4 base channels" in card
    assert "20 detail channels" in card
    assert "AutoModel.from_pretrained" in card
    attach_lora(pipe.transformer, LoraConfig(r=1, target_modules=["to_q"]))
    davae.save_adapters(pipe, tmp_path / "adapters")
    card = write_model_card(tmp_path / "adapters", base_model="x/y", license="mit").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["davae", "autoencoder", "lora"]
    assert "base_model_relation: adapter" in card
    assert "davae.load_adapters(base" in card
    debug_base().vae.save_pretrained(tmp_path / "plain")
    with pytest.raises(DavaeError, match="holds no AutoencoderDA"):
        write_model_card(tmp_path / "plain", base_model="x/y", license="mit")


class StubHub:
    """Remembers what was asked of it."""

    calls: list[tuple[str, Any]]

    def __init__(self, token: str | None = None) -> None:
        type(self).calls = [("token", token)]

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("create", (repo_id, options)))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        files = {str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file()}
        self.calls.append(("upload", (repo_id, files)))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_publishing_uploads_the_folder_with_card_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "HfApi", StubHub)
    pipe = upgraded(debug_base())
    pipe.save_pretrained(tmp_path / "bare")
    with pytest.raises(DavaeError, match="no model card that names a licence"):
        davae.push_to_hub(tmp_path / "bare", "me/fox")
    out = davae.save_pipeline(pipe, tmp_path / "out", base_model="x/y", license="mit")
    assert davae.push_to_hub(out, "me/fox", private=True, token="t") == "https://hub/me/fox/commit/1"
    (_, token), (_, created), (_, (name, files)) = StubHub.calls
    assert (token, name) == ("t", "me/fox")
    assert created == ("me/fox", {"private": True, "exist_ok": True})
    assert {"README.md", "model_index.json", "pipeline.py", "vae/davae.py", "transformer/davae.py"} <= files
    index = json.loads((out / "model_index.json").read_text())
    for component, value in index.items():  # what diffusers asks of a repository before it loads anything
        if isinstance(value, list) and value[0] == "davae":
            assert f"{component}/{value[0]}.py" in files


def test_a_hub_that_is_out_of_reach_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(StubHub):
        def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
            raise ConnectionError("[Errno -3] Temporary failure in name resolution\nmore")

    monkeypatch.setattr(saving, "HfApi", Unreachable)
    out = davae.save_pipeline(upgraded(debug_base()), tmp_path / "out", base_model="x/y", license="mit")
    with pytest.raises(DavaeError, match=r"was not published as me/fox: .*name resolution \(log in.*hf upload me/fox"):
        davae.push_to_hub(out, "me/fox")


def test_a_card_shows_its_pictures_and_names_its_data(tmp_path: Path) -> None:
    making = model_card.Making(datasets=["me/foxes"], pictures={"samples.png": "samples of [step] 4"})
    out = davae.save_pipeline(upgraded(debug_base()), tmp_path / "out", base_model="x/y", license="mit", making=making)
    card = (out / "README.md").read_text()
    assert r"![samples of \[step\] 4](<samples.png>)" in card
    assert "datasets:\n- me/foxes\n" in card


def test_what_is_published_is_said_before_and_holds_nothing_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saving, "HfApi", StubHub)
    pipe = upgraded(debug_base())
    pipe.vae.register_to_config(_name_or_path="/home/someone/vae")
    making = model_card.Making(
        commands=["davae train diffusion data.path=/home/someone/photos"], datasets=["/home/x/y"]
    )
    out = davae.save_pipeline(pipe, tmp_path / "out", base_model="/home/someone/base", license="mit", making=making)
    assert "someone" not in (out / "README.md").read_text()
    config = out / "vae" / "config.json"
    assert json.loads(config.read_text())["_name_or_path"] == "vae"
    config.write_text(
        config.read_text().replace('"_name_or_path": "vae"', '"_name_or_path": "C:\\\\Users\\\\me\\\\vae"')
    )
    with caplog.at_level("INFO", logger="davae"):
        davae.push_to_hub(out, "me/fox")
    assert json.loads(config.read_text())["_name_or_path"] == "vae"
    said = caplog.text
    for file in StubHub.calls[-1][1][1]:
        assert f"{file}, " in said
    for kind in ("link", "hidden"):
        stray = out / ("link" if kind == "link" else ".env")
        stray.symlink_to(tmp_path) if kind == "link" else stray.write_text("key")
        with pytest.raises(DavaeError, match=f"{stray.name} is (a )?{kind}, which is not published"):
            davae.push_to_hub(out, "me/fox")
        stray.unlink()


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("stabilityai/sd3", "stabilityai/sd3"),
        ("tiny", "tiny"),
        ("debug-sd3", "debug-sd3"),
        ("/home/me/sd3", "sd3"),
        ("/home/me/sd3/", "sd3"),
        ("~/models/sd3", "sd3"),
        ("../sd3", "sd3"),
        ("./a/sd3", "sd3"),
        ("runs/x/pipeline", "pipeline"),
        ("C:\\models\\sd3", "sd3"),
        ("\\\\server\\share\\sd3", "sd3"),
        ("file:///home/me/sd3", "sd3"),
        ("https://me:hf_key@host/a/sd3?token=key", "sd3"),
    ],
)
def test_names_of_the_hub_stay_and_folders_are_cut(name: str, public: str) -> None:
    assert publishing.public_name(name) == public


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("cannot read '/home/me/a b/c.png': broken", "cannot read 'c.png': broken"),
        ("at ~someone/x, //server/share/x and \\\\server\\share\\me\\x", "at x, x and x"),
        ("see file:/home/me/x:/home/you/y in /home/me/", "see x:y in me"),
        ("https://me:hf_key@host/a?token=key#key and s3://id:key@b/c", "https://host/a and s3://b/c"),
        ("https://host/a/b and s3://bucket/x/y", "https://host/a/b and s3://bucket/x/y"),
        ("a/b/c and 1/2", "a/b/c and 1/2"),
        ("read /etc/x/y, ~/z/w and C:\\u\\v.txt", "read y, w and v.txt"),
        ("[/data/a/1.tar,/data/a/2.tar]", "[1.tar,2.tar]"),
        ("procedural:64", "procedural:64"),
    ],
)
def test_texts_keep_all_but_the_folders(text: str, public: str) -> None:
    assert publishing.public_text(text) == public


def test_names_from_outside_show_as_text_in_the_card(tmp_path: Path) -> None:
    evil = "a`b|c<script>[x](y)\n# Heading\x1b\u202e"
    making = Making(
        figures={evil: {"psnr": 1.0}, "ssim": 0.5},
        commands=[f"davae train prompts=['{evil}\n\n```\n</details>']"],
        hardware={"on": evil},
        recipe="prompts: |\n  a\n```\n</details><script>\n\u202e",
    )
    licence = Licence("other", evil, "https://x/y) [z](https://w")
    davae.save_pipeline(
        upgraded(debug_base()), tmp_path, base_model=evil, license=licence, making=making, name='x/"\n# y'
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license_name) == (evil, evil)
    assert read_front_matter(tmp_path / "README.md")["license_name"] == evil
    before, fenced = card.text.split("````yaml\n")
    lines = before.split("\n")
    assert fenced.count("\n````\n") == 1
    assert [line for line in lines if line.startswith("# ")] == ['# "\\\\n# y']
    table = lines[lines.index("|---|---|") + 1 :][:2]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in table] == [3, 3]
    spoken = "\n".join(line for line in lines if not line.startswith("    "))  # indented lines are code
    assert not re.search(r"(?<!\\)<script|^</details", re.sub("`` .* ``", "", spoken), re.MULTILINE)
    assert not re.search("[\x1b\u202e]", card.text)
    assert 'davae.load_pipeline("x/\\"\\n# y")' in before
    assert "(<https://x/y)[z](https://w>)" in fenced


def test_commands_stay_as_they_were_typed_where_nothing_is_private() -> None:
    plain = "davae train diffusion --recipe tiny seeds=[0] data.path=photos/"
    assert publishing.public_command(plain) == plain
    private = "davae train diffusion --autoencoder=/a/b/vae '--out' '/x y/z w' data.path=/p/q/"
    assert publishing.public_command(private) == "davae train diffusion --autoencoder=vae --out 'z w' data.path=q"
