"""Opening pipelines and autoencoders from folders, runs or the hub, with errors for what is missing or damaged."""

import errno
import functools
import json
import logging
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

import davae.models
from davae.errors import DavaeError, first_line
from davae.models import AutoencoderDA
from davae.models.latent_space import autoencoder_class
from davae.pipelines.families import find_family, fit_to_autoencoder
from davae.runtime.devices import saved_dtype
from davae.runtime.model_files import (
    by_component,
    check_descriptions,
    chosen_variant,
    component_files,
    open_model,
    told_where,
)
from davae.runtime.package_files import shipped
from davae.runtime.text_files import read_object

LAYERS_FILE = "davae_adapter.safetensors"
_OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EMFILE)  # nothing is damaged
_NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)


def load_pipeline(folder_or_repo: str | Path, **options: Any) -> DiffusionPipeline:
    """Open a pipeline of davae or of diffusers from a folder, a finished run, or the hub.

    The installed davae's classes are used; the code in a davae pipeline's folder, for use without davae, is not
    executed. ``height`` and ``width`` mean the full resolution in every pipeline: a few (Lumina 2, PixArt, SANA)
    contain sizes of the base, which are corrected here but not by plain ``from_pretrained``.

    Args:
        folder_or_repo: a pipeline folder, a run directory with one, or ``user/name`` on the hub.
        options: as for ``DiffusionPipeline.from_pretrained``, such as ``dtype``.

    Raises:
        DavaeError: a folder without a pipeline, files that are missing or damaged, a model with a missing, unexpected
            or non-finite weight, or a name that cannot be fetched from the hub.
    """
    return open_pipeline(pipeline_place(folder_or_repo), **options)


TEXT_ENCODERS = "text_encoders"
"""Stands for all text encoders of a pipeline where its parts are named."""
FURTHER_TRANSFORMERS = "further_transformers"
"""Stands for those that follow the transformer when it is tuned, see :class:`PipelineFamily`."""


def open_pipeline(path_or_repo: str, *, without: Collection[str] = (), **options: Any) -> DiffusionPipeline:
    """Open a pipeline from a folder or the hub, each model by :func:`open_model`, and apply `fit_to_autoencoder`.

    With ``vae=None`` the pipeline still has the sizes of its own autoencoder: the class reads them from one on the
    meta device, which is then removed.

    Args:
        path_or_repo: see :func:`pipeline_place`.
        without: parts whose weights are neither read nor downloaded. ``vae`` and ``transformer`` are built on the meta
            device, from their configuration; text encoders, by name or all as :data:`TEXT_ENCODERS`, are ``None``, as
            are :data:`FURTHER_TRANSFORMERS`, which ``transformer`` includes.
        options: as for ``DiffusionPipeline.from_pretrained``; ``dtype`` may be ``"saved"``, that of the transformer's
            files, or ``"parts"``, for each part that of its own. Without ``variant``, the only published variant is
            taken if there are no files without one.

    Raises:
        DavaeError: see :func:`opening`; or a model is incomplete, not finite, or available in several variants.
    """
    try:
        return _open_pipeline(path_or_repo, without, **options)
    except DavaeError as error:
        if Path(path_or_repo).is_dir() or options.get("variant") is not None:
            raise
        only = chosen_variant(path_or_repo, by_component(published_files(path_or_repo, error)), None)
        if only is None:
            raise
        return _open_pipeline(path_or_repo, without, **options | {"variant": only})


def published_files(path_or_repo: str, error: DavaeError) -> list[str]:
    """Names of the files in a folder; for a hub name, those that diffusers lists in its ``error``."""
    folder = Path(path_or_repo)
    if folder.is_dir():
        return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*"))]
    return re.findall(r"'([^']+\.[^']+)'", str(error))


