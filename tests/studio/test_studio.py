"""What the studio shows, without its page: models, pictures, samples, plans and runs, and nothing from elsewhere."""

from __future__ import annotations

import asyncio
import html
import json
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from davae.bases.debug_pipelines import small_pipeline
from davae.bases.open import load_base
from davae.cli.main import app
from davae.data.images.transforms import image_to_tensor
from davae.errors import DavaeError
from davae.evaluation import psnr
from davae.pipelines.sampling import generate
from davae.pipelines.sampling.generate import generate_images, watch_image
from davae.pipelines.sampling.previews import Previews
from davae.planner.recipes import plan_upgrade
from davae.runtime.resizing import upscaled
from davae.studio import (
    ALONE,
    DETAILS,
    ENLARGED,
    NATIVE,
    ORIGINAL,
    REDUCED,
    Models,
    find_runs,
    inside,
    open_models,
    plan_form,
    reconstruct_file,
    sample_side_by_side,
    watch_run,
)
from davae.studio import page as studio_page


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return open_models("debug", tmp_path_factory.mktemp("runs"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs: one of each stage, the second finished, and a link."""
    root = tmp_path / "runs"
    for name, config, steps in (
        ("demo/autoencoder", "kind: upgrade\nautoencoder: {loop: {steps: 900}}\n", (20, 40)),
        ("demo/diffusion", "autoencoder_folder: x\ndiffusion: {loop: {steps: 40}}\n", (10, 20, 40)),
    ):
        run = root / name
        (run / "samples").mkdir(parents=True)
        (run / "config.yaml").write_text(config)
        lines = [json.dumps({"step": step, "total": 1 / step, "learning_rate": 0.1}) for step in steps]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (root / "demo/diffusion/pipeline").mkdir()
    for step in (20, 9, 40):
        Image.new("RGB", (8, 8)).save(root / f"demo/diffusion/samples/step-{step}.png")
    (root / "demo/diffusion/samples/step-50.png").symlink_to(root / "demo/diffusion/samples/step-9.png")
    (root / "linked").symlink_to(root / "demo")
    return root


def picture(folder: Path, width: int = 52, height: int = 40) -> Path:
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))
    file = folder / "picture.png"
    Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy()).save(file)
    return file


def test_without_an_upgrade_the_embedded_base_works_and_the_page_says_how_to_make_one(
    models: Models, tmp_path: Path
) -> None:
    assert models.pipe is not None
    assert models.base is not None
    assert models.vae.uses_details
    assert not models.pipe.vae.uses_details
    assert torch.equal(models.pipe.transformer.proj_out.weight, models.base.transformer.proj_out.weight)
    assert "nothing trained" in models.notes[0]
    assert "davae demo" in models.notes[-1]


def test_what_a_run_has_finished_is_found_and_its_base_with_it(models: Models, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "photos"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    data = "data: {path: procedural, resolution: 32, split: train, hold_out: 1}\n"
    (run / "config.yaml").write_text(f"base: debug\n{data}")
    models.vae.save_pretrained(run / "autoencoder")
    found = open_models(None, tmp_path / "runs")
    assert (found.name, found.side) == (str(run / "autoencoder"), 32)
    assert found.base is not None  # named by the recipe
    assert found.pipe is not None  # decoded by the decoder alone, since no transformer was tuned
    assert not found.pipe.vae.uses_details
    assert any("decoder alone" in note for note in found.notes)

    (run / "config.yaml").write_text(data)
    alone = open_models(str(run), tmp_path / "runs")
    assert alone.pipe is None
    assert "--base" in alone.notes[-1]
    with pytest.raises(DavaeError, match="no pipeline to generate with"):
        next(sample_side_by_side(alone, "0"))
    with pytest.raises(DavaeError, match="there is no such folder"):
        open_models(str(run), tmp_path, base=str(tmp_path / "nowhere"))

    load_base("debug").save_pretrained(tmp_path / "base")
    with pytest.raises(DavaeError, match="is a base: upgrade it"):
        open_models(str(tmp_path / "base"), tmp_path)


def test_a_pictures_reconstructions_are_the_autoencoders(models: Models, tmp_path: Path) -> None:
    vae = models.vae
    original, made = reconstruct_file(models, picture(tmp_path), 256)
    assert original.size == (48, 40)  # cut to whole positions of 8 pixels, not enlarged
    assert list(made) == [ENLARGED, ALONE, DETAILS, NATIVE, REDUCED]
    image = image_to_tensor(original)[None]
    with torch.no_grad():
        z, z_d = vae.encode_base(image), vae.encode_details(image).mean
        expected = {
            ENLARGED: upscaled(vae.decode_base(z).clamp(-1, 1), (40, 48)),
            ALONE: vae.decode_structured(z, torch.zeros_like(z_d)),
            DETAILS: vae.decode_structured(z, z_d),
        }
    for name, reconstruction in expected.items():
        torch.testing.assert_close(made[name].image, reconstruction.clamp(-1, 1)[0], atol=1e-5, rtol=0)
        assert made[name].psnr == pytest.approx(float(psnr(image, made[name].image[None])))
    positions = {name: one.positions for name, one in made.items()}
    assert positions == {ENLARGED: 30, ALONE: 30, DETAILS: 30, NATIVE: 120, REDUCED: 0}
    assert reconstruct_file(models, picture(tmp_path), 26)[0].size == (24, 16)  # 26 x 20


def test_what_is_no_picture_or_too_large_is_refused_before_it_is_decoded(models: Models, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DavaeError, match="not an image"):
        reconstruct_file(models, tmp_path / "text.png", 64)
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    with pytest.raises(DavaeError, match="at most 50,000,000 are taken"):
        reconstruct_file(models, tmp_path / "large.png", 64)
    with pytest.raises(DavaeError, match="1 to 2048 pixels, not 4096"):
        reconstruct_file(models, picture(tmp_path), 4096)


def test_samples_are_those_of_generate_and_counted_side_by_side(models: Models) -> None:
    assert models.pipe is not None
    assert models.base is not None
    options: dict[str, Any] = {"seed": 5, "steps": 3, "guidance": 2.0}
    seen, previews = [], []
    for samples in sample_side_by_side(models, "3", native=True, **options):
        seen.append([0 if one.state is None else one.state.step for one in samples])
        previews += [one.state.preview for one in samples if one.state is not None and one.name == ALONE]
    assert seen[:4] == [[1, 0, 0], [2, 0, 0], [3, 0, 0], [3, 0, 0]]  # and once more with the image
    assert seen[-1] == [3, 3, 3]
    assert [one.name for one in samples] == [ENLARGED, ALONE, NATIVE]
    for one, pipe, side in zip(samples, (models.base, models.pipe, models.base), (None, None, 32)):
        assert one.state is not None
        expected = next(generate_images(pipe, ["3"], height=side, width=side, **options)).image
        assert one.state.image is not None
        assert one.state.image.tobytes() == expected.tobytes()
    assert [one.tokens for one in samples] == [16, 16, 64]
    assert {shown.size for shown in previews if shown is not None} == {(16, 16)}


def test_stopping_ends_the_sampling_after_a_step(models: Models) -> None:
    stop = threading.Event()
    samples = sample_side_by_side(models, "0", steps=500, stop=stop)
    state = next(samples)[0].state
    assert state is not None
    assert (state.step, state.image) == (1, None)
    stop.set()
    assert list(samples) == []
    assert "sampling" not in {thread.name for thread in threading.enumerate()}


def test_an_error_of_the_pipeline_arrives_where_the_image_is_waited_for(models: Models) -> None:
    with pytest.raises(DavaeError, match="out of range"):
        next(sample_side_by_side(models, "99"))
    with pytest.raises(DavaeError, match="not a multiple"):
        list(sample_side_by_side(models, "0", height=9, width=9))


def test_time_is_of_sampling_without_its_previews(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.pipe is not None
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    shown = Previews.on_step

    def advance(seconds: float) -> None:
        clock.now += seconds

    def preview(self: Previews, *step: Any) -> None:
        advance(100)
        shown(self, *step)

    monkeypatch.setattr(generate, "time", clock)
    monkeypatch.setattr(Previews, "on_step", preview)
    hook = models.pipe.transformer.register_forward_hook(lambda *_: advance(1))
    states = list(watch_image(models.pipe, "3", steps=3))
    hook.remove()
    assert [state.seconds for state in states] == [1, 2, 3, 3]


@pytest.mark.parametrize(("name", "called"), [("sd3", 2), ("pixart-sigma", 2), ("dit", 0)])
def test_every_form_of_callback_is_served(name: str, called: int) -> None:
    """The new one, the older one of PixArt, and a pipeline that has none."""
    pipe = small_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    side = None if name == "dit" else 32
    states = list(watch_image(pipe, "3", steps=2, height=side, width=side))
    assert [state.step for state in states] == [*range(1, called + 1), 2]
    assert states[-1].image is not None
    assert 0 < states[-1].seconds < 600


def test_runs_are_found_below_the_folder_and_links_are_not_followed(runs: Path) -> None:
    found = [run.relative_to(runs).as_posix() for run in find_runs(runs)]
    assert sorted(found) == ["demo/autoencoder", "demo/diffusion"]
    view = watch_run(runs, "demo/diffusion")
    assert (view.step, view.steps, view.finished) == (40, 40, True)
    assert [file.stem for file in view.sheets] == ["step-40", "step-20", "step-9"]  # the newest first, and no link
    assert [entry["name"] for entry in view.curve["legend"]] == ["total"]
    view = watch_run(runs, "demo/autoencoder")
    assert (view.step, view.steps, view.finished, view.sheets) == (40, 900, False, [])


def test_only_what_has_changed_is_sent_again(runs: Path) -> None:
    gradio = SimpleNamespace(
        Error=RuntimeError, skip=lambda: "skip", Dropdown=lambda **new: new, Radio=lambda *_, **new: new
    )
    page = studio_page._Page(gradio, SimpleNamespace(vae=SimpleNamespace(uses_details=True)), runs)
    seen, state, run, curve, sheets, picture = page.watch("demo/diffusion", None, None)
    assert "Step 40 of 40" in state
    assert "finished" in state
    assert run["value"] == "demo/diffusion"
    assert "<svg" in curve
    assert sheets == {"choices": ["40", "20", "9"], "value": "40"}
    assert picture.size == (8, 8)
    assert page.watch("demo/diffusion", "40", seen)[2:] == ("skip",) * 4
    with (runs / "demo/diffusion/metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "total": 0.5}\n')
    Image.new("RGB", (9, 9)).save(runs / "demo/diffusion/samples/step-41.png")
    now, state, run, _, sheets, picture = page.watch("demo/diffusion", "40", seen)
    assert "Step 41" in state
    assert run == "skip"  # an open list stays as it is
    assert (sheets["value"], picture.size) == ("41", (9, 9))  # the newest was shown, and is
    assert page.watch("demo/diffusion", "9", now)[4]["value"] == "9"  # an older one stays
    assert "does not lie below" in page.watch("../secret", None, now)[1]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("/etc", "does not lie below"),
        ("../secret", "does not lie below"),
        ("demo/../../secret", "does not lie below"),
        ("linked/diffusion", "goes through a link"),
        ("demo/diffusion/samples/step-50.png", "goes through a link"),
        ("demo/nothing", "there is no 'demo/nothing'"),
        ("a\0b", "does not lie below"),
    ],
)
def test_nothing_outside_the_folder_of_runs_is_read(runs: Path, asked: str, why: str) -> None:
    (runs.parent / "secret").mkdir()
    for read in (inside, watch_run):
        with pytest.raises(DavaeError, match=why):
            read(runs, asked)
    if "\0" not in asked:
        with pytest.raises(DavaeError):
            plan_form(runs, asked)


def test_a_runs_own_files_may_not_be_links_either(runs: Path) -> None:
    metrics = runs / "demo/autoencoder/metrics.jsonl"
    metrics.rename(runs.parent / "elsewhere.jsonl")
    metrics.symlink_to(runs.parent / "elsewhere.jsonl")
    with pytest.raises(DavaeError, match="goes through a link"):
        watch_run(runs, "demo/autoencoder")


def test_the_form_plans_as_the_verb_and_names_its_command(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"resolution": 64, "scale": 2, "detail_channels": "24", "gpu": "A100", "batch": 2}
    made, command = plan_form(tmp_path, "tiny", recipe="debug", overrides="diffusion.loop.steps=7", **fields)
    expected = plan_upgrade(
        "tiny", resolution=64, scale=2, detail_channels=(24,), gpu="A100", batch=2, recipe="debug",
        overrides=["diffusion.loop.steps=7"],
    )  # fmt: skip
    assert made.to_json() == expected.to_json()
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "plan.json").read_text())["runs"] == json.loads(json.dumps(expected.runs))
    some = SimpleNamespace(vae=SimpleNamespace(uses_details=True))
    gradio = SimpleNamespace(Error=lambda text, **_: RuntimeError(text))
    page = studio_page._Page(gradio, some, tmp_path)
    said = page.plan("tiny", 64, 2, "24", "A100", 2, "debug", "diffusion.loop.steps=7", False)
    assert f"<th scope='row'>image tokens</th><td>{made.tokens['base']}</td>" in said
    assert html.escape(command) in said
    with pytest.raises(RuntimeError, match="no GPU &#x27;abacus&#x27;"):  # as a message of the page
        page.plan("tiny", 64, 2, "24", "abacus", 2, "debug", "", False)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"overrides": "data.path=/etc"}, "data.path names a place"),
        ({"overrides": "base=/etc"}, "base names a place"),
        ({"overrides": "a='"}, "separated by spaces.*No closing quotation"),
        ({"detail_channels": "many"}, "whole numbers.*'many'"),
        ({"gpu": "abacus"}, "no GPU 'abacus'"),
        ({"scale": 3}, "scale"),
    ],
)
def test_mistakes_in_the_form_are_named(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(DavaeError, match=why):
        plan_form(tmp_path, "tiny", **{"resolution": 128, "recipe": "tiny", **fields})


def test_pictures_of_two_sizes_are_compared_at_the_larger_and_their_pixels_stay_sharp() -> None:
    small, large = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (32, 32), "blue")
    large.paste("white", (20, 20, 28, 28))
    pair = studio_page._pair({ENLARGED: small, ALONE: large}, ENLARGED, ALONE, 1)
    assert [picture.size for picture in pair] == [(512, 512)] * 2
    assert {colour for _, colour in pair[1].getcolors()} == {(0, 0, 255), (255, 255, 255)}
    close = studio_page._pair({ENLARGED: small, ALONE: large}, ENLARGED, ALONE, 2)[1]
    assert close.getpixel((256, 256)) in {(255, 255, 255), (0, 0, 255)}
    assert len(close.getcolors()) == 2  # the busiest quarter holds the edge of the white square
    assert studio_page._pair({}, ENLARGED, ORIGINAL, 1) is None


def test_names_from_outside_show_as_text() -> None:
    text = studio_page._table(["<b>"], [["<i>", "&"]], "<script>")
    assert "<b>" not in text
    assert "<script>" not in text
    assert "&lt;i&gt;" in text


def answer(headers: dict[str, str], kind: str = "http") -> tuple[int, dict[bytes, bytes]]:
    """Status and headers that the page's guard answers with in front of an application that says 200."""
    sent: list[dict[str, Any]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "headers": [(key.encode(), value.encode()) for key, value in headers.items()]}
    asyncio.run(studio_page._OwnPage(inner)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_only_the_page_itself_is_answered() -> None:
    status, headers = answer({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"})
    assert status == 200
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert answer({"host": "localhost:7860"})[0] == 200
    for refused in (
        {"host": "evil.example:7860"},  # a name that was led to this address
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1:7860", "origin": "https://evil.example"},
        {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8000"},
        {"host": "127.0.0.1:7860", "origin": "null"},
        {},
    ):
        assert answer(refused)[0] == 403
    assert answer({"host": "127.0.0.1:7860"}, "websocket")[0] == 403


@pytest.fixture
def taken() -> Iterator[int]:
    with studio_page._listening(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(taken: int) -> None:
    with pytest.raises(DavaeError, match=f"port {taken} cannot be used .*--port"):
        studio_page.serve("no such model", port=taken)
