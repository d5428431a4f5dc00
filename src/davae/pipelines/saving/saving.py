"""Saving upgraded pipelines for use with and without davae, and publishing what was saved."""

import copy
import logging
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from davae.errors import DavaeError, first_line
from davae.models import AutoencoderDA
from davae.pipelines.lora import attached_lora, merge_lora
from davae.pipelines.saving.licence import Licence, find_licence, read_front_matter
from davae.pipelines.saving.model_card import CARD, Making, write_model_card
from davae.pipelines.saving.publishing import cut_names
from davae.runtime.places import claim
from davae.warm_start.plain_state import unwrapped

logger = logging.getLogger(__name__)
_THE_HUBS_OWN = (".git", ".cache", ".gitattributes")


def save_pipeline(
    pipe: DiffusionPipeline,
    folder: str | Path,
    *,
    base_model: str,
    license: str | Licence | None = None,
    making: Making | None = None,
    name: str | None = None,
) -> Path:
    """Write a pipeline as a folder with a model card, a LoRA merged into the weights.

    Without a LoRA, ``pipe.save_pretrained(folder)`` writes everything that loading needs, including the code for use
    without davae. This function adds the card, and merges a LoRA into a copy of the transformer; ``pipe`` is not
    changed.

    Args:
        pipe: an upgraded pipeline.
        folder: new, empty, or one of an upgraded pipeline, which is replaced atomically; its other files are kept.
        base_model: hub name or folder of the base.
        license: of the result; the base's own if None.
        making: figures and commands for the card.
        name: under which the result will be published; the folder's name if None.

    Returns:
        The folder.

    Raises:
        DavaeError: the licence is not known, the pipeline is not upgraded, its LoRA is switched off or weighted
            differently in different layers, or the folder contains something else, such as the base. Nothing is
            written then.
    """
    if not isinstance(unwrapped(getattr(pipe, "vae", None)), AutoencoderDA):
        raise DavaeError(f"this {type(pipe).__name__} is not upgraded: save it with its own save_pretrained")
    licence = find_licence(base_model, license)
    tuned = pipe.transformer
    try:
        if attached_lora(tuned) is not None:
            merged = copy.deepcopy(unwrapped(tuned))
            merge_lora(merged)
            pipe.transformer = merged
        with claim(folder, "pipeline") as inside:
            pipe.save_pretrained(inside)
            for config in inside.rglob("*.json"):
                cut_names(config)
            title = name or Path(folder).resolve().name
            write_model_card(inside, base_model=base_model, license=licence, making=making, name=title)
    finally:
        pipe.transformer = tuned
    return Path(folder)


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Publish the whole folder of a saved pipeline, autoencoder or adapters as a model on the hub.

    Its files are logged before the upload. Paths of origin in JSON files are shortened in place to their last part.

    Args:
        folder: with a model card that names a licence.
        repo_id: ``user/name``; created if it does not exist.
        private: for a new repository; the account's default if None.
        token: of the hub; that of `hf auth login` if None.

    Returns:
        The address of the commit.

    Raises:
        DavaeError: there is no card, it names no licence, a JSON file is not valid, a file is a link or hidden, or the
            hub is out of reach or refuses.
    """
    folder = Path(folder)
    card = folder / CARD
    if not card.is_file() or not read_front_matter(card).get("license"):
        raise DavaeError(
            f"{folder} has no model card that names a licence: write one with davae.write_model_card, or use "
            "davae.save_pipeline"
        )
    files = []
    for path in (folder, *sorted(folder.rglob("*"))):
        hidden = [part for part in path.relative_to(folder).parts if part.startswith(".")]
        if hidden and hidden[0] in _THE_HUBS_OWN:
            continue
        if hidden or (path.is_symlink() and path != folder):
            kind = "a link" if path.is_symlink() else "hidden"
            raise DavaeError(
                f"{path} is {kind}, which is not published: remove it from the folder, or replace it by a plain copy"
            )
        if path.is_file():
            files.append(path)
    for file in files:
        cut_names(file)
    shown = "\n".join(f"  {file.relative_to(folder).as_posix()}, {file.stat().st_size:,} bytes" for file in files)
    logger.info("publishing as %s:\n%s", repo_id, shown)
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        message = "Upload a model made with davae"
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # of the hub, of its network library, of names
        raise DavaeError(
            f"{folder} is written, and was not published as {repo_id}: {first_line(error)} (log in with `hf auth "
            f"login`, then publish it with `hf upload {repo_id} {folder}`)"
        ) from error
    return str(commit.commit_url)