def _open_pipeline(path_or_repo: str, without: Collection[str], **options: Any) -> DiffusionPipeline:
    left = dict.fromkeys(_left_out(path_or_repo, without, options) if without else ())
    with opening("pipeline", path_or_repo, passed={**options, **left}), _models_checked():
        if options.get("dtype") in ("saved", "parts"):
            if not Path(path_or_repo).is_dir():
                wanted = {key: value for key, value in options.items() if key != "dtype"}
                path_or_repo = str(DiffusionPipeline.download(path_or_repo, **wanted, **left))
            options["dtype"] = _saved_dtype(Path(path_or_repo), options, each=options["dtype"] == "parts")
        options |= left
        folder = Path(path_or_repo)
        if folder.is_dir():
            parts = component_files(part for part in sorted(folder.iterdir()) if part.is_dir())
            needed = {name: files for name, files in parts.items() if name not in options}
            variant = chosen_variant(folder, needed, options.pop("variant", None))
            options |= {} if variant is None else {"variant": variant}
        sizes = {
            part: _without_weights(path_or_repo, part, options)
            for part in ("vae", "transformer")
            if part in left or (part == "vae" and options.get(part, part) is None)
        }
        options |= {part: model for part, model in sizes.items() if model is not None}
        pipe = fit_to_autoencoder(DiffusionPipeline.from_pretrained(path_or_repo, **options))
        if "vae" in sizes and "vae" not in left:
            pipe.register_modules(vae=None)
        return pipe


def _index(path_or_repo: str, options: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = DiffusionPipeline.load_config(path_or_repo, **_of_hub(options))
    return found


def _of_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options}


def _left_out(path_or_repo: str, without: Collection[str], options: Mapping[str, Any]) -> list[str]:
    """The components that ``without`` names."""
    with opening("pipeline", path_or_repo):
        index = _index(path_or_repo, options)
    encoders = [name for name in index if name.startswith("text_encoder") and TEXT_ENCODERS in without]
    further: tuple[str, ...] = ()
    if {FURTHER_TRANSFORMERS, "transformer"} & set(without):
        further = find_family(str(index.get("_class_name"))).follow_transformer
    return [*encoders, *(name for name in (*without, *further) if name in index)]


def _saved_dtype(folder: Path, options: Mapping[str, Any], *, each: bool) -> torch.dtype | dict[str, torch.dtype]:
    variant = options.get("variant")
    if not each:
        return saved_dtype(folder / "transformer", variant=variant)
    parts = [part for part in sorted(folder.iterdir()) if any(part.glob("*.safetensors"))]
    return {part.name: saved_dtype(part, variant=variant) for part in parts}


def _without_weights(path_or_repo: str, part: str, options: Mapping[str, Any]) -> ModelMixin | None:
    """A pipeline's autoencoder or transformer on the meta device, from its configuration; None if it has none."""
    library, name = _index(path_or_repo, options).get(part) or (None, None)
    if name is None:
        return None
    model_class = None
    if library in ("diffusers", "davae"):
        model_class = autoencoder_class(name) if part == "vae" else _transformer_class(name)
    if model_class is None:
        raise DavaeError(f"the pipeline in {path_or_repo} has a {name} of '{library}' as its {part}: open it whole")
    config = model_class.load_config(path_or_repo, subfolder=part, **_of_hub(options))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return model_class.from_config(config)


def _transformer_class(name: str) -> type[ModelMixin] | None:
    return getattr(davae.models, name, None) or getattr(diffusers, name, None)


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _models_checked() -> Iterator[None]:
    """Within the context, this thread's ``from_pretrained`` of diffusers and transformers checks what it opens.

    Models go through `open_model`: a pipeline loads them itself, and neither returns reports about their keys nor has
    an option for that. Tokenizers must have their files, and the place of a damaged part is told.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    thread = threading.get_ident()

    def checked(original: classmethod) -> classmethod:
        def from_pretrained(kind: type, place: Any, *args: Any, **options: Any) -> Any:
            load = functools.partial(original.__func__, kind)
            if threading.get_ident() != thread or args or "output_loading_info" in options:  # asked for by open_model
                return load(place, *args, **options)
            if issubclass(kind, torch.nn.Module):
                return open_model(load, place, **options)[0]
            if issubclass(kind, PreTrainedTokenizerBase):
                _check_tokenizer(kind, Path(place) / (options.get("subfolder") or ""))
            with told_where(kind.__name__, str(place)):
                return load(place, **options)

        return classmethod(from_pretrained)

    with _ONE_AT_A_TIME:
        kinds = (ModelMixin, PreTrainedModel, PreTrainedTokenizerBase, SchedulerMixin)
        originals = {kind: vars(kind)["from_pretrained"] for kind in kinds}
        try:
            for kind, original in originals.items():
                kind.from_pretrained = checked(original)
            yield
        finally:
            for kind, original in originals.items():
                kind.from_pretrained = original


def _check_tokenizer(kind: Any, folder: Path) -> None:
    """Require a tokenizer's settings and vocabulary: without them one opens that knows no words, or no length."""
    vocabulary = {*kind.vocab_files_names.values(), "tokenizer.json", "tekken.json"} - {"merges.txt"}
    if folder.is_dir() and kind.vocab_files_names:  # otherwise its vocabulary is bytes
        for names in ({"tokenizer_config.json"}, vocabulary):
            if not any((folder / name).is_file() for name in names):
                raise DavaeError(f"the {kind.__name__} in {folder} lacks {' or '.join(sorted(names))}: save it again")


