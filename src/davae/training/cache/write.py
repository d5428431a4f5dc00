"""Caches of latents and text embeddings: writing one, as ``davae cache`` does, and opening it for training."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch.utils.data import DataLoader

from davae.data import ImageDataset, RenderedDataset, SkipLedger
from davae.data.cache import LATENTS, TEXTS, CacheWriter, Format, LatentCache, Record, caption_key
from davae.data.cache.index import read_index
from davae.data.images.buckets import same_size_batches
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines.families import PROMPTS_TOGETHER, PipelineFamily, family_of
from davae.recipes.data import DataSettings
from davae.runtime.atomic_files import disk_full_as_error
from davae.runtime.pixel_budget import images_together
from davae.runtime.places import claim
from davae.runtime.processes import (
    UNEVEN_WAIT,
    everyone,
    loader_workers,
    rank_and_world,
    start_processes,
    wait_for_everyone,
)
from davae.runtime.progress import Progress
from davae.training.cache.fingerprint import cache_fingerprint, pipeline_parts, version_of, without_touched
from davae.training.data import open_training_part, require_captions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheResult:
    """What a cache holds: numbers of images, latents (mirrored ones too) and prompts, and the size of its shards."""

    folder: Path
    images: int
    entries: int
    texts: int
    nbytes: int


def write_cache(
    data: DataSettings,
    vae: AutoencoderDA | AutoencoderKL,
    pipe: DiffusionPipeline,
    out: str | Path,
    *,
    form: Format = "safetensors",
    text_length: int | None = None,
    details_seed: int | None = None,
    reopen: Callable[[], DiffusionPipeline] | None = None,
    **writer_options: int,
) -> CacheResult:
    """Encode the training images of a recipe, and their captions, into a folder; continues an interrupted run.

    Under a launcher (torchrun, accelerate) the work is divided: each process writes its own shards, and the first one
    merges their indices. A run may continue with another number of processes.

    With ``data.flip`` each image is stored as it is and mirrored. Captions are stored once however many images
    have them, together with the empty prompt for dropout.

    Args:
        data: the recipe's section; ``data.cache`` is not read.
        vae: the upgraded autoencoder, or the base's to train the base on.
        pipe: the base or the upgraded pipeline, with its text encoders; weights of its other parts are not used.
        out: the folder.
        form: ``safetensors`` or ``webdataset``.
        text_length: tokens of a prompt; by default the family's.
        details_seed: draw the details with this seed; by default their mean is written.
        reopen: opens ``pipe`` again; its text encoders are then not kept in memory while images are encoded.
        writer_options: ``shard_bytes`` and ``shard_records`` of :class:`CacheWriter`.

    Raises:
        DavaeError: the images cannot be cached, ``out`` holds another cache or other files, or the disk is full.
    """
    family = family_of(pipe)
    processes = start_processes(timeout=UNEVEN_WAIT)
    images = open_training_part(data.model_copy(update={"flip": False}), vae, pipe)
    if family.conditioned_on == "text":
        require_captions(images.captions(), pipe)
    fingerprint = cache_fingerprint(
        data, vae, pipe, images, text_length=text_length, details_seed=details_seed, version=version_of(Path(out))
    )
    if (Path(out) / "fingerprint.json").is_file():
        fingerprint = without_touched(fingerprint, Path(out), images)
    wait_for_everyone()  # only now may the first process write another fingerprint
    about = {
        "classes": images.classes,
        "skipped": [list(entry) for entry in images.skipped],
        "in_buckets": images.bucket_of is not None,
    }
    rank, world = rank_and_world()
    kept = "The shards that were written are whole"
    with disk_full_as_error(Path(out), kept), _locked(Path(out), first=rank == 0):
        with processes.main_process_first():
            writer = CacheWriter(
                out,
                fingerprint,
                form=form,
                about=about,
                captions=lambda: {name: caption for name, (_, _, caption) in images.stamps().items()},
                rank=rank,
                world_size=world,
                **writer_options,
            )
        if not writer.complete:
            if reopen is not None:  # text encoders were needed for the fingerprint, and are again for captions
                pipe.register_modules(**{name: None for name, _ in pipeline_parts(pipe, "text_encoder")})
            _write_latents(writer, images, data, vae, family, processes.device, details_seed)
            texts = 0
            if family.conditioned_on == "text":
                encoders = pipe if reopen is None else reopen()
                texts = _write_texts(writer, encoders, family, processes.device, text_length)
            wait_for_everyone()
            if rank == 0:
                writer.finish({"images": len(images), "texts": texts})
        wait_for_everyone()
    index = read_index(Path(out))
    assert index.complete is not None
    return CacheResult(
        Path(out),
        index.complete["images"],
        sum(line["shard"].startswith(LATENTS) for line in index.records),
        index.complete["texts"],
        sum(shard["bytes"] for shard in index.shards.values()),
    )


def open_cache(
    data: DataSettings,
    vae: AutoencoderDA | AutoencoderKL,
    pipe: DiffusionPipeline,
    *,
    text_length: int | None = None,
    details_seed: int | None = None,
) -> LatentCache:
    """Open the cache at ``data.cache``, checking that it was made of exactly these images by exactly these models.

    Raises:
        DavaeError: it was not (the message names what differs), or it is unset, unfinished or damaged.
    """
    if data.cache is None:
        raise DavaeError("data.cache is not set: name the folder that `davae cache` wrote")
    images = open_training_part(data, vae, pipe)
    folder = Path(data.cache)
    wanted = cache_fingerprint(
        data, vae, pipe, images, text_length=text_length, details_seed=details_seed, version=version_of(folder)
    )
    return LatentCache(data.cache, wanted=without_touched(wanted, folder, images))


@torch.no_grad()
def _write_latents(
    writer: CacheWriter,
    images: ImageDataset | RenderedDataset,
    data: DataSettings,
    vae: AutoencoderDA | AutoencoderKL,
    family: PipelineFamily,
    device: torch.device,
    details_seed: int | None,
) -> None:
    mirrored = (False, True) if data.flip else (False,)
    done = writer.positions
    missing = [i for i in range(len(images)) if any((i, flip) not in done for flip in mirrored)]
    rank, world = rank_and_world()
    largest = max(data.resolutions)
    together = images_together(largest, largest)  # buckets have about as many pixels
    parts = list(same_size_batches(images, missing, together))[rank::world]
    loader = DataLoader(
        images,
        batch_sampler=parts,
        num_workers=loader_workers(data.workers),
        collate_fn=list,
        generator=torch.Generator(),
    )
    ledger = SkipLedger.for_dataset(images)
    before, training = vae.device, vae.training
    vae.to(device).eval()
    before_this_run, mine = len(images) - len(missing), sum(map(len, parts))
    with Progress("latents", before_this_run + mine, before_this_run, enabled=rank == 0) as progress:
        for positions, items in zip(parts, loader, strict=True):
            pixels = torch.stack([item["image"] for item in items])  # [B, 3, H, W]
            latents = {
                flip: family.latents_of(
                    vae, pixels.flip(-1) if flip else pixels, details_seed=details_seed
                )  # [B, C + D, h, w]
                for flip in mirrored
            }
            for row, (position, item) in enumerate(zip(positions, items)):
                ledger.add(item["skipped"])
                for flip in mirrored:
                    if (position, flip) in done:
                        continue
                    facts = _facts(images, position, flip, item)
                    record = Record(writer.key_for(position, flip), {"latent": latents[flip][row]}, facts)
                    writer.add(LATENTS, record)
                progress.advance()
    writer.flush()
    vae.to(before).train(training)
    for entries in everyone(ledger.entries):
        ledger.add(entries)
    if ledger.count and rank == 0:
        logger.warning(ledger.summary())


def _write_texts(
    writer: CacheWriter,
    pipe: DiffusionPipeline,
    family: PipelineFamily,
    device: torch.device,
    text_length: int | None,
) -> int:
    rank, world = rank_and_world()
    known = [(line["position"], line["caption"]) for line in writer.index.records if "caption" in line]
    captions = ["", *(caption for _, caption in sorted({pair for part in everyone(known) for pair in part}))]
    distinct = {caption_key(c): c for c in captions}
    missing = [c for key, c in distinct.items() if key not in writer.done[TEXTS]]
    if rank == 0:
        family.tell_cut_prompts(pipe, missing, text_length)
    parts = list(_parts(missing, PROMPTS_TOGETHER))[rank::world]
    encoders = dict(pipeline_parts(pipe, "text_encoder"))
    places = {name: module.device for name, module in encoders.items()}
    for module in encoders.values():
        module.to(device)
    before_this_run, mine = len(distinct) - len(missing), sum(map(len, parts))
    with Progress("captions", before_this_run + mine, before_this_run, enabled=rank == 0) as progress:
        for part in parts:
            encoded = family.encode_prompts(pipe, part, max_length=text_length)
            for row, caption in enumerate(part):
                tensors = {name: value[row] for name, value in encoded.items()}
                writer.add(TEXTS, Record(caption_key(caption), tensors, {"text": caption}))
                progress.advance()
    writer.flush()
    for name, module in encoders.items():
        module.to(places[name])
    return len(distinct)


def _locked(folder: Path, *, first: bool) -> AbstractContextManager[object]:
    """Keep other runs from writing this cache; the first of a run's processes holds the lock for all of them."""
    if not first:
        return nullcontext()
    return claim(folder, "cache")


def _facts(images: ImageDataset | RenderedDataset, position: int, flip: bool, item: dict[str, Any]) -> dict[str, Any]:
    numbers = images.bucket_of
    height, width = item["image"].shape[-2:]
    facts: dict[str, Any] = {
        "position": position,
        "flip": flip,
        "id": item["id"],
        "label": item["label"],
        "caption": item["caption"],
        "caption_hash": caption_key(item["caption"]),
        "size": [width, height],
        "bucket": 0 if numbers is None else numbers[position],
        "skipped": [list(entry) for entry in item["skipped"]],
    }
    if item["id"] != images.id(position):
        facts["asked"] = images.id(position)  # another image replaces an unreadable one
    elif isinstance(images, ImageDataset):
        facts["content"] = images.content_hash(position)
    return facts


def _parts(values: Sequence[str], size: int) -> Iterator[list[str]]:
    for first in range(0, len(values), size):
        yield list(values[first : first + size])
