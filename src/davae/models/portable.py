"""Models that can be opened where davae is not installed."""

import functools
import os
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from davae.models.remote_code import after_saving, save_custom_code
from davae.runtime.model_files import open_model

#: Beside the weights. ``model_index.json`` names the library ``davae``, and diffusers looks for a file of that name.
CODE_FILE = "davae.py"


class OpenedWhole(ModelMixin):
    """First base class of a diffusers model that loads with all of its weights or not at all."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As in diffusers, but missing, unexpected, misshapen and non-finite weights are errors.

        Raises:
            DavaeError: there is such a weight, or the statistics in ``config.json`` are invalid; see
                :func:`davae.runtime.model_files.open_model`.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained
        model, info = open_model(load, os.fspath(pretrained_model_name_or_path), only_variant=False, **kwargs)
        return (model, info) if wants_info else model


class Portable(OpenedWhole):
    """First base class of a davae model: saving also writes a file of code with which it loads without davae.

    The class must set ``__module__ = "davae"``, which diffusers writes into ``model_index.json`` as the component's
    library. If davae is imported, its class is loaded, otherwise the one in the file, which needs
    ``trust_remote_code=True``.
    """

    _auto_class = "AutoModel"  # config.json names file and class for AutoModel.from_pretrained

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in diffusers, with the file of code beside the weights."""
        kind = type(self)
        if kind.__module__ == "davae":  # a subclass defined elsewhere must bring its own code
            save_custom_code(kind.__name__, Path(save_directory) / CODE_FILE)
        super().save_pretrained(save_directory, *args, **kwargs)
        after_saving(Path(save_directory))

    # Pipelines pass on the arguments they find in the signature, which must be that of diffusers.
    functools.update_wrapper(save_pretrained, ModelMixin.save_pretrained, assigned=(), updated=())

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in diffusers, without ``auto_map``, the entry for AutoModel, which is not an argument of the model."""
        own = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(own, **kwargs)
