"""The fingerprint of a recipe's cache: everything that determines its latents and embeddings."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from davae.data import ImageDataset, RenderedDataset
from davae.data.cache import Fingerprint, SourceFact, caption_key, plain_config, value_hash, weights_hash
from davae.data.cache.index import read_index
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines.families import family_of
from davae.recipes.data import DataSettings
from davae.training.data import bucket_sizes, token_side

logger = logging.getLogger(__name__)

VERSION = 3
"""Of fingerprints. In the first one a weight's hash depended on the precision in which it was read; the first two
name a scene by its number, without label and caption."""


def cache_fingerprint(
    data: DataSettings,
    vae: AutoencoderDA | AutoencoderKL,
    pipe: DiffusionPipeline,
    images: ImageDataset | RenderedDataset,
    *,
    text_length: int | None = None,
    details_seed: int | None = None,
    version: int = VERSION,
) -> Fingerprint:
    """The fingerprint of a cache of these images by these models.

    Args:
        data: the recipe's section.
        vae: the autoencoder, with its detail statistics in its configuration.
        pipe: the base or the upgraded pipeline, for its text encoders.
        images: the training part.
        text_length: tokens of a prompt; by default the family's.
        details_seed: of the details' draws; by default their mean is cached.
        version: of the cache that it is compared with, see :func:`version_of`.

    Raises:
        DavaeError: ``data.crop`` is ``random``: the crops differ every time.
    """
    if data.crop == "random":
        raise DavaeError(
            "data.crop=random takes another crop of an image each time, so random crops cannot be cached; "
            "set data.crop=center, or train from images without data.cache"
        )
    family = family_of(pipe)
    by_side = bucket_sizes(data, None if data.of_one_size else token_side(vae, pipe))
    sizes = None if by_side is None else [size for sizes in by_side.values() for size in sizes]
    facts: dict[str, Any] = {
        "version": version,
        "pipeline family": family.name,
        "vae class": type(vae).__name__,
        "vae weights": weights_hash(vae, by_dtype=version == 1),
        "vae config": _without_added_keys(plain_config(vae.config)),
        "data": {
            "resolution": data.resolution,
            "crop": data.crop,
            "flip": data.flip,
            "buckets": None if sizes is None else [list(size) for size in sizes],
        },
        "dtype": data.cache_dtype,
    }
    if len(data.resolutions) > 1:
        facts["data"]["more resolutions"] = [[Path(one.path).name, one.resolution] for one in data.more]
    if details_seed is not None:
        facts["seed of the details' draws"] = details_seed
    if family.conditioned_on == "text":
        facts |= {"text length": text_length or family.text_length, **_text_facts(pipe, by_dtype=version == 1)}
    stamps = images.stamps()
    if version < 3 and isinstance(images, RenderedDataset):
        stamps = {f"procedural/{name.rpartition('/')[2]}": (stamp, -1, "") for name, (stamp, *_) in stamps.items()}
    sources = {name: SourceFact(stamp, label, caption_key(text)) for name, (stamp, label, text) in stamps.items()}
    return Fingerprint(facts, sources)


_BEFORE = {"down_method": "unshuffle", "absent_details": "zero", "enlarged_details": 0}
"""What autoencoders have that were saved before these keys came."""


def _without_added_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, of all levels, without the keys that came later, where they say what was so before."""
    kept = {key: value for key, value in config.items() if key not in _BEFORE or value != _BEFORE[key]}
    return {key: _without_added_keys(value) if key == "base_config" else value for key, value in kept.items()}


def version_of(folder: Path) -> int:
    """The version of the fingerprint of the cache in ``folder``; the current one if there is no cache."""
    if not (folder / "fingerprint.json").is_file():
        return VERSION
    return int(Fingerprint.load(folder).facts.get("version", VERSION))


def without_touched(wanted: Fingerprint, folder: Path, images: ImageDataset | RenderedDataset) -> Fingerprint:
    """The wanted fingerprint, with the stamps of the cache in ``folder`` for files whose contents are unchanged.

    Copied files have new times of change and the same bytes: if only the stamp differs, contents are compared.
    """
    if isinstance(images, RenderedDataset):
        return wanted
    cached = Fingerprint.load(folder).sources
    differing = {n for n, fact in wanted.sources.items() if n in cached and cached[n].stamp != fact.stamp}
    if not differing:
        return wanted
    logger.info("%d files have another modification time than in the cache: comparing contents", len(differing))
    contents = {line["id"]: line.get("content") for line in read_index(folder).records if "id" in line}
    sources = dict(wanted.sources)
    for index in range(len(images)):
        name = images.id(index)
        if name in differing and contents.get(name) == images.content_hash(index):
            sources[name] = sources[name]._replace(stamp=cached[name].stamp)
    return replace(wanted, sources=sources)


def pipeline_parts(pipe: DiffusionPipeline, prefix: str) -> Iterator[tuple[str, Any]]:
    """Name and part for the parts of a pipeline whose names begin with ``prefix``; text encoders only if modules."""
    for name, part in sorted(pipe.components.items()):
        if name.startswith(prefix) and part is not None:
            if prefix == "text_encoder" and not isinstance(part, nn.Module):
                continue
            yield name, part


def _text_facts(pipe: DiffusionPipeline, *, by_dtype: bool) -> dict[str, Any]:
    """Hashes of everything that turns a prompt into embeddings."""
    facts: dict[str, Any] = {}
    for name, module in pipeline_parts(pipe, "text_encoder"):
        config = plain_config(module.config.to_dict())
        for key in ("transformers_version", "torch_dtype", "dtype"):
            config.pop(key, None)
        facts[name] = {"weights": weights_hash(module, by_dtype=by_dtype), "config": value_hash(config)}
    for name, tokenizer in pipeline_parts(pipe, "tokenizer"):
        facts[name] = value_hash([type(tokenizer).__name__, _tokenizer_state(tokenizer)])
    return facts


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary, merges and normalisation, without the truncation and padding of a fast tokenizer's last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"vocabulary": tokenizer.get_vocab()}
    state: dict[str, Any] = json.loads(backend.to_str())
    return {k: v for k, v in state.items() if k not in {"truncation", "padding"}}
