"""Tables of images through Hugging Face ``datasets``: a hub name, a saved set, parquet or arrow files.

Columns are found by their type: the image column is the one of type ``Image`` (else bytes under a usual
name), the label the one of type ``ClassLabel`` (else single values under one of ``LABEL_KEYS``), the caption the first
that is not empty of ``CAPTION_KEYS``. Local files never touch the network.
"""

import io
import logging
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from davae.data.images.dataset import Facts
from davae.data.images.decode import UnreadableImage
from davae.data.images.protocol import Skip
from davae.data.sources.facts import CAPTION_KEYS, LABEL_KEYS, NO_CLASS, caption_in, class_names, label_in, named
from davae.data.sources.folder import open_image
from davae.data.sources.parquet import check_arrow, open_parquet, rows_of
from davae.errors import DavaeError, first_line
from davae.runtime.console import shown
from davae.runtime.text_files import read_object

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = frozenset({".parquet", ".arrow"})

_IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo")
_DAMAGE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError),
    *(NotImplementedError, RecursionError, struct.error),
)
_COMMIT = re.compile(r"[/\\]([0-9a-f]{40})[/\\]")


class TableSource:
    """Rows of a ``datasets.Dataset`` with an image column. The id of a row is its number.

    Args:
        table: the data set.
        name: for messages.
        folder: files named by rows must lie in it; ``None`` accepts only rows that contain the bytes.
        commit: of the repository on the hub, if the table was read from one.

    Raises:
        DavaeError: the table is empty or no column holds images.
    """

    def __init__(self, table: Any, name: str, commit: str | None = None, folder: Path | None = None) -> None:
        import datasets

        self.name, self.commit, self._folder = name, commit, folder
        self.problems: list[Skip] = []
        self._fingerprint = table._fingerprint
        if not len(table):
            raise DavaeError(f"{name} has no rows")
        features = table.features
        self._image = _image_column(features, name)
        self._label_columns = _label_columns(features, name)
        self._captions = [column for column in named(features, CAPTION_KEYS) if column != self._image]
        columns = list(dict.fromkeys([*self._captions, *self._label_columns.values()]))
        with _table_errors(name):
            # Bytes, not decoded images: davae decodes them itself.
            self._images = table.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))
            self._texts = table.select_columns(columns).with_format("arrow") if columns else None
            labels, captions = self._read_texts()
        self.classes, numbers = _classes(features, self._label_columns, labels, name)
        self._labels = [-1 if label is None else numbers[label] for label in labels]
        self.summary = f"{len(table)} images, {captions} with a caption"
        if self._captions:
            self.summary += " in column '" + "' or '".join(self._captions) + "'"

    def __len__(self) -> int:
        return len(self._images)

    def id(self, index: int) -> str:
        """The row's number, as text."""
        return str(index)

    def open(self, index: int) -> BinaryIO:
        """The image's bytes, or the local file that the row names."""
        image = self._row(self._images, index)[self._image]
        if image is None:
            raise UnreadableImage("the row holds no image")
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        path = image["path"]
        if not path or "://" in path:
            raise UnreadableImage(f"the row holds no bytes, only the address {path}")
        if self._folder is None:
            raise UnreadableImage("the row holds no bytes, only the name of a file")
        file = (self._folder / path).resolve()
        if not file.is_relative_to(self._folder.resolve()):
            raise UnreadableImage("the row names a file outside the data set's folder")
        return open_image(file)

    def _row(self, table: Any, index: int) -> Any:
        import pyarrow

        try:
            return table[index]
        except (pyarrow.ArrowException, ValueError, UnicodeDecodeError) as error:
            raise UnreadableImage(f"the row is damaged ({error})") from error

    def stamp(self, index: int) -> str:
        """The table's fingerprint, which ``datasets`` derives from its files and how they were loaded."""
        return str(self._fingerprint)

    def facts(self, index: int) -> Facts:
        """The row's class and caption; of several captions, the first."""
        caption = ""
        if self._captions:
            assert self._texts is not None
            caption = self._caption(rows_of(self._row(self._texts, index))[0], str(index))
        return Facts(self._labels[index], caption)

    def _read_texts(self) -> tuple[list[int | str | None], int]:
        """The label of each row, and the number of captions."""
        labels: list[int | str | None] = []
        same: dict[int | str | None, int | str | None] = {}  # one object for each label, not for each row
        captions = 0
        for batch in self._texts.iter(batch_size=10_000) if self._texts is not None else ():
            for row in rows_of(batch):
                keys = {key: row[column] for key, column in self._label_columns.items()}
                label = label_in(keys, f"{self.name}, row {len(labels)}", set())
                captions += bool(self._caption(row, str(len(labels))))
                labels.append(same.setdefault(label, label))
        return labels or [None] * len(self), captions

    def _caption(self, row: dict[str, Any], name: str) -> str:
        """That of a row; one that cannot be read is told once, and is empty."""
        try:
            return caption_in({column: row[column] for column in self._captions})
        except DavaeError as error:
            problem = (name, f"the caption cannot be read ({error})")
            if problem not in self.problems:
                self.problems.append(problem)
            return ""


