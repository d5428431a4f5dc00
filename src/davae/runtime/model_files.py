"""Opening models of diffusers and transformers: none with a weight missing, left over, misshapen or not a number.

Both libraries open such models all the same. They log a line, and leave the weight on the meta device, at random, or at
what the memory held before. Everything that davae opens goes through :func:`open_model`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.latents.statistics import check_statistics

_logger = logging.getLogger(__name__)
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<new>\w[\w-]*?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<old>\w[\w-]*))?\.safetensors"
)
# What stands beside the part of a language or vision model that a pipeline takes: its head, its other half.
_OTHER_PARTS = {
    "lm_head", "decoder", "vision_model", "visual", "vision_tower", "multi_modal_projector", "visual_projection",
    "text_projection", "logit_scale", "logit_bias", "score", "classifier", "cls", "pooler",
}  # fmt: skip
_NAMED = 4  # keys in a message


def open_model(
    load: Callable[..., Any],
    path_or_repo: str | Path,
    *,
    optional: Collection[str] = (),
    only_variant: bool = True,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """A model from its folder or from the hub, complete and finite, or an error that names file and key.

    Keys are compared by the libraries' own account of what they read, so that tied weights, buffers that are made anew
    and quantised layers count as they mean them. Of a sharded folder every file is looked at, not the index alone.

    Args:
        load: ``from_pretrained`` of a class of diffusers or transformers.
        path_or_repo: a folder, or ``user/name``.
        optional: parts that may be missing, such as ``pooler``; they then hold random numbers.
        only_variant: where no ``variant`` is asked for and the folder has one alone, that is taken, and said.
        options: for ``load``.

    Returns:
        The model, and what ``load`` says of its keys.

    Raises:
        DavaeError: a weight is missing, left over, of another shape or not finite; statistics in the configuration
            cannot be ones; or the folder has several variants, and none was chosen.
    """
    folder = Path(path_or_repo) / (options.get("subfolder") or "")
    where = str(folder if folder.is_dir() else path_or_repo)
    if folder.is_dir() and only_variant:
        variant = chosen_variant(folder, component_files([folder]), options.pop("variant", None))
        options |= {} if variant is None else {"variant": variant}
    options["output_loading_info"] = True
    try:
        model, info = load(path_or_repo, **options)
    except DavaeError as error:  # of the constructor, which knows no folder
        raise DavaeError(f"{where}: {error}") from error
    except (ValueError, RuntimeError) as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        found = re.search(r"because (\S+) expected shape (.+?), but got (.+?)\. If", str(error))
        if found is None:
            _, info = load(path_or_repo, **options, ignore_mismatched_sizes=True)
            mismatched = info["mismatched_keys"]
        else:
            mismatched = [(found[1], found[3], found[2])]
        raise DavaeError(
            _message("model", where, [_mismatch(stored_keys(folder, options.get("variant")), mismatched)])
        ) from error
    _check(model, info, folder, where, optional, options.get("variant"))
    return model, info


def _check(
    model: nn.Module,
    info: Mapping[str, Any],
    folder: Path,
    where: str,
    optional: Collection[str],
    variant: str | None,
) -> None:
    missing = sorted(key for key in info["missing_keys"] if not any(part in key for part in optional))
    unexpected = set(info["unexpected_keys"])
    if not hasattr(type(model), "load_config"):  # of transformers, whose classes are opened from larger models too
        parts = {name for name, _ in model.named_children()}
        unexpected = {key for key in unexpected if _top(model, key) in parts or _top(model, key) not in _OTHER_PARTS}
    stored = stored_keys(folder, variant)
    unexpected |= _outside_index(folder, stored)
    problems: list[str] = []
    if missing:
        problems.append(f"{_count(missing, 'weight is', 'weights are')} in none of the files: {_some(missing)}")
    if unexpected:
        named = [f"{key}{_in_file(stored, key)}" for key in sorted(unexpected)]
        problems.append(f"{_count(named, 'tensor has', 'tensors have')} no place in the model: {_some(named)}")
    if info["mismatched_keys"]:
        problems.append(_mismatch(stored, info["mismatched_keys"]))
    if not problems and (empty := never_filled(model)):
        problems.append(f"{_count(empty, 'weight was', 'weights were')} not read: {_some(empty)}")
    if not problems and (bad := not_finite(named_weights(model))):
        named = [f"{key}{_in_file(stored, key)}" for key in bad]
        problems.append(f"{_count(named, 'weight holds', 'weights hold')} numbers that are not finite: {_some(named)}")
    if problems:
        raise DavaeError(_message(type(model).__name__, where, problems))
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        try:
            check_statistics(config)
        except DavaeError as error:
            raise DavaeError(f"{Path(where) / 'config.json'}: {error}") from error


def _message(what: str, where: str, problems: list[str]) -> str:
    return f"the {what} in {where} cannot be opened: {'; '.join(problems)}. Copy or save it again"


def _mismatch(stored: Mapping[str, Path], keys: Iterable[tuple[str, Any, Any]]) -> str:
    named = sorted(f"{k}{_in_file(stored, k)} has shape {_shape(a)}, the model's {_shape(b)}" for k, a, b in keys)
    return _some(named)


def _shape(size: Any) -> str:
    return str(list(size)) if not isinstance(size, str) else size.removeprefix("torch.Size(").removesuffix(")")


def _count(keys: Collection[str], one: str, more: str) -> str:
    return f"{len(keys)} {one if len(keys) == 1 else more}"


def _some(keys: list[str]) -> str:
    rest = len(keys) - _NAMED
    return ", ".join(keys[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _top(model: nn.Module, key: str) -> str:
    """The first name of a key below the model, with or without the prefix of a model with a head."""
    return key.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.").split(".")[0]


def never_filled(model: nn.Module) -> list[str]:
    """Names of tensors without memory, but for those that accelerate holds elsewhere."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if not hasattr(module, "_hf_hook")
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.is_meta
    ]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, as they are."""
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with a value that is infinite or not a number, or of a variance below 0.

    One pass over the memory without a copy. Integers and quantised formats are left out.
    """
    names, verdicts = [], []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.device.type == "meta" or not tensor.numel():
            continue
        if type(tensor) not in (Tensor, nn.Parameter):  # a format of its own, such as torchao's
            continue
        low, high = torch.aminmax(tensor.detach())  # NaN goes through both
        verdict = low.isfinite() & high.isfinite()
        if name.endswith("running_var"):
            verdict = verdict & (low >= 0)
        names.append(name)
        verdicts.append(verdict)
    by_device: dict[torch.device, list[int]] = {}
    for position, verdict in enumerate(verdicts):
        by_device.setdefault(verdict.device, []).append(position)
    bad = []
    for positions in by_device.values():  # one transfer a device
        finite = torch.stack([verdicts[position] for position in positions]).tolist()
        bad += [position for position, good in zip(positions, finite, strict=True) if not good]
    return [names[position] for position in sorted(bad)]


