"""DA-VAE in ComfyUI, which imports this folder from its ``custom_nodes``: the nodes of the davae that is installed."""

import importlib.util

if importlib.util.find_spec("davae") is None:
    raise ImportError("the nodes of DA-VAE need davae in ComfyUI's Python: python -m pip install FOLDER_OF_DAVAE")

from davae.comfyui import *  # noqa: F403 (what ComfyUI looks for depends on its version)
