"""What is installed here, and what to install for what is missing: what ``davae doctor`` does."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from davae.tiny import TINY
from davae.training.run_directory import environment

_OPTIONAL = {
    "lpips": ("the LPIPS loss and metric", "pip install 'davae[lpips]'"),
    "torchvision": ("LPIPS", "install the build that matches your torch"),
    "efficientnet_lite_pytorch": ("feature distances without a download", "pip install 'davae[features]'"),
    "bitsandbytes": ("AdamW with moments of 8 bits", "pip install 'davae[eight-bit]'"),
}


def installation() -> dict[str, Any]:
    """Versions, hardware, whether the embedded base is there, and which optional packages are."""
    return environment() | {
        "embedded_base": (TINY / "model_index.json").is_file(),
        "optional": {name: importlib.util.find_spec(name) is not None for name in _OPTIONAL},
    }


def installation_text(facts: Mapping[str, Any]) -> str:
    """What :func:`installation` found, with remedies."""
    lines = [
        f"python {facts['python']} on {facts['platform']}; {facts['device']}, {facts['cpu_count']} cores",
        "  ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        f"embedded base: {'present' if facts['embedded_base'] else 'MISSING; reinstall davae'}",
    ]
    for name, (use, remedy) in _OPTIONAL.items():
        lines.append(f"{name}: {'present' if facts['optional'][name] else f'absent ({use}); {remedy}'}")
    return "\n".join(lines)
