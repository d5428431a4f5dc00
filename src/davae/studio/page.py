"""The page of ``davae studio``, in the browser of this machine alone.

It listens on 127.0.0.1, loads nothing from elsewhere and reports to nobody. What it reads of the disk was uploaded or
lies below the folder of runs; what it writes lies in a temporary folder that ends with it. One job runs at a time.
"""

import base64
import html
import io
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from PIL import Image

from davae.choices import Scale
from davae.data import decode_image
from davae.data.images.transforms import image_to_tensor
from davae.errors import DavaeError
from davae.evaluation.reconstruction.crops import busiest_crop
from davae.pipelines.sampling.generate import default_of, takes_prompts
from davae.planner.plan import GPUS
from davae.planner.text import notes, tables
from davae.recipes.presets import preset_names
from davae.recipes.read import recipe_names
from davae.report.build import RunView, page_colours
from davae.report.words import seconds
from davae.runtime.atomic_files import system_error
from davae.runtime.console import say, shown
from davae.runtime.devices import chosen_device, wanted_dtype
from davae.runtime.pictures import as_picture
from davae.studio import (
    ALONE,
    DETAILS,
    ENLARGED,
    MOST_SIDE,
    NATIVE,
    ORIGINAL,
    Models,
    Sample,
    find_runs,
    open_models,
    plan_form,
    reconstruct_file,
    sample_side_by_side,
    watch_run,
)

_HOSTS = ("127.0.0.1", "localhost")
_UPLOAD = 25 * 2**20  # bytes of a file
_SMALLEST = 512  # pixels of a shown picture, whose own pixels are enlarged to that
_SHEETS = 6
_EVERY = 4.0  # seconds between looks at a run
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; "
    "form-action 'self'"
)


def serve(
    model: str | None = None,
    *,
    runs: str | Path = "runs",
    base: str | None = None,
    port: int = 7860,
    device: str = "cpu",
    dtype: str | None = None,
) -> None:
    """Show the page until Ctrl-C.

    Args:
        model, base: see :func:`davae.studio.open_models`.
        runs: folder of runs.
        port: of 127.0.0.1; 0 takes a free one.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: of the weights; by default that of the files.

    Raises:
        DavaeError: the models cannot be opened, or the port is taken.
    """
    with _listening(port) as listener, TemporaryDirectory(prefix="davae-studio-") as folder:
        models = open_models(model, Path(runs), base=base, device=chosen_device(device), dtype=wanted_dtype(dtype))
        import uvicorn

        app = studio_app(models, Path(runs), Path(folder))
        say(f"davae studio: http://{_HOSTS[0]}:{listener.getsockname()[1]} (Ctrl-C ends it)")
        try:
            uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listener])
        except KeyboardInterrupt:  # how it is meant to end
            return


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
        try:
            listener.bind((_HOSTS[0], port))
        except OSError as error:
            raise DavaeError(f"port {port} cannot be used ({error.strerror}): name another with --port") from error
        yield listener


def studio_app(models: Models, runs: Path, folder: Path) -> Any:
    """The page as an ASGI application.

    Args:
        models: what it works with.
        runs: the only folder whose files it shows.
        folder: for uploads and pictures.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(folder))
    import gradio
    from fastapi import FastAPI

    style = page_colours() + (files("davae.studio") / "studio.css").read_text(encoding="utf-8")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the machine
    off = {"show_error": False, "enable_monitoring": False, "ssr_mode": False, "mcp_server": False, "pwa": False}
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gradio.mount_gradio_app(
        app,
        _Page(gradio, models, runs).blocks(),
        path="/",
        server_name=_HOSTS[0],
        footer_links=[],
        run_history=False,
        max_file_size=_UPLOAD,
        theme=gradio.themes.Default(primary_hue="blue", **fonts),
        head=f"<style>{style}</style>",  # Gradio's `css` would rewrite what depends on the screen
        **off,
    )
    app.add_middleware(_OwnPage)
    return app


class _OwnPage:
    """Answers requests of this page alone: not of other pages, nor of other names that lead to this address."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = {key: value.decode("latin-1") for key, value in scope.get("headers", ())}
        host = headers.get(b"host", "")
        own = host.partition(":")[0] in _HOSTS and headers.get(b"origin", f"http://{host}") == f"http://{host}"

        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        if scope["type"] == "lifespan" or (own and scope["type"] == "http"):
            await self.app(scope, receive, with_policy)
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"davae studio answers its own page alone"})


