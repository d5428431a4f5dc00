"""davae: larger images from the same number of tokens, for any latent diffusion model.

    import davae
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
    vae = davae.AutoencoderDA.from_base(pipe.vae, scale=2, detail_channels=16)
    pipe = davae.upgrade_pipeline(pipe, vae)

Importing davae is enough for diffusers to open pipelines that davae saved, whichever of the two is imported first. It
imports neither torch nor diffusers: a name is imported when it is first used.
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
    from davae.models import AutoencoderDA, LightningDiTTransformer2DModel
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

_PACKAGES = ("models", "pipelines", "warm_start", "latents")  # where the names above are, and names themselves

if not TYPE_CHECKING:  # a checker takes a module with __getattr__ to have every name

    def __getattr__(name: str) -> Any:
        """A public name at its first use (PEP 562)."""
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
    """Put davae where diffusers looks for classes.

    It looks for the class of a pipeline, and for the library of a component that is not its own, among its own names.
    It offers no other way that runs davae's classes and not the code in a folder.
    """

    names = {"ClassConditionalPipeline": property(lambda _: sys.modules[__name__].ClassConditionalPipeline)}
    diffusers.__class__ = type("_WithDavae", (type(diffusers),), names)  # imported when it is asked for
    diffusers.pipelines.davae = sys.modules[__name__]


def _own_class_before_the_folder_s(module: ModuleType) -> None:
    """Have diffusers' ``AutoModel`` take davae's class for one of the same name in a folder's file of code."""
    fetch = module.get_class_from_dynamic_module

    @wraps(fetch)
    def own_class(path_or_repo: str, *args: Any, **options: Any) -> Any:
        name = options.get("class_name")
        if options.get("module_file") == "davae.py" and name in _WITH_CODE:
            return getattr(sys.modules[__name__], name)
        return fetch(path_or_repo, *args, **options)

    vars(module)["get_class_from_dynamic_module"] = own_class


_WITH_CODE = ("AutoencoderDA", "LightningDiTTransformer2DModel")  # models that are saved with such a file
after_import("diffusers", _show_to_diffusers)
after_import("diffusers.models.auto_model", _own_class_before_the_folder_s)
