"""Latents and text embeddings on disk, with a fingerprint of what they were computed from."""

from davae.data.cache.fingerprint import Fingerprint, SourceFact, caption_key, plain_config, value_hash, weights_hash
from davae.data.cache.index import verify_cache
from davae.data.cache.reader import LatentCache
from davae.data.cache.shards import Format, Record
from davae.data.cache.writer import LATENTS, TEXTS, CacheWriter

__all__ = [
    "LATENTS",
    "TEXTS",
    "CacheWriter",
    "Fingerprint",
    "Format",
    "LatentCache",
    "Record",
    "SourceFact",
    "caption_key",
    "plain_config",
    "value_hash",
    "verify_cache",
    "weights_hash",
]
