"""Nodes for ComfyUI: upgraded pipelines of davae. ComfyUI imports this folder from its ``custom_nodes``."""

import importlib.util

if importlib.util.find_spec("davae") is None:
    raise ImportError("the nodes of DA-VAE need davae in ComfyUI's Python: python -m pip install FOLDER_OF_DAVAE")

from .nodes import NODES, legacy_node, v3_extension

if importlib.util.find_spec("comfy") is not None:
    from .backend import register

    register()

try:
    from comfy_api.latest import ComfyExtension
except ImportError:  # a ComfyUI before its third interface for nodes
    NODE_CLASS_MAPPINGS = {node.id: legacy_node(node) for node in NODES}
    NODE_DISPLAY_NAME_MAPPINGS = {node.id: node.name for node in NODES}
else:

    async def comfy_entrypoint() -> "ComfyExtension":
        """The extension that ComfyUI asks for."""
        return v3_extension()