def is_model_alone(folder: Path) -> bool:
    """Whether a folder holds a model by itself, not a pipeline."""
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def pipeline_place(folder_or_repo: str | Path) -> str:
    """The folder of a pipeline, given that folder, a run with one, or what comes with davae; a hub name unchanged.

    Raises:
        DavaeError: a folder without a pipeline, or a path that does not exist.
    """
    folder = shipped(folder_or_repo) or Path(folder_or_repo)
    if not folder.is_dir():
        return hub_name("pipeline", str(folder_or_repo))
    if (folder / LAYERS_FILE).is_file():
        raise DavaeError(
            f"{folder} holds adapters, which need their base: use davae.load_adapters(base, autoencoder, folder)"
        )
    for candidate in (folder, folder / "pipeline"):
        if (candidate / "model_index.json").is_file():
            return str(candidate)
    raise DavaeError(f"{folder} holds no pipeline: there is no model_index.json in it or in its folder 'pipeline'")


def load_autoencoder(
    folder_or_repo: str | Path, *, dtype: torch.dtype | Literal["saved"] = torch.float32, variant: str | None = None
) -> AutoencoderDA:
    """Open an :class:`AutoencoderDA`, from its folder or from the hub.

    Args:
        folder_or_repo: the folder, ``user/name``, or ``tiny-upgraded``.
        dtype: of the weights; ``saved`` is that of the folder's files (float32 for a name on the hub and for
            ``tiny-upgraded``).
        variant: of the files, such as ``fp16``; None takes those without one, or the only variant.

    Raises:
        DavaeError: no autoencoder there or one of another class, files that are missing or damaged, or a name that
            cannot be fetched from the hub.
    """
    ours = shipped(folder_or_repo)
    path_or_repo = str(folder_or_repo if ours is None else ours / "vae")
    if ours is not None and dtype == "saved":
        dtype = torch.float32
    if Path(path_or_repo).is_dir() or "/" not in path_or_repo:
        path_or_repo = str(autoencoder_folder(Path(path_or_repo)))
    else:
        path_or_repo = hub_name("autoencoder", path_or_repo)
    with opening("autoencoder", path_or_repo):
        return AutoencoderDA.from_pretrained(
            path_or_repo,
            dtype=saved_dtype(path_or_repo, variant=variant) if dtype == "saved" else dtype,
            variant=variant,
        )


def autoencoder_folder(folder: Path) -> Path:
    """The same folder, if it holds an :class:`AutoencoderDA`.

    Raises:
        DavaeError: it does not; an autoencoder inside it, as in a run or a pipeline, is suggested.
    """
    config = folder / "config.json"
    if not config.is_file():
        inside = [folder / name for name in ("autoencoder", "vae") if (folder / name / "config.json").is_file()]
        hint = f"; did you mean {inside[0]}?" if inside else ""
        there = "it has no config.json" if folder.is_dir() else "it is a file, not a folder"
        missing = there if folder.exists() else "there is no such folder"
        raise DavaeError(f"no autoencoder in {folder}: {missing}{hint}")
    check_descriptions(folder)
    name = read_object(config).get("_class_name")
    if name != AutoencoderDA.__name__:
        raise DavaeError(
            f"{folder} holds a model of class {name}, not an AutoencoderDA: `davae train autoencoder` makes one"
        )
    return folder