class _Page:
    """The page's parts and what their buttons do.

    Args:
        gradio: the library.
        models: what it works with.
        runs: the only folder whose files it shows.
    """

    def __init__(self, gradio: Any, models: Models, runs: Path) -> None:
        self.gr, self.models, self.runs = gradio, models, runs
        self.stop, self.messages = threading.Event(), _Messages(gradio)
        self.best = DETAILS if models.vae.uses_details else ALONE
        one = {"concurrency_limit": 1, "api_visibility": "private"}
        self.work = {**one, "concurrency_id": "work"}
        self.quick = {**one, "concurrency_id": "look", "show_progress": "hidden"}  # beside the work

    def blocks(self) -> Any:
        """The page."""
        gr, models = self.gr, self.models
        with gr.Blocks(title="davae studio", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            told = _list(note.replace("`", "") for note in models.notes)
            gr.HTML(f"<h1>davae studio</h1><p>{html.escape(shown(models.name))}</p>{told}")
            for name, fill in (
                ("Reconstruct", self._reconstruct_tab),
                ("Generate", self._generate_tab),
                ("Plan", self._plan_tab),
                ("Run", self._run_tab),
            ):
                with gr.Tab(name):
                    fill(page)
        return page.queue(max_size=32)

    def _columns(self) -> tuple[Any, Any]:
        """A narrow column and a wide one, which a phone shows below each other."""
        with self.gr.Row():
            return self.gr.Column(scale=1, min_width=280), self.gr.Column(scale=2, min_width=280)

    def _viewer(self, names: Sequence[str], left: str, right: str) -> Any:
        """Two of several pictures with a line to drag between them; returns where the pictures go."""
        gr, pictures = self.gr, self.gr.State({})
        with gr.Row():
            first = gr.Dropdown(names, value=left, label="Left", min_width=170)
            second = gr.Dropdown(names, value=right, label="Right", min_width=170)
            sizes = [("whole", 1), ("2 ×", 2), ("4 ×", 4)]
            zoom = gr.Radio(sizes, value=1, label="Zoom, at the busiest place", scale=2, min_width=260)
        slider = gr.ImageSlider(
            label="Drag the line", interactive=False, type="pil", format="png", max_height=720,
            elem_classes="studio-pixels",
        )  # fmt: skip
        controls = [pictures, first, second, zoom]
        for control in controls:
            control.change(_pair, controls, slider, **self.quick)
        return pictures

    def _reconstruct_tab(self, page: Any) -> None:
        gr, unit = self.gr, self.models.vae.spatial_compression
        narrow, wide = self._columns()
        with narrow:
            picture = gr.Image(label="Your picture", sources=["upload", "clipboard"], height=260)
            picture.preprocess = _path_of  # unread: davae says what is wrong with a file
            least, most = 2 * unit, MOST_SIDE // unit * unit
            side = gr.Slider(
                least,
                most,
                value=min(max(least, self.models.side // unit * unit), most),
                step=unit,
                label="Longer side, pixels",
                info="The picture is reduced to it, never enlarged",
            )
            button = gr.Button("Reconstruct", variant="primary")
            figures = gr.HTML()
        with wide:
            names = dict.fromkeys([ENLARGED, ALONE, self.best, NATIVE, ORIGINAL])
            pictures = self._viewer([*names], ENLARGED, self.best)
        gr.on([picture.upload, button.click], self.reconstruct, [picture, side], [pictures, figures], **self.work)

    def reconstruct(self, file: str | None, side: int) -> tuple[dict[str, Image.Image], str]:
        """Pictures by name and a table of their figures."""
        with self.messages:
            if file is None:
                raise DavaeError("upload a picture first")
            original, made = reconstruct_file(self.models, file, side)
            rows = [[name, f"{one.psnr:.2f}", f"{one.positions:,}"] for name, one in made.items()]
            size = f"{original.width} × {original.height} pixels"
            pictures = {name: as_picture(one.image) for name, one in made.items()} | {ORIGINAL: original}
            return pictures, _table(["", "PSNR, dB", "Latent positions"], rows, size)

    def _generate_tab(self, page: Any) -> None:
        gr, pipe, several = self.gr, self.models.pipe, self.models.base is not None
        if pipe is None:
            gr.HTML("<p>There is no pipeline to generate with: see above.</p>")
            return
        narrow, wide = self._columns()
        with narrow:
            classes = sorted(getattr(pipe, "labels", None) or {}, key=lambda name: pipe.labels[name])
            if takes_prompts(pipe):
                subject = gr.Textbox(label="Prompt", lines=2)
            elif classes:
                subject = gr.Dropdown(classes, value=classes[0], label="Class")
            else:
                subject = gr.Textbox("0", label="Number of a class")
            steps = gr.Slider(1, 100, value=default_of(pipe, "num_inference_steps"), step=1, label="Steps")
            own = self._own_guidance()
            told = f"1 is none, {own:g} its own"
            guidance = gr.Slider(0, 20, value=own, step=0.1, label="Guidance", info=told)
            with gr.Row():
                options = {"value": 0, "precision": 0, "minimum": 0, "min_width": 90}
                width = gr.Number(label="Width", info="0: its own", **options)
                height = gr.Number(label="Height", info="0: its own", **options)
                seed = gr.Number(label="Seed", info="of all", **options)
            native = gr.Checkbox(False, label="Also the base at full size", visible=several)
            with gr.Row():
                button = gr.Button("Generate", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=120)
        with wide:
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    figures = gr.HTML(_counters([]))
                with gr.Column(scale=1, min_width=180):
                    preview = gr.HTML()
            last = DETAILS if pipe.vae.uses_details else ALONE
            names = [ENLARGED, last, NATIVE] if several else [last]
            pictures = self._viewer(names, names[0], last)
        fields = [subject, steps, guidance, width, height, seed, native]
        button.click(self.generate, fields, [figures, preview, pictures], show_progress="hidden", **self.work)
        stop.click(self.stop.set, queue=False, **self.quick)

    def _own_guidance(self) -> float:
        """Where the slider of the guidance begins, which stands for the pipeline's own."""
        return float(default_of(self.models.pipe, "guidance_scale") or 0)

    def generate(
        self, subject: str, steps: int, guidance: float, width: int, height: int, seed: int, native: bool
    ) -> Iterator[tuple[Any, Any, Any]]:
        """A table, a preview and pictures by name, after each step."""
        self.stop.clear()
        skip = self.gr.skip()
        scale = None if guidance == self._own_guidance() else guidance
        with self.messages:
            if not (subject or "").strip():
                raise DavaeError("say what to generate first")
            made: list[Sample] = []
            options = (steps, scale, width or None, height or None, seed or 0, native)
            for made in sample_side_by_side(self.models, subject.strip(), *options, stop=self.stop):
                state = next(sample.state for sample in reversed(made) if sample.state is not None)
                yield _counters(made), skip if state.preview is None else _preview(state.preview), skip
            finished = {one.name: one.state.image for one in made if one.state is not None and one.state.image}
            yield _counters(made) + ("<p>Stopped.</p>" if self.stop.is_set() else ""), skip, finished

    def _plan_tab(self, page: Any) -> None:
        gr = self.gr
        narrow, wide = self._columns()
        with narrow:
            base = gr.Dropdown(
                [("the recipe's", ""), *((name, name) for name in ("tiny", *preset_names()))],
                value="sd35-medium",
                label="Base",
                info=f"of the list, of the hub (its configuration is fetched), or a folder below {self.runs}",
                allow_custom_value=True,
            )
            with gr.Row():
                resolution = gr.Number(1024, label="Resolution", info="0: the recipe's", precision=0, min_width=110)
                scales = [("the recipe's", 0), *((f"{scale}", scale) for scale in get_args(Scale))]
                scale = gr.Dropdown(scales, value=2, label="Scale", info="over the base's", min_width=110)
            details = gr.Textbox("", label="Detail channels", info="one number a level; empty: the official code's")
            with gr.Row():
                gpu = gr.Dropdown([*GPUS], value="H100", label="GPU", info="for hours", min_width=110)
                batch = gr.Number(1, label="Batch", info="when sampling", precision=0, minimum=1, min_width=110)
            names = [("the one that fits", ""), *((name, name) for name in recipe_names())]
            recipe = gr.Dropdown(names, value="", label="Recipe", info="its steps and batches")
            overrides = gr.Textbox("", label="Overrides of the recipe", placeholder="diffusion.loop.steps=5000")
            cpu = gr.Checkbox(False, label="Training without a GPU")
            button = gr.Button("Plan", variant="primary")
        with wide:
            said = gr.HTML()
        fields = [base, resolution, scale, details, gpu, batch, recipe, overrides, cpu]
        button.click(self.plan, fields, said, **self.work)

    def plan(self, base: str | None, resolution: int | None, scale: int, *fields: Any) -> str:
        """What ``davae plan`` says."""
        with self.messages:
            made, command = plan_form(self.runs, base or "", resolution or None, scale or None, *fields)
            said = ""
            for table in tables(made):
                columns = [[str(cell) for cell in column.cells] for column in table.columns]
                head = [str(column.header) for column in table.columns]
                said += _table(head, [*zip(*columns, strict=True)], str(table.title))
            return f"{said}{_list(notes(made))}<p><code>{html.escape(command)}</code></p>"

    def _run_tab(self, page: Any) -> None:
        gr = self.gr
        run = gr.Dropdown([], label=f"Run below {self.runs}", allow_custom_value=True)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                state = gr.HTML()
                curve = gr.HTML(elem_classes="studio-curve")
            with gr.Column(scale=1, min_width=280):
                sheet = gr.Radio([], label="Sheet after step")
                picture = gr.Image(interactive=False, format="png", show_label=False, buttons=["fullscreen"])
        seen = gr.State()
        options = {"inputs": [run, sheet, seen], "outputs": [seen, state, run, curve, sheet, picture], **self.quick}
        for event in (page.load, gr.Timer(_EVERY).tick, run.change, sheet.input):
            event(self.watch, **options)

    def watch(self, name: str | None, sheet: str | None, seen: object) -> tuple[Any, ...]:
        """What is seen now and the run's state, and, if that is not what was ``seen``, its other parts."""
        found = [place.relative_to(self.runs).as_posix() for place in find_runs(self.runs)]
        name = name or (found[0] if found else None)
        try:
            if name is None:
                raise DavaeError(f"no run lies below {self.runs} yet: davae demo makes two")
            view = watch_run(self.runs, name)
        except DavaeError as error:
            return None, f"<p>{html.escape(str(error))}</p>", self.gr.skip(), "", self.gr.Radio([], value=None), None
        sheets = {file.stem.removeprefix("step-"): file for file in view.sheets[:_SHEETS]}
        newest = next(iter(sheets), None)
        followed = sheet not in sheets or (isinstance(seen, tuple) and sheet == seen[-1])  # the newest one until now
        sheet = newest if followed else sheet
        now = (name, *found, view.step, sheet, newest)
        if now == seen:
            return now, _run_state(view), *[self.gr.skip()] * 4
        same = isinstance(seen, tuple) and seen[:-3] == now[:-3]
        runs = self.gr.skip() if same else self.gr.Dropdown(choices=found, value=name)
        picture = None if sheet is None else decode_image(sheets[sheet])
        return now, _run_state(view), runs, _curve(view.curve), self.gr.Radio(choices=[*sheets], value=sheet), picture


class _Messages:
    """Within the context, errors that are meant for the user become messages on the page."""

    def __init__(self, gradio: Any) -> None:
        self.error = gradio.Error

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            text = str(error) if isinstance(error, DavaeError) else system_error(error)
            if text is not None:
                raise self.error(html.escape(text), duration=20, print_exception=False) from error


def _path_of(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _pair(pictures: Mapping[str, Image.Image], left: str, right: str, zoom: int) -> Any:
    """Two pictures of one size to slide over each other, or their busiest part."""
    found = [pictures[name] for name in (left, right) if name in pictures]
    if not found:
        return None
    size = max((picture.size for picture in found), key=max)
    full = [picture.resize(size, Image.Resampling.BICUBIC) for picture in (found[0], found[-1])]
    if zoom > 1:
        sharpest = image_to_tensor(pictures.get(ORIGINAL, full[1]).resize(size))
        rows, columns = busiest_crop(sharpest, min(size) // zoom)
        full = [picture.crop((columns.start, rows.start, columns.stop, rows.stop)) for picture in full]
    return tuple(map(_enlarged, full))


def _enlarged(picture: Image.Image) -> Image.Image:
    """A small picture with each of its pixels as a square, so that no browser smooths them."""
    factor = max(1, _SMALLEST // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _preview(picture: Image.Image) -> str:
    """As part of the page: files would be written at every step, and those of the same seed while they are read."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"<figure class='studio-preview'><img alt='' src='data:image/jpeg;base64,{data}'><p>base part</p></figure>"


def _counters(samples: Sequence[Sample]) -> str:
    rows: list[list[str]] = [["Pixels"], ["Image tokens"], ["Steps"], ["Time"]]
    for sample in samples:
        state = sample.state
        image = None if state is None else state.image
        rows[0].append("" if image is None else f"{image.width} × {image.height}")
        rows[1].append("" if sample.tokens is None else f"{sample.tokens:,}")
        rows[2].append("" if state is None else f"{state.step} of {state.steps}")
        rows[3].append("" if state is None else seconds(state.seconds))
    return _table(["", *(sample.name for sample in samples)], rows)


def _run_state(view: RunView) -> str:
    of = "" if view.steps is None else f" of {view.steps:,}"
    when = "" if view.age is None else f", written {seconds(max(view.age, 0.001))} ago"
    return f"<p>Step {view.step:,}{of}{when}{'; finished' if view.finished else ''}.</p>"


def _curve(curve: Mapping[str, Any]) -> str:
    if curve["svg"] is None:
        return "<p>No losses to draw yet.</p>"
    legend = "".join(
        f"<span><b style='color:var(--s{one['colour']})'>●</b> {html.escape(one['name'] + ' ' + one['note'])}</span> "
        for one in curve["legend"]
    )
    return f"{curve['svg']}<p class='studio-legend'>{legend}</p>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul class='studio-note'>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    top = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(first)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    inner = f"{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f"<div class='studio-scroll' tabindex='0'><table>{inner}</table></div>"
