"""Opening models of diffusers and transformers with checks: no weight missing, unexpected, misshapen or not finite.

Both libraries only log such weights, and leave missing ones on the meta device, random or uninitialised. davae opens
all models through :func:`open_model`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import DavaeError, first_line
from davae.latents.statistics import check_statistics
from davae.runtime.text_files import open_regular, plain_json, read_json

_logger = logging.getLogger(__name__)
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<new>\w[\w-]*?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<old>\w[\w-]*))?\.safetensors"
)
# Parts of a language or vision model that a pipeline may leave out: its head, its other half.
_OTHER_PARTS = {
    "lm_head", "decoder", "vision_model", "visual", "vision_tower", "multi_modal_projector", "visual_projection",
    "text_projection", "logit_scale", "logit_bias", "score", "classifier", "cls", "pooler",
}  # fmt: skip
_NAME_A_CLASS = {"config.json", "model_index.json", "scheduler_config.json"}
_CLASS_KEYS = {"_class_name", "model_type", "architectures", "architecture"}
_NAMED = 4  # keys in a message


def open_model(
    load: Callable[..., Any],
    path_or_repo: str | Path,
    *,
    optional: Collection[str] = (),
    only_variant: bool = True,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Open a model from a folder or from the hub, and check that its weights are complete and finite.

    Keys are compared by the loading report of the libraries, which accounts for tied weights, rebuilt buffers and
    quantised layers. Of a sharded model all files are checked, not only the index.

    Args:
        load: ``from_pretrained`` of a class of diffusers or transformers.
        path_or_repo: a folder, or ``user/name``.
        optional: parts that may be missing, such as ``pooler``; their weights are then random.
        only_variant: without a ``variant`` option, choose one by :func:`chosen_variant`.
        options: for ``load``.

    Returns:
        The model, and the loading report of ``load``.

    Raises:
        DavaeError: a weight is missing, unexpected, of another shape or not finite (the message names file and key);
            statistics in the configuration are invalid; or there are several variants and none was chosen.
    """
    folder = Path(path_or_repo) / (options.get("subfolder") or "")
    where = str(folder if folder.is_dir() else path_or_repo)
    check_descriptions(folder)
    if folder.is_dir() and only_variant:
        variant = chosen_variant(folder, component_files([folder]), options.pop("variant", None))
        options |= {} if variant is None else {"variant": variant}
    options["output_loading_info"] = True
    try:
        with told_where("model", where):
            model, info = load(path_or_repo, **options)
    except DavaeError as error:
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
    if not info.get("is_whole"):  # by the class's own from_pretrained
        _check(model, info, folder, where, optional, options.get("variant"))
    return model, info | {"is_whole": True}


@contextmanager
def told_where(what: str, where: str) -> Iterator[None]:
    """Name the place in a DavaeError for what Python and the libraries make of damage; errors of the machine pass."""
    try:
        yield
    except DavaeError as error:  # from a constructor, which does not know the folder
        raise (error if where in str(error) else DavaeError(f"{where}: {error}")) from error
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # whatever a constructor or a reader makes of damage; the libraries have own classes
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, NotImplementedError) or "trust_remote_code" in reason or "alloc" in reason:
            raise
        weights = type(error).__name__ == "SafetensorError"
        files = f", {_some([file.name for file in sorted(Path(where).glob('*.safetensors'))])}" if weights else ""
        message = f"the {what} in {where} cannot be opened ({reason}{files})"
        raise DavaeError(
            f"{message}: unless an option is the cause, a file is damaged; save or copy it again"
        ) from error


def _check(
    model: nn.Module, info: Mapping[str, Any], folder: Path, where: str, optional: Collection[str], variant: str | None
) -> None:
    missing = sorted(key for key in info["missing_keys"] if not any(part in key for part in optional))
    unexpected = set(info["unexpected_keys"])
    if not hasattr(type(model), "load_config"):  # transformers: a class may be opened from a larger model
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
    """The first component of a key, after the base model's prefix if it has one."""
    return key.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.").split(".")[0]


def never_filled(model: nn.Module) -> list[str]:
    """Names of tensors on the meta device, except in modules that accelerate offloads."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if not hasattr(module, "_hf_hook")
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.is_meta
    ]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with an infinite or NaN value, and of ``running_var`` buffers with a negative one.

    One pass over memory without a copy. Integer and quantised tensors are skipped.
    """
    names, verdicts = [], []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.device.type == "meta" or not tensor.numel():
            continue
        if type(tensor) not in (Tensor, nn.Parameter):  # tensor subclasses, such as torchao's
            continue
        low, high = torch.aminmax(tensor.detach())  # both propagate NaN
        verdict = low.isfinite() & high.isfinite()
        if name.endswith("running_var"):
            verdict = verdict & (low >= 0)
        names.append(name)
        verdicts.append(verdict)
    by_device: dict[torch.device, list[int]] = {}
    for position, verdict in enumerate(verdicts):
        by_device.setdefault(verdict.device, []).append(position)
    bad = []
    for positions in by_device.values():  # one transfer per device
        finite = torch.stack([verdicts[position] for position in positions]).tolist()
        bad += [position for position, good in zip(positions, finite, strict=True) if not good]
    return [names[position] for position in sorted(bad)]


