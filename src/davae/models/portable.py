"""Models that can be opened where davae is not installed."""

import functools
import json
import os
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from davae.models.remote_code import custom_code
from davae.runtime.model_files import open_model

#: Beside the weights. ``model_index.json`` names the library ``davae``, and diffusers looks for a file of that name.
CODE_FILE = "davae.py"


def remove_stale_indexes(folder: Path) -> None:
    """Of a model's folder: an earlier save in shards leaves the list of its files behind, which loading would go by."""
    for index in folder.glob("*.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if not all((index.parent / name).is_file() for name in named):
            index.unlink()


class OpenedWhole(ModelMixin):
    """First base of a model of diffusers that opens with all of its weights or not at all, whoever opens it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As in diffusers, but nothing is opened with a weight missing, left over, misshapen or not finite.

        Raises:
            DavaeError: there is such a weight, or statistics in ``config.json`` cannot be ones; see
                :func:`davae.runtime.model_files.open_model`.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained
        model, info = open_model(load, os.fspath(pretrained_model_name_or_path), only_variant=False, **kwargs)
        return (model, info) if wants_info else model


class Portable(OpenedWhole):
    """First base of a davae model: saving also writes the file of code with which anyone can open it.

    The class must say ``__module__ = "davae"``: diffusers writes that into ``model_index.json`` as the library of the
    component. Where davae was imported, it is the class of davae that is loaded; elsewhere the one in the file, for
    people who pass ``trust_remote_code=True``.
    """

    _auto_class = "AutoModel"  # config.json names file and class for AutoModel.from_pretrained

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in diffusers, with the file of code beside the weights."""
        kind = type(self)
        if kind.__module__ == "davae":  # a class that someone else derived must bring its own code
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CODE_FILE).write_text(custom_code(kind.__name__), encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)
        remove_stale_indexes(Path(save_directory))

    # Pipelines pass on what they find in the signature, which must be the family's.
    functools.update_wrapper(save_pretrained, ModelMixin.save_pretrained, assigned=(), updated=())

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """What ``config.json`` says for AutoModel is no argument of the model."""
        own = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(own, **kwargs)