def hub_name(what: str, name: str) -> str:
    """The same name, if it is valid on the hub.

    Args:
        what: such as ``pipeline``.
        name: not a folder on this machine.

    Raises:
        DavaeError: it is a file, or a path that does not exist.
    """
    if Path(name).exists():
        raise DavaeError(f"no {what} in {name}: it is a file, not a folder")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise DavaeError(f"no {what} in {name}: there is no such folder") from error
    return name


@contextmanager
def opening(what: str, path_or_repo: str, *, passed: Collection[str] = ()) -> Iterator[None]:
    """Turn what diffusers raises while ``what`` is opened into a DavaeError; a full disk or a lacking permission stays.

    Args:
        what: such as ``pipeline``.
        path_or_repo: a folder, or a name on the hub.
        passed: components that the caller provides, whose folders need not exist.

    Raises:
        DavaeError: files are missing or damaged, a class is not known, or the hub does not provide them. Any other
            ``ValueError`` is raised unchanged.
    """
    try:
        _check_components(what, Path(path_or_repo), passed)
        with _without_fetch_errors():
            yield
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        text = str(error)
        unknown_class = text.startswith("module diffusers has no attribute") or "` has no class `" in text
        if (
            isinstance(error, DavaeError)
            or getattr(error, "errno", None) in _OF_THE_SYSTEM
            or (isinstance(error, AttributeError) and not unknown_class)
            or (isinstance(error, ValueError) and not (unknown_class or isinstance(error, _NOT_JSON)))
        ):
            raise
        reason = first_line(error)
        if unknown_class:
            message = f"the {what} in {path_or_repo} is of a class that diffusers {diffusers.__version__} does not have"
        elif Path(path_or_repo).is_dir():
            message = f"the {what} in {path_or_repo} cannot be read: copy or save it again"
        else:
            message = f"no {what} '{path_or_repo}': there is no such folder"
            absence = None if "safetensors" in reason else _absence(error)
            if absence is not None:
                raise DavaeError(f"{message}, {absence}") from error
            message += ", and the hub does not provide it"
        raise DavaeError(f"{message} ({reason})") from error


def _check_components(what: str, folder: Path, passed: Collection[str]) -> None:
    """Check that a pipeline's folder has all its components, and that what describes them is whole.

    Some loaders of diffusers invent missing components.

    Raises:
        DavaeError: a component named in ``model_index.json`` has no folder, or a description is damaged.
    """
    check_descriptions(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        return
    parts = read_object(index)
    named = [
        name
        for name, value in parts.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if not name.startswith("_") and name not in passed
    ]
    missing = [f"{name}/" for name in named if not (folder / name).is_dir()]
    if missing:
        raise DavaeError(
            f"the {what} in {folder} lacks {', '.join(missing)}, which its model_index.json names: copy or save it "
            "again"
        )
    for name in named:
        check_descriptions(folder / name)


@contextmanager
def _without_fetch_errors() -> Iterator[None]:
    """Suppress the line that diffusers logs about a name it cannot fetch: the error contains the same."""

    def reported_elsewhere(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("An error occurred while trying to fetch")

    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(reported_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(reported_elsewhere)


def _absence(error: BaseException) -> str | None:
    """Why a name was not found on the hub, in words; None if the error has another cause."""
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None:
        chain.append(found)
        found = found.__cause__ or found.__context__
    if any(isinstance(one, RepositoryNotFoundError | RevisionNotFoundError) for one in chain):
        return "it is not in the local cache, and was not found on the hub (or you have no access to it)"
    for one in chain:
        text = str(one).lower()
        if isinstance(one, LocalEntryNotFoundError | ConnectionError) or any(
            words in text for words in ("connect", "not fully cached locally")
        ):
            return "it is not in the local cache, and the hub was not reached; the path of a copy does as well"
    return None
