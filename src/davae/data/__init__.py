"""Images from wherever people keep them, as square tensors in an order that can be resumed."""

from davae.data.bucket_sampler import BucketSampler
from davae.data.buckets import make_buckets
from davae.data.cache import Fingerprint, LatentCache
from davae.data.dataset import Facts, ImageDataset, Source
from davae.data.decode import UnreadableImage, check_header, decode_image
from davae.data.folder import IMAGE_SUFFIXES, FolderSource
from davae.data.hub import TableSource
from davae.data.images.protocol import DatasetWrapper, Item, ItemDataset, as_item_dataset
from davae.data.loader import BatchStream, ResumableSampler, collate, make_loader, read_items
from davae.data.mirroring import Mirrored
from davae.data.procedural import CLASSES, ProceduralScenes, render_scene
from davae.data.rendered import RenderedDataset
from davae.data.shards import ShardSource
from davae.data.skips import SkipLedger
from davae.data.sources import find_source, open_dataset
from davae.data.splits import choose_part
from davae.data.transforms import SquareCrop, image_to_tensor, item_generator, resize_short_side

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
    "make_loader",
    "open_dataset",
    "read_items",
    "render_scene",
    "resize_short_side",
]