def open_saved(folder: Path, split: str | None) -> TableSource:
    """A data set written by ``save_to_disk``, one split or several."""
    import datasets

    with _table_errors(str(folder)):
        for state in filter(Path.is_file, (folder / "state.json", *folder.glob("*/state.json"))):
            for part in read_object(state)["_data_files"]:
                check_arrow(state.parent / part["filename"])
        table = datasets.load_from_disk(str(folder))
    return TableSource(_one_split(table, split, str(folder)), str(folder), folder=folder)


def open_tables(files: Sequence[Path], name: str) -> TableSource:
    """Parquet or arrow files, read as one table in the given order."""
    import datasets

    kinds = {f.suffix.lower() for f in files}
    if len(kinds) > 1:
        raise DavaeError(f"{name}: parquet and arrow files are mixed; give one kind")
    with _table_errors(name):
        if kinds == {".parquet"}:
            for file in files:
                open_parquet(file).close()
            table = datasets.Dataset.from_parquet([str(f) for f in files])
        else:
            for file in files:
                check_arrow(file)
            table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    return TableSource(table, name, folder=files[0].parent)


@contextmanager
def _table_errors(name: str) -> Iterator[None]:
    """Turn errors of pyarrow and ``datasets`` about damaged tables into one line that names the table."""
    import datasets
    import pyarrow

    try:
        yield
    except DavaeError:
        raise
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, *_DAMAGE) as error:
        cause = error.__cause__ or error
        raise DavaeError(f"{name} cannot be read as a table: {first_line(cause)}") from error


def open_hub(name: str, split: str | None, revision: str | None = None) -> TableSource:
    """A data set on the Hugging Face hub, ``owner/name`` or ``owner/name:configuration``; downloads once.

    Args:
        name: as above.
        split: which of several splits.
        revision: branch, tag or commit; by default the newest.

    Raises:
        DavaeError: it does not exist, or not at that revision.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    pinned = {} if revision is None else {"revision": revision}
    try:
        table = datasets.load_dataset(repository, configuration or None, **pinned)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, gated
        raise DavaeError(
            f"'{name}' is not a local folder or file, and as a data set on the Hugging Face hub it cannot be "
            f"loaded: {error}"
        ) from error
    chosen = _one_split(table, split, name)
    return TableSource(chosen, name, commit_of(chosen), folder=Path(datasets.config.HF_CACHE_HOME))


def commit_of(table: Any) -> str | None:
    """The commit on the hub that a table was made from, 40 hexadecimal digits; ``None`` if unknown.

    ``datasets`` keeps the tables of each commit in a folder named after it.
    """
    for file in table.cache_files:
        found = _COMMIT.search(str(file["filename"]))
        if found:
            return found.group(1)
    return None


def _one_split(table: Any, split: str | None, name: str) -> Any:
    import datasets

    if not isinstance(table, datasets.DatasetDict):
        return table
    if split in table:
        return table[split]
    if len(table) == 1 and split in (None, "train"):
        return next(iter(table.values()))
    raise DavaeError(f"{name} has no split '{split}'; it has {', '.join(table)}")


def _find(features: Any, preferred: Sequence[str], wanted: Any) -> str | None:
    """The column whose type satisfies ``wanted``; of several, one with a preferred name, else the first."""
    columns = [name for name, feature in features.items() if wanted(feature)]
    return next(iter(named(columns, preferred)), columns[0] if columns else None)


def _image_column(features: Any, name: str) -> str:
    import datasets

    column = _find(features, _IMAGE_NAMES, lambda f: isinstance(f, datasets.Image))
    if column is None:
        # A table written without datasets: {"bytes": ..., "path": ...} or plain bytes.
        column = _find(features, _IMAGE_NAMES, lambda f: isinstance(f, dict) and {"bytes", "path"} == set(f))
    if column is None:
        binary = [n for n, f in features.items() if getattr(f, "dtype", None) in {"binary", "large_binary"}]
        column = next(iter(named(binary, _IMAGE_NAMES)), None)
    if column is None:
        raise DavaeError(
            f"{name} has no image column: columns are {', '.join(features)}; one must be of type Image, or "
            f"hold image files as bytes under one of the names {', '.join(_IMAGE_NAMES)}"
        )
    return column


def _label_columns(features: Any, name: str) -> dict[str, str]:
    """Columns of labels by their keys: the one of type ``ClassLabel``, else single values under the usual names."""
    import datasets

    column = _find(features, LABEL_KEYS, lambda f: isinstance(f, datasets.ClassLabel))
    if column is not None:
        return {LABEL_KEYS[0]: column}
    single = named([n for n, f in features.items() if isinstance(f, datasets.Value)], LABEL_KEYS)
    if not single and (several := named(features, LABEL_KEYS)):
        logger.warning(NO_CLASS, shown(name), shown(several[0]))
    return {column: column for column in single}


def _classes(
    features: Any, columns: dict[str, str], labels: list[int | str | None], name: str
) -> tuple[list[str], dict[int | str, int]]:
    """Class names, and the class number of each label that occurs."""
    import datasets

    column = next(iter(columns.values()), None)
    feature = None if column is None else features[column]
    if not isinstance(feature, datasets.ClassLabel):
        return class_names(labels, name)
    numbers: dict[int | str, int] = {i: i for i in range(feature.num_classes)}
    strange = next((label for label in labels if label is not None and label not in numbers), None)
    if strange is not None:
        count = feature.num_classes
        raise DavaeError(f"{name}, column '{column}': there are {count} classes, and a row has the number {strange}")
    return list(feature.names), numbers
