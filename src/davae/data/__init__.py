"""Data sets of images from folders, tables, shards or the hub, and samplers whose order can be resumed."""

from davae.data.cache import Fingerprint, LatentCache
from davae.data.images.buckets import make_buckets
from davae.data.images.dataset import Facts, ImageDataset, Source
from davae.data.images.decode import UnreadableImage, check_header, decode_image
from davae.data.images.protocol import DatasetWrapper, Item, ItemDataset, Mirrored, as_item_dataset
from davae.data.images.transforms import SquareCrop, image_to_tensor, item_generator
from davae.data.loading.samplers import BucketSampler, ResumableSampler
from davae.data.loading.stream import BatchStream, collate, read_items
from davae.data.open import choose_part, find_source, open_dataset
from davae.data.scenes import CLASSES, ProceduralScenes, render_scene
from davae.data.sources.bad_files import SkipLedger
from davae.data.sources.folder import IMAGE_SUFFIXES, FolderSource
from davae.data.sources.scenes import RenderedDataset
from davae.data.sources.tables import TableSource
from davae.data.sources.webdataset import ShardSource

__all__ = [
    "CLASSES",
    "IMAGE_SUFFIXES",
    "BatchStream",
    "BucketSampler",
    "DatasetWrapper",
    "Facts",
    "Fingerprint",
    "FolderSource",
    "ImageDataset",
    "Item",
    "ItemDataset",
    "LatentCache",
    "Mirrored",
    "ProceduralScenes",
    "RenderedDataset",
    "ResumableSampler",
    "ShardSource",
    "SkipLedger",
    "Source",
    "SquareCrop",
    "TableSource",
    "UnreadableImage",
    "as_item_dataset",
    "check_header",
    "choose_part",
    "collate",
    "decode_image",
    "find_source",
    "image_to_tensor",
    "item_generator",
    "make_buckets",
    "open_dataset",
    "read_items",
    "render_scene",
]
