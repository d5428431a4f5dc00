"""Files for ComfyUI and back, the nodes without ComfyUI, and ComfyUI itself where DAVAE_COMFYUI names its folder."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.pipelines.parts import upgraded

import davae
from davae.bases import debug_text
from davae.bases.debug_pipelines import small_pipeline
from davae.cli.main import main
from davae.comfyui.latents import Coder, empty_latent
from davae.comfyui.nodes import NODES as TABLE
from davae.errors import DavaeError
from davae.interop.comfyui import FORMAT, load_model, read_header, write_single_files
from davae.interop.conversion import convert_comfyui_file
from davae.pipelines import attach_lora, merge_lora
from davae.training.runs.export import export_run

NODES = Path(davae.__file__).parent / "comfyui" / "custom_node"
WORKFLOWS = NODES / "example_workflows"
TEXT, POOLED = 4096, 2048  # channels of ComfyUI's embeddings for Stable Diffusion 3
FILE = "sd35-da.safetensors"
STEPS, GUIDANCE, SIDE = 4, 4.5, 128


def sd3_like(**further: Any) -> StableDiffusion3Pipeline:
    """Of the sizes that ComfyUI fixes for Stable Diffusion 3, but for its text encoders; its images are noise."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 16} | further
    transformer = SD3Transformer2DModel(
        **sizes,
        out_channels=sizes["in_channels"],
        sample_size=16,
        patch_size=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
        pooled_projection_dim=POOLED,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=sizes["in_channels"],
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts = debug_text.clip(projection=True) | debug_text.clip("_2", projection=True) | debug_text.t5("_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    pipe = StableDiffusion3Pipeline(transformer.eval(), scheduler, vae.eval(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Made:
    """A base and its upgrade, tuned by a LoRA, saved as folders and as files for ComfyUI."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = sd3_like()
        base.save_pretrained(folder / "base")
        pipe = upgraded(base, detail_channels=32)
        pipe.vae.set_detail_statistics(torch.linspace(-0.5, 0.5, 32), torch.linspace(0.5, 1.5, 32))
        attach_lora(
            pipe.transformer,
            LoraConfig(r=2, lora_alpha=3, alpha_pattern={"to_k": 5}, target_modules=["to_q", "to_k", "to_out.0"]),
        )
        generator = torch.Generator().manual_seed(1)
        for name, value in pipe.transformer.named_parameters():
            if "lora_" in name:
                value.data = 0.1 * torch.randn(value.shape, generator=generator)
        run = folder / "run"
        davae.save_adapters(pipe, run / "adapters")
        merge_lora(pipe.transformer)
        pipe.save_pretrained(run / "pipeline")
        (run / "config.yaml").write_text(yaml.safe_dump({"kind": "upgrade", "base": str(folder / "base")}))
        self.run, self.pipe = run, pipe
        export_run(run, folder / "models", license="apache-2.0", format="comfyui")
        export_run(run, folder / "lora", license="apache-2.0", adapters=True, format="comfyui")
        self.alone = pipe.vae.without_details()
        self.alone.save_pretrained(folder / "alone")
        write_single_files(folder / "alone", folder / "models", "alone")
        self.transformer = folder / "models/diffusion_models/models.safetensors"
        self.autoencoder = folder / "models/vae/models.safetensors"
        self.lora = folder / "lora/loras/lora.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The folder of nodes, imported as ComfyUI does, where there is no ComfyUI."""
    spec = importlib.util.spec_from_file_location("custom_nodes/davae", NODES / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# ---------------------------------------------------------------------- files


def test_a_pipeline_comes_back_as_it_was(made: Made, tmp_path: Path) -> None:
    said = convert_comfyui_file(
        made.transformer, tmp_path / "out", base=str(made.folder / "base"), vae=made.autoencoder
    )
    assert str(said).startswith(f"{tmp_path / 'out'}: SD3Transformer2DModel, 48 channels")
    back = davae.load_pipeline(tmp_path / "out")
    same_weights(back.transformer, made.pipe.transformer)
    same_weights(back.vae, made.pipe.vae)
    for part in ("transformer", "vae", "scheduler"):
        ours, theirs = (
            {k: v for k, v in getattr(p, part).config.items() if not k.startswith("_")} for p in (back, made.pipe)
        )
        assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs)), part


def test_models_and_adapters_come_back_alone(made: Made, tmp_path: Path) -> None:
    convert_comfyui_file(made.autoencoder, tmp_path / "vae")
    same_weights(davae.AutoencoderDA.from_pretrained(tmp_path / "vae"), made.pipe.vae)
    convert_comfyui_file(made.transformer, tmp_path / "transformer")
    same_weights(SD3Transformer2DModel.from_pretrained(tmp_path / "transformer"), made.pipe.transformer)
    convert_comfyui_file(made.lora, tmp_path / "adapters")
    for file in (made.run / "adapters").glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "adapters" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tuned = davae.load_adapters(
        davae.load_pipeline(made.folder / "base"), made.run / "pipeline/vae", tmp_path / "adapters"
    )
    merge_lora(tuned.transformer)
    for name, value in tuned.transformer.state_dict().items():
        torch.testing.assert_close(value, made.pipe.transformer.state_dict()[name])


def test_what_a_file_says_of_itself(made: Made) -> None:
    header = read_header(made.transformer)
    assert (header.base_channels, header.detail_channels, header.scale, header.shift) == (16, 32, 2, 2.5)
    assert (header.scaling_factor, header.shift_factor) == (1.5, 0.06)
    assert isinstance(load_model(made.autoencoder), davae.AutoencoderDA)
    card = (made.folder / "models/README.md").read_text()
    assert "* `diffusion_models/models.safetensors`" in card
    assert "from_pretrained" not in card
    lora = load_file(made.lora)
    alphas = {
        name: value.item() for name, value in lora.items() if name.endswith("transformer_blocks.0.attn.to_k.alpha")
    }
    assert list(alphas.values()) == [5.0]
    assert lora["transformer.transformer_blocks.0.attn.to_q.alpha"].item() == 3.0


def test_an_upgrade_without_details_is_its_autoencoder(made: Made, tmp_path: Path) -> None:
    base = davae.load_pipeline(made.folder / "base")
    alone = davae.upgrade_pipeline(base, made.alone)
    alone.save_pretrained(tmp_path / "alone")
    assert write_single_files(tmp_path / "alone", tmp_path, "alone") == [Path("vae/alone.safetensors")]
    assert read_header(tmp_path / "vae/alone.safetensors").channels == 16


def test_mistakes_are_named(made: Made, tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match="no file"):
        read_header(tmp_path / "absent.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(made.lora.read_bytes()[:100])
    with pytest.raises(DavaeError, match="no whole safetensors file"):
        read_header(tmp_path / "broken.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DavaeError, match="not written by"):
        read_header(tmp_path / "other.safetensors")
    with pytest.raises(DavaeError, match="it holds an autoencoder: expected a transformer"):
        read_header(made.autoencoder, "transformer")
    with pytest.raises(DavaeError, match="go together"):
        convert_comfyui_file(made.autoencoder, tmp_path / "out", base="base", vae=made.autoencoder)
    tensors, said = load_file(made.autoencoder), read_header(made.autoencoder)
    tensors.pop("up.conv.bias")
    for name, format in (("less", FORMAT), ("later", FORMAT + 1)):
        metadata = {"davae": json.dumps({**vars(said), "format": format})}
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=metadata)
    with pytest.raises(DavaeError, match=r"less\.safetensors: .*missing: up\.conv\.bias"):
        load_model(tmp_path / "less.safetensors")
    with pytest.raises(DavaeError, match="update davae"):
        load_model(tmp_path / "later.safetensors")


def test_what_comfyui_cannot_hold_is_refused(tmp_path: Path) -> None:
    upgraded(sd3_like(attention_head_dim=32, in_channels=4), detail_channels=8).save_pretrained(tmp_path / "heads")
    with pytest.raises(DavaeError, match="2 blocks of 2 heads with 32 channels"):
        write_single_files(tmp_path / "heads", tmp_path, "x")
    upgraded(small_pipeline("flux"), detail_channels=8).save_pretrained(tmp_path / "flux")
    with pytest.raises(DavaeError, match="FluxTransformer2DModel: the nodes"):
        write_single_files(tmp_path / "flux", tmp_path, "x")
    assert write_single_files(tmp_path / "flux/vae", tmp_path, "x") == [Path("vae/x.safetensors")]
    pipe = upgraded(sd3_like(in_channels=4), detail_channels=8)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path / "shift")
    with pytest.raises(DavaeError, match="--timestep-shift NUMBER"):
        write_single_files(tmp_path / "shift", tmp_path, "x")


def test_the_verbs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["davae", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    options = ("--format", "comfyui", "--license", "apache-2.0")
    assert verb("export", made.run / "pipeline", "--out", tmp_path / "fox", *options) == 0
    assert f"{tmp_path / 'fox/vae/fox.safetensors'}\n" in capsys.readouterr().out
    assert load_file(tmp_path / "fox/vae/fox.safetensors").keys() == load_file(made.autoencoder).keys()
    assert verb("convert", "comfyui", made.autoencoder, "--out", tmp_path / "back") == 0
    assert "AutoencoderDA f16, 16 + 32 channels" in capsys.readouterr().out


# ---------------------------------------------------------------------- the nodes without ComfyUI


def test_encode_and_decode(made: Made) -> None:
    vae = made.pipe.vae
    coder, images = Coder(vae), torch.rand(2, 3, 128, 64) * 2 - 1
    latents = coder.encode(images)
    with torch.no_grad():
        assert torch.equal(latents, vae.encode(images).latent_dist.mode())
        assert torch.equal(coder.decode(latents), vae.decode(latents).sample)
        assert torch.equal(coder.decode(latents, "base"), vae.decode_base(latents))
        expected = vae.without_details().decode(latents[:, :16]).sample
    torch.testing.assert_close(coder.decode(latents, "decoder alone"), expected, atol=1e-5, rtol=0)
    with coder.tiles(64):
        assert vae.use_tiling
        assert vae.tile_sample_min_height == 64
    assert not vae.use_tiling
    assert empty_latent(vae, 64, 128, 3).shape == (3, 48, 8, 4)
    with pytest.raises(DavaeError, match="multiples of 16, such as 96 x 128"):
        empty_latent(vae, 100, 128, 1)
    with pytest.raises(DavaeError, match="this latent has 16 channels, and the autoencoder 48"):
        coder.decode(latents[:, :16])


def test_nodes_of_the_first_interface(nodes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ModuleType("folder_paths")
    listed.get_filename_list = lambda kind: [f"{kind}.safetensors", "other.ckpt"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", listed)
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in TABLE:
        made = nodes.NODE_CLASS_MAPPINGS[node.id]
        assert (node.output,) == made.RETURN_TYPES
        shown = made.INPUT_TYPES()["required"]
        assert list(shown) == [one.id for one in node.inputs]
        assert callable(getattr(made(), made.FUNCTION))
    shown = nodes.NODE_CLASS_MAPPINGS["DavaeLoadAutoencoder"].INPUT_TYPES()["required"]
    assert shown["file"][0] == ["vae.safetensors"]


@pytest.mark.parametrize("name", ["text_to_image", "image_to_image", "autoencoder"])
def test_an_example_is_one_graph_in_both_forms(name: str) -> None:
    api, page = (json.loads((WORKFLOWS / place).read_text()) for place in (f"api/{name}.json", f"{name}.json"))
    known = {node.id: [one.id for one in node.inputs] for node in TABLE}
    links = {number: [str(source), slot] for number, source, slot, *_ in page["links"]}
    assert {str(node["id"]): node["type"] for node in page["nodes"]} == {k: v["class_type"] for k, v in api.items()}
    for node in page["nodes"]:
        said = api[str(node["id"])]["inputs"]
        linked = {one["name"]: links[one["link"]] for one in node["inputs"]}
        assert linked == {key: value for key, value in said.items() if isinstance(value, list)}
        if node["type"] in known:
            assert sorted(said) == sorted(known[node["type"]])
            plain = [said[key] for key in known[node["type"]] if key not in linked]
            assert node["widgets_values"] == plain


def test_the_registry_s_entry() -> None:
    """Names, forms and keys are those that https://docs.comfy.org/registry/specifications asks for."""
    entry = tomllib.loads((NODES / "pyproject.toml").read_text())
    project, ours = entry["project"], tomllib.loads((NODES.parents[3] / "pyproject.toml").read_text())["project"]
    assert "comfyui" not in project["name"].lower()
    assert project["version"] == davae.__version__
    assert project["license"] == {"text": ours["license"]}
    assert project["urls"]["Repository"] == ours["urls"]["Repository"]
    assert project["requires-python"] == ours["requires-python"]
    assert set(entry["tool"]["comfy"]) == {"PublisherId", "DisplayName"}


# ---------------------------------------------------------------------- ComfyUI itself

COMFYUI = os.environ.get("DAVAE_COMFYUI")
with_comfyui = pytest.mark.skipif(not COMFYUI, reason="DAVAE_COMFYUI names no folder of ComfyUI")


class Server:
    """ComfyUI on this machine alone, with the nodes linked into ``custom_nodes`` and the files in ``models``."""

    def __init__(self, place: Path, made: Made) -> None:
        self.place, self.port = place, free_port()
        for kind in (
            "models/text_encoders",
            "models/diffusion_models",
            "models/vae",
            "models/loras",
            "input",
            "custom_nodes",
        ):
            (place / kind).mkdir(parents=True)
        (place / "custom_nodes/davae").symlink_to(NODES)
        shutil.copy(made.transformer, place / "models/diffusion_models" / FILE)
        shutil.copy(made.autoencoder, place / "models/vae" / FILE)
        shutil.copy(made.folder / "models/vae/alone.safetensors", place / "models/vae")
        shutil.copy(made.lora, place / "models/loras" / FILE)
        shutil.copy(
            made.folder / "base/transformer/diffusion_pytorch_model.safetensors",
            place / "models/diffusion_models/base.safetensors",
        )
        save_file(clip_l().state_dict(), place / "models/text_encoders/clip_l.safetensors")
        pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "input/example.png")
        where = [str(Path(davae.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        python = os.environ.get("DAVAE_COMFYUI_PYTHON", sys.executable)
        command = f"{python} main.py --cpu --listen 127.0.0.1 --port {self.port} --preview-method latent2rgb"
        self.log = (place / "log").open("w")
        self.process = subprocess.Popen(
            [*command.split(), "--base-directory", str(place), "--database-url", "sqlite:///:memory:"],
            cwd=COMFYUI,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, where))},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        for _ in range(300):
            try:
                self.get("system_stats")
                return
            except urllib.error.URLError:
                assert self.process.poll() is None, (place / "log").read_text()[-3000:]
                time.sleep(1)
        raise AssertionError((place / "log").read_text()[-3000:])

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=60) as answer:
            return bytes(answer.read())

    def made_by(self, workflow: dict[str, Any]) -> tuple[np.ndarray, torch.Tensor]:
        """The image [H, W, 3] of node 9, and the latents [B, C, h, w] of node 7."""
        workflow["latents"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["7", 0], "filename_prefix": "latents"},
        }
        body = json.dumps({"prompt": workflow, "client_id": "test"}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/prompt", body)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.loads(answer.read())["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        for _ in range(300):
            history = json.loads(self.get(f"history/{number}"))
            if number in history:
                break
            time.sleep(1)
        assert history[number]["status"]["status_str"] == "success", history[number]["status"]
        outputs = history[number]["outputs"]
        image = Image.open(BytesIO(self.get("view?" + urllib.parse.urlencode(outputs["9"]["images"][0]))))
        latents = self.get("view?" + urllib.parse.urlencode(outputs["latents"]["latents"][0]))
        (self.place / "latents").write_bytes(latents)
        return np.asarray(image), load_file(self.place / "latents")["latent_tensor"]

    def previews(self) -> list[bytes]:
        """Starts to collect what the server sends to this client; JPEGs are among it."""
        kept: list[bytes] = []
        opened = socket.create_connection(("127.0.0.1", self.port))
        opened.sendall(
            b"GET /ws?clientId=test HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )

        def receive() -> None:
            while received := opened.recv(1 << 16):
                kept.append(received)

        threading.Thread(target=receive, daemon=True).start()
        return kept


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def clip_l() -> Any:
    """ComfyUI fixes the sizes of this text encoder; the projection is left out of its embeddings."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        eos_token_id=49407,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    model.text_projection.weight.data = torch.eye(768)
    return model


@pytest.fixture(scope="module")
def server(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"), made)
    yield started
    started.process.terminate()
    started.process.wait(30)
    started.log.close()


@pytest.fixture(scope="module")
def embeddings() -> dict[str, torch.Tensor]:
    """Of the examples' prompts by diffusers, with CLIP-L alone."""
    from transformers import CLIPTokenizer

    pipe = sd3_like()
    pipe.register_modules(
        text_encoder=clip_l(), tokenizer=CLIPTokenizer.from_pretrained(Path(str(COMFYUI)) / "comfy/sd1_tokenizer")
    )
    pipe.tokenizer_max_length = 77
    found = {}
    for name, prompt in (("", "a red fox in snow"), ("negative_", "blurry, low quality")):
        with torch.no_grad():
            states, pooled = pipe._get_clip_prompt_embeds(prompt, clip_model_index=0)
        found[f"{name}prompt_embeds"] = torch.nn.functional.pad(states, (0, TEXT - 768))
        found[f"{name}pooled_prompt_embeds"] = torch.nn.functional.pad(pooled, (0, POOLED - 768))
    return found


def example(name: str) -> dict[str, Any]:
    """An example as it is, but small, and with the one text encoder that can be had without a download."""
    workflow: dict[str, Any] = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    workflow["3"] = {"class_type": "CLIPLoader", "inputs": {"clip_name": "clip_l.safetensors", "type": "sd3"}}
    workflow["7"]["inputs"] |= {"steps": STEPS}
    if "width" in workflow["6"]["inputs"]:
        workflow["6"]["inputs"] |= {"width": SIDE, "height": SIDE}
    return workflow


def same_image(found: np.ndarray, expected: torch.Tensor) -> None:
    """ComfyUI cuts values to eight bits, so they lie up to 1 / 255 below ours, give or take 1e-3."""
    levels = (expected[0].permute(1, 2, 0).clamp(0, 1) * 255).numpy() - found
    assert levels.min() >= -0.255
    assert levels.max() <= 1.255


def decoded(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def raw(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    return latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor


def noise() -> torch.Tensor:
    """That of ComfyUI for seed 0: diffusers draws the same from a generator of that seed on the CPU."""
    return torch.randn(1, 48, SIDE // 16, SIDE // 16, generator=torch.Generator().manual_seed(0))


def by_diffusers(pipe: Any, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
    """Scaled latents."""
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    generator = torch.Generator().manual_seed(0)
    return pipe(**embeddings, **size, generator=generator, output_type="latent").images


@with_comfyui
def test_comfyui_makes_the_image_of_diffusers(server: Server, made: Made, embeddings: dict[str, torch.Tensor]) -> None:
    sent = server.previews()
    image, latents = server.made_by(example("text_to_image"))
    expected = raw(made.pipe, by_diffusers(made.pipe, embeddings))
    assert latents.shape == (1, 48, 8, 8)
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=0)
    assert image.shape == (SIDE, SIDE, 3)
    same_image(image, decoded(made.pipe, expected))
    assert b"".join(sent).count(b"\xff\xd8\xff") >= STEPS - 1, "a preview a step"


@with_comfyui
def test_comfyui_changes_an_image_as_diffusers_does(
    server: Server, made: Made, embeddings: dict[str, torch.Tensor]
) -> None:
    image, latents = server.made_by(example("image_to_image"))
    pixels = np.asarray(Image.open(server.place / "input/example.png"))
    source = torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        start = made.pipe.vae.encode(source).latent_dist.mode()
    config = made.pipe.vae.config
    start = (start - config.shift_factor) * config.scaling_factor
    pipe = StableDiffusion3Img2ImgPipeline(**made.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    expected = raw(
        pipe,
        pipe(
            **embeddings,
            image=start,
            strength=0.5,
            num_inference_steps=2 * STEPS,  # ComfyUI counts the steps that are made
            guidance_scale=GUIDANCE,
            height=SIDE,
            width=SIDE,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images,
    )
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=0)
    same_image(image, decoded(pipe, expected))


@with_comfyui
def test_lora_and_widened_layers_on_the_base(server: Server, made: Made, embeddings: dict[str, torch.Tensor]) -> None:
    """Twice, with previews: the second time the widened layers are in place when the previewer is made."""
    workflow = example("text_to_image")
    loader = {"class_type": "UNETLoader", "inputs": {"unet_name": "base.safetensors", "weight_dtype": "default"}}
    lora = {"class_type": "DavaeLoadLora", "inputs": {"model": ["base", 0], "file": FILE, "strength": 1.0}}
    workflow |= {"base": loader, "1": lora}
    expected = raw(made.pipe, by_diffusers(made.pipe, embeddings))
    for prompt in (
        "a red fox in snow",
        "a red  fox in snow",
    ):  # the same words to CLIP, not the same to ComfyUI's cache
        workflow["4"]["inputs"]["text"] = prompt
        _, latents = server.made_by(workflow)
        torch.testing.assert_close(latents, expected, atol=1e-3, rtol=0)


@with_comfyui
@pytest.mark.parametrize("shown", ["decoder alone", "base"])
def test_comfyui_shows_less(server: Server, made: Made, shown: str) -> None:
    workflow = example("text_to_image")
    workflow["8"]["inputs"]["shown"] = shown
    image, latents = server.made_by(workflow)
    vae = made.pipe.vae
    with torch.no_grad():
        alone = vae.decode_base(latents) if shown == "base" else vae.without_details().decode(latents[:, :16]).sample
    same_image(image, alone / 2 + 0.5)


@with_comfyui
def test_comfyui_s_own_nodes_take_the_autoencoder(server: Server, made: Made) -> None:
    workflow = example("text_to_image")
    workflow["8"] = {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["2", 0]}}
    workflow["1"] = {"class_type": "UNETLoader", "inputs": {"unet_name": FILE, "weight_dtype": "default"}}
    image, latents = server.made_by(workflow)
    same_image(image, decoded(made.pipe, latents))


@with_comfyui
def test_a_decoder_without_details_on_what_comfyui_makes_of_the_base(server: Server, made: Made) -> None:
    workflow = example("text_to_image")
    workflow["1"] = {"class_type": "UNETLoader", "inputs": {"unet_name": "base.safetensors", "weight_dtype": "default"}}
    workflow["2"]["inputs"]["file"] = "alone.safetensors"
    image, latents = server.made_by(workflow)
    assert latents.shape == (1, 16, 8, 8)
    with torch.no_grad():
        same_image(image, made.alone.decode(latents).sample / 2 + 0.5)
