"""davae: larger images from the same number of tokens, for any latent diffusion model.

    import davae
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
    vae = davae.AutoencoderDA.from_base(pipe.vae, scale=2, detail_channels=16)
    pipe = davae.upgrade_pipeline(pipe, vae)

Importing davae, before or after diffusers, is enough for diffusers to open pipelines that davae saved. It imports
neither torch nor diffusers: each name is imported on first use.
"""

import sys
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from davae.errors import DavaeError, WarmStartError
from davae.import_hooks import after_import
from davae.version import __version__

if TYPE_CHECKING:
    from davae.models import AutoencoderDA, LightningDiTTransformer2DModel, fit_start
    from davae.pipelines import (
        ClassConditionalPipeline,
        load_adapters,
        load_pipeline,
        push_to_hub,
        save_adapters,
        save_pipeline,
        speed_up,
        upgrade_pipeline,
        write_model_card,
    )
    from davae.warm_start import widen_channels

__all__ = [
    "AutoencoderDA",
    "ClassConditionalPipeline",
    "DavaeError",
    "LightningDiTTransformer2DModel",
    "WarmStartError",
    "__version__",
    "fit_start",
    "load_adapters",
    "load_pipeline",
    "push_to_hub",
    "save_adapters",
    "save_pipeline",
    "speed_up",
    "upgrade_pipeline",
    "widen_channels",
    "write_model_card",
]

_PACKAGES = ("models", "pipelines", "warm_start", "latents")  # hold the names above, and are public themselves

if not TYPE_CHECKING:  # type checkers assume that a module with __getattr__ has every name

    def __getattr__(name: str) -> Any:
        """Import a public name on first use (PEP 562)."""
        if name in _PACKAGES:
            return import_module(f"davae.{name}")
        if name not in __all__:
            raise AttributeError(f"module 'davae' has no attribute '{name}'")
        packages = (import_module(f"davae.{package}") for package in _PACKAGES)
        globals()[name] = next(getattr(package, name) for package in packages if hasattr(package, name))
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_PACKAGES})


def _show_to_diffusers(diffusers: ModuleType) -> None:
    """Make davae's classes visible to diffusers.

    diffusers looks up a pipeline's class, and the library of a component that is not its own, among its own attributes.
    It has no other hook that uses davae's classes instead of code from the folder.
    """

    names = {"ClassConditionalPipeline": property(lambda _: sys.modules[__name__].ClassConditionalPipeline)}
    diffusers.__class__ = type("_WithDavae", (type(diffusers),), names)  # imported on access
    diffusers.pipelines.davae = sys.modules[__name__]


def _own_class_before_the_folder_s(module: ModuleType) -> None:
    """Make diffusers' ``AutoModel`` prefer davae's class to the one of the same name in a folder's ``davae.py``."""
    fetch = module.get_class_from_dynamic_module

    @wraps(fetch)
    def own_class(path_or_repo: str, *args: Any, **options: Any) -> Any:
        name = options.get("class_name")
        if options.get("module_file") == "davae.py" and name in _WITH_CODE:
            return getattr(sys.modules[__name__], name)
        return fetch(path_or_repo, *args, **options)

    vars(module)["get_class_from_dynamic_module"] = own_class


_WITH_CODE = ("AutoencoderDA", "LightningDiTTransformer2DModel")  # models saved with a ``davae.py``
after_import("diffusers", _show_to_diffusers)
after_import("diffusers.models.auto_model", _own_class_before_the_folder_s)
