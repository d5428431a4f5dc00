"""Subjects of generated images: prompts from benchmarks' files, or classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from davae.errors import DavaeError
from davae.pipelines.sampling.generate import read_prompts
from davae.runtime.atomic_files import file_hash
from davae.runtime.text_files import lines_of, parse_json, read_text

GENEVAL_SAMPLES = 4
"""Images per prompt in GenEval."""


@dataclass(frozen=True)
class PromptSet:
    """Subjects in a fixed order; image ``i`` of a run has subject ``i % len(subjects)``.

    Attributes:
        kind: their origin.
        subjects: prompts, or class numbers as text.
        metadata: one entry per prompt, of GenEval files.
        categories: of each prompt, reported separately; empty, or with empty names, if there are none.
        sha256: of the file, or of the captions; empty for classes.
    """

    kind: Literal["lines", "mjhq", "geneval", "captions", "classes"]
    subjects: Sequence[str]
    metadata: Sequence[dict[str, Any]] = ()
    sha256: str = ""
    categories: Sequence[str] = ()

    def subject(self, index: int) -> str:
        """Subject of image ``index``."""
        return self.subjects[index % len(self.subjects)]

    def category(self, index: int) -> str:
        """Category of image ``index``; empty if there is none."""
        return self.categories[index % len(self.categories)] if self.categories else ""

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        return {"kind": self.kind, "subjects": len(self.subjects), "sha256": self.sha256}


def class_set(classes: int) -> PromptSet:
    """Every class in turn, so that a run of a multiple of ``classes`` images is balanced."""
    return PromptSet("classes", [str(number) for number in range(classes)])


def open_prompt_set(file: str | Path) -> PromptSet:
    """Read a file of prompts; its format is known from its extension.

    * ``.json``: ``{"name": {"prompt": ..., "category": ...}, ...}``, as MJHQ-30K's ``meta_data.json``;
    * ``.jsonl``: one object per line with ``prompt``, as GenEval's ``evaluation_metadata.jsonl``; its ``tag``, the
      task, is the category;
    * else text, one prompt per line; empty lines and lines that begin with # do not count.

    Raises:
        DavaeError: the file cannot be read, or is not of its form.
    """
    path = Path(file)
    ending = path.suffix.lower()
    if ending not in (".json", ".jsonl"):
        return PromptSet("lines", read_prompts(path), sha256=file_hash(path))
    try:
        text = read_text(path)
    except (OSError, DavaeError) as error:
        raise DavaeError(f"cannot read the prompts in {path}: {error}") from error
    if ending == ".json":
        entries = _parsed(text, f"{path}")
        if not isinstance(entries, dict):
            raise DavaeError(f'{path}: an object {{"name": {{"prompt": ...}}}} is needed, as in MJHQ-30K')
        found = [_prompt(entry, f"{path}, entry '{name}'") for name, entry in entries.items()]
        categories = _categories(list(entries.values()), "category")
        result = PromptSet("mjhq", found, sha256=file_hash(path), categories=categories)
    else:
        lines = [(i, line) for i, line in enumerate(lines_of(text), 1) if line.strip()]
        rows = [_parsed(line, f"{path}, line {i}") for i, line in lines]
        found = [_prompt(row, f"{path}, line {i}") for (i, _), row in zip(lines, rows, strict=True)]
        result = PromptSet("geneval", found, rows, file_hash(path), _categories(rows, "tag"))
    if not found:
        raise DavaeError(f"{path} holds no prompt")
    return result


def _parsed(text: str, where: str) -> Any:
    return parse_json(text, where)


def _categories(entries: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The categories of all entries; empty if no entry has one."""
    found = [str(entry.get(key, "")) for entry in entries]
    return found if any(found) else []


def _prompt(entry: Any, where: str) -> str:
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DavaeError(f"{where}: no 'prompt'")
    return prompt