# ---------------------------------------------------------------------- files


def check_descriptions(folder: Path) -> None:
    """What says how a folder's weights are read is whole: configurations, and the index of weights in shards.

    Both libraries open them in ways of their own, and end in whatever Python makes of a damaged one.

    Raises:
        DavaeError: one is absent, empty or no JSON object in UTF-8, or an index names no files; the file is named.
        OSError: one cannot be read.
    """
    for file in sorted(folder.glob("*.json")):
        is_index = ".safetensors.index" in file.name
        if not (is_index or file.name == "model_index.json" or file.name.endswith("config.json")):
            continue
        try:
            with open_regular(file) as opened:
                found = plain_json(opened.read().decode())
            wrong = None if isinstance(found, dict) else "no JSON object"
            if wrong is None and not found:
                wrong = "nothing is in it"
            if wrong is None and file.name in _NAME_A_CLASS and not _CLASS_KEYS & found.keys():
                wrong = "it names no class"
            if is_index and wrong is None:
                listed = found.get("weight_map")
                names = list(listed.values()) if isinstance(listed, dict) and listed else [None]
                if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
                    wrong = "its weight_map does not say the file of each weight"
        except (ValueError, TypeError) as error:
            wrong = f"not JSON in UTF-8 without a byte-order mark: {first_line(error)}"
        if wrong is not None:
            raise DavaeError(f"{file} is damaged ({wrong}): copy or save it again")
    if not (folder / "config.json").is_file() and any(_is_weights(file.name) for file in folder.glob("*.safetensors")):
        raise DavaeError(f"{folder} holds weights, but no config.json: copy or save the model again")


def stored_keys(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """The file of every tensor in a model's folder, read from the headers; damaged files are skipped.

    If an index names the files of the variant, others are of an earlier save and do not count.
    """
    found: dict[str, Path] = {}
    named = {name for index in _indexes(folder) for name in index.values() if variant_of(name) == variant}
    for file in sorted(folder.glob("*.safetensors")):
        if _is_weights(file.name) and variant_of(file.name) == variant and (not named or file.name in named):
            try:
                with open(file, "rb") as opened:  # eight bytes of length, then JSON
                    header = plain_json(opened.read(int.from_bytes(opened.read(8), "little")))
            except (OSError, ValueError, OverflowError, MemoryError):
                continue
            found |= dict.fromkeys(header.keys() - {"__metadata__"}, file)
    return found


def _indexes(folder: Path) -> list[dict[str, str]]:
    """The file of every tensor by each index of a sharded model."""
    files = sorted(folder.glob("*.safetensors.index*.json"))
    found = []
    for file in files:
        listed = read_json(file)
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
            raise DavaeError(f"{file} is damaged: it has no 'weight_map'. Copy or save the model again")
        found.append(listed["weight_map"])
    return found


def _outside_index(folder: Path, stored: Mapping[str, Path]) -> set[str]:
    """Tensors in the files of a sharded model that its index does not list."""
    surplus: set[str] = set()
    for listed in _indexes(folder):
        files = set(listed.values())
        surplus |= {key for key, file in stored.items() if file.name in files and key not in listed}
    return surplus


def _in_file(stored: Mapping[str, Path], key: str) -> str:
    return f" ({stored[key].name})" if key in stored else ""


def by_component(files: Iterable[str]) -> dict[str, list[str]]:
    """Group paths, relative to a pipeline's folder or repository, into file names by folder."""
    found: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        found.setdefault(folder, []).append(name)
    return found


def component_files(folders: Iterable[Path]) -> dict[str, list[str]]:
    """:func:`by_component` for local folders."""
    return {folder.name: [file.name for file in sorted(folder.iterdir())] for folder in folders}


def chosen_variant(where: str | Path, files: Mapping[str, Iterable[str]], wanted: str | None) -> str | None:
    """The variant of weight files to open models with; ``None`` for files without a variant.

    Args:
        where: where the models are, for messages.
        files: file names of each model, see :func:`by_component`.
        wanted: the requested variant, such as ``fp16``; by default files without a variant, or, if a model has none of
            these, the only variant that there is (logged).

    Raises:
        DavaeError: no model has the requested variant, or there are several and none was requested.
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
    """``fp16`` for ``model.fp16.safetensors`` and similar names; ``None`` for other files."""
    match = _WEIGHTS.fullmatch(file)
    return match and (match["new"] or match["old"])


def _is_weights(file: str) -> bool:
    return _WEIGHTS.fullmatch(file) is not None
