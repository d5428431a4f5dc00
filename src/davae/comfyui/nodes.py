"""The nodes as one table, from which classes of ComfyUI's third interface, or of its first, are made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from davae.comfyui.latents import SHOWN, empty_latent

LARGEST = 16384


@dataclass(frozen=True)
class Input:
    """An input: ``type`` is ComfyUI's name of a type, or ``COMBO`` with ``choices``."""

    id: str
    type: str
    tooltip: str
    choices: Callable[[], Sequence[str]] = tuple
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """A node: ``run`` takes the inputs by name and returns the one output."""

    id: str
    name: str
    description: str
    inputs: tuple[Input, ...]
    output: str
    run: Callable[..., Any]


def _files(kind: str) -> Callable[[], Sequence[str]]:
    def listed() -> Sequence[str]:
        import folder_paths

        return [name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors")]

    return listed


def _path(kind: str, name: str) -> str:
    import folder_paths

    return folder_paths.get_full_path_or_raise(kind, name)


def _load_transformer(file: str) -> Any:
    from davae.comfyui.backend import load_transformer

    return load_transformer(_path("diffusion_models", file))


def _load_autoencoder(file: str) -> Any:
    from davae.comfyui.backend import load_autoencoder

    return load_autoencoder(_path("vae", file))


def _lora(model: Any, file: str, strength: float) -> Any:
    from davae.comfyui.backend import add_lora

    return add_lora(model, _path("loras", file), strength)


def _empty(vae: Any, width: int, height: int, batch_size: int) -> Any:
    from davae.comfyui.backend import structured

    samples = empty_latent(structured(vae).model, width, height, batch_size)
    return {"samples": samples.to(vae.output_device)}


def _encode(pixels: Any, vae: Any, tile_size: int) -> Any:
    from davae.comfyui.backend import structured

    with structured(vae).tiles(tile_size):
        return {"samples": vae.encode(pixels)}


def _decode(samples: Any, vae: Any, shown: str, tile_size: int = 0) -> Any:
    from davae.comfyui.backend import structured

    with structured(vae).tiles(tile_size):
        return vae.decode(samples["samples"], vae_options={"shown": shown})


_VAE = Input("vae", "VAE", "From DA-VAE Load Autoencoder.")
_SAMPLES = Input("samples", "LATENT", "A structured latent: base and detail channels.")
_WIDE = Input(
    "shown", "COMBO", "With details, without them at the same size, or the base's own smaller image.", lambda: SHOWN
)
_SIDE = {"default": 1024, "min": 64, "max": LARGEST, "step": 16}
_TILE = {"default": 512, "min": 64, "max": 4096, "step": 64}

NODES = (
    Node(
        "DavaeLoadTransformer",
        "DA-VAE Load Transformer",
        "A widened transformer of 'davae export --format comfyui', with its timestep shift.",
        (Input("file", "COMBO", "In models/diffusion_models.", _files("diffusion_models")),),
        "MODEL",
        _load_transformer,
    ),
    Node(
        "DavaeLoadAutoencoder",
        "DA-VAE Load Autoencoder",
        "An autoencoder of 'davae export --format comfyui'. ComfyUI's own nodes for VAEs take it, too.",
        (Input("file", "COMBO", "In models/vae.", _files("vae")),),
        "VAE",
        _load_autoencoder,
    ),
    Node(
        "DavaeLoadLora",
        "DA-VAE Load LoRA",
        "The LoRA and the widened layers of 'davae export --adapters --format comfyui', on the base's model.",
        (
            Input("model", "MODEL", "The base: Stable Diffusion 3 as ComfyUI loads it."),
            Input("file", "COMBO", "In models/loras.", _files("loras")),
            Input(
                "strength",
                "FLOAT",
                "Of the LoRA; widened layers are always whole.",
                options={"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05},
            ),
        ),
        "MODEL",
        _lora,
    ),
    Node(
        "DavaeEmptyLatent",
        "DA-VAE Empty Latent",
        "A start for text to image, of as many channels as the autoencoder has.",
        (
            _VAE,
            Input("width", "INT", "Of the image, in pixels.", options=_SIDE),
            Input("height", "INT", "Of the image, in pixels.", options=_SIDE),
            Input("batch_size", "INT", "Images.", options={"default": 1, "min": 1, "max": 4096}),
        ),
        "LATENT",
        _empty,
    ),
    Node(
        "DavaeEncode",
        "DA-VAE Encode",
        "An image to a structured latent; sides are cut to whole positions.",
        (
            Input("pixels", "IMAGE", "The image."),
            _VAE,
            Input(
                "tile_size",
                "INT",
                "Side of a tile in pixels; 0 encodes whole.",
                options=_TILE | {"default": 0, "min": 0},
            ),
        ),
        "LATENT",
        _encode,
    ),
    Node("DavaeDecode", "DA-VAE Decode", "A structured latent to an image.", (_SAMPLES, _VAE, _WIDE), "IMAGE", _decode),
    Node(
        "DavaeDecodeTiled",
        "DA-VAE Decode Tiled",
        "The same in tiles, which takes less memory; tiles share the statistics of the whole image.",
        (_SAMPLES, _VAE, _WIDE, Input("tile_size", "INT", "Side of a tile in pixels.", options=_TILE)),
        "IMAGE",
        _decode,
    ),
)
CATEGORY = "DA-VAE"


def legacy_node(node: Node) -> type:
    """The node as a class of ComfyUI's first interface."""

    def input_types(cls: type) -> dict[str, Any]:
        shown = {
            one.id: (list(one.choices()) if one.type == "COMBO" else one.type, {**one.options, "tooltip": one.tooltip})
            for one in node.inputs
        }
        return {"required": shown}

    def run(self: Any, **inputs: Any) -> tuple[Any]:
        return (node.run(**inputs),)

    members = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": (node.output,),
        "FUNCTION": "run",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": node.description,
        "run": run,
    }
    return type(node.id, (), members)


def v3_extension() -> Any:
    """All nodes as an extension of ComfyUI's third interface."""
    from comfy_api.latest import ComfyExtension, io

    kinds = {"MODEL": io.Model, "VAE": io.Vae, "LATENT": io.Latent, "IMAGE": io.Image, "INT": io.Int, "FLOAT": io.Float}

    def input_of(one: Input) -> Any:
        if one.type == "COMBO":
            return io.Combo.Input(one.id, options=list(one.choices()), tooltip=one.tooltip)
        return kinds[one.type].Input(one.id, tooltip=one.tooltip, **one.options)

    def node_of(node: Node) -> type:
        def define_schema(cls: type) -> Any:
            return io.Schema(
                node_id=node.id,
                display_name=node.name,
                category=CATEGORY,
                description=node.description,
                inputs=[input_of(one) for one in node.inputs],
                outputs=[kinds[node.output].Output()],
            )

        def execute(cls: type, **inputs: Any) -> Any:
            return io.NodeOutput(node.run(**inputs))

        members = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
        return type(node.id, (io.ComfyNode,), members)

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [node_of(node) for node in NODES]

    return Extension()
