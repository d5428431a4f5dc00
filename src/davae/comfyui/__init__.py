"""Nodes for ComfyUI: upgraded pipelines of davae.

The folder ``custom_node`` is what ComfyUI's registry and ``custom_nodes`` hold; its nodes are these.
"""

import importlib.util

from davae.comfyui.nodes import NODES, legacy_node, v3_extension

if importlib.util.find_spec("comfy") is not None:
    from davae.comfyui.backend import register

    register()

try:
    from comfy_api.latest import ComfyExtension
except ImportError:  # a ComfyUI before its third interface for nodes, or none
    NODE_CLASS_MAPPINGS = {node.id: legacy_node(node) for node in NODES}
    NODE_DISPLAY_NAME_MAPPINGS = {node.id: node.name for node in NODES}
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
else:

    async def comfy_entrypoint() -> "ComfyExtension":
        """The extension that ComfyUI asks for."""
        return v3_extension()

    __all__ = ["comfy_entrypoint"]