# ---------------------------------------------------------------------- files


def stored_keys(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """The file of every tensor in a model's folder, from the headers alone; damaged files are left out."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if _is_weights(file.name) and variant_of(file.name) == variant:
            try:
                with open(file, "rb") as opened:  # eight bytes of length, then JSON
                    header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            except (OSError, ValueError, OverflowError, MemoryError):
                continue
            found |= dict.fromkeys(header.keys() - {"__metadata__"}, file)
    return found


def _outside_index(folder: Path, stored: Mapping[str, Path]) -> set[str]:
    """Tensors of a sharded folder's files that its index does not name."""
    surplus: set[str] = set()
    for index in folder.glob("*.safetensors.index*.json"):
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(listed.values())
        surplus |= {key for key, file in stored.items() if file.name in files and key not in listed}
    return surplus


def _in_file(stored: Mapping[str, Path], key: str) -> str:
    return f" ({stored[key].name})" if key in stored else ""


def by_component(files: Iterable[str]) -> dict[str, list[str]]:
    """File names by folder, of paths relative to a pipeline's folder or a repository."""
    found: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        found.setdefault(folder, []).append(name)
    return found


def component_files(folders: Iterable[Path]) -> dict[str, list[str]]:
    """:func:`by_component` of folders on this machine."""
    return {folder.name: [file.name for file in sorted(folder.iterdir())] for folder in folders}


def chosen_variant(where: str | Path, files: Mapping[str, Iterable[str]], wanted: str | None) -> str | None:
    """The variant to open models in; None for the files without one.

    Args:
        where: what holds them, for messages.
        files: names of each model's files, see :func:`by_component`.
        wanted: what was asked for, such as ``fp16``; None takes the files without a variant, and where a model has none
            of those the only variant that there is.

    Raises:
        DavaeError: none of the models has the variant, or there are several and none was chosen.
    """
    found = [variants for names in files.values() if (variants := set(map(variant_of, filter(_is_weights, names))))]
    known = sorted({variant for variants in found for variant in variants if variant is not None})
    if wanted is not None:
        if found and wanted not in known:
            there = f"there are {', '.join(known)}" if known else "they have no variants, leave it out"
            raise DavaeError(f"{where} holds no weights of the variant '{wanted}': {there}")
        return wanted
    alone = [variants for variants in found if None not in variants]
    if not alone:
        return None
    shared = sorted(variant for variant in set.intersection(*alone) if variant is not None)
    if len(shared) != 1:
        raise DavaeError(
            f"the weights in {where} are there as variants alone, {', '.join(known)}: choose one (--variant, "
            "base_variant in a recipe, variant= in Python)"
        )
    _logger.warning("%s: its weights are there as variant '%s' alone, which is taken", where, shared[0])
    return shared[0]


def variant_of(file: str) -> str | None:
    """``fp16`` of ``model.fp16.safetensors`` and kin; None of a file of weights without a variant."""
    match = _WEIGHTS.fullmatch(file)
    return match and (match["new"] or match["old"])


def _is_weights(file: str) -> bool:
    return _WEIGHTS.fullmatch(file) is not None
