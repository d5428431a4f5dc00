"""Under which licence a model is, as its card says; an upgraded model inherits its base's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from davae.errors import DavaeError


@dataclass(frozen=True)
class Licence:
    """A licence in the hub's terms.

    Attributes:
        id: such as ``apache-2.0``; ``other`` where the hub has no name for it.
        name: for ``other``: what it is called.
        link: for ``other``: where it is written.
    """

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def title(self) -> str:
        """What a person calls it."""
        return self.name or self.id

    def front_matter(self) -> dict[str, str]:
        """The card's entries."""
        entries = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in entries.items() if value}


def find_licence(base_model: str | Path, given: str | Licence | None = None) -> Licence:
    """The licence to name: the given one, else the base's own from its model card.

    The card is the ``README.md`` of a local folder, or of a hub model in the local cache; nothing is downloaded.

    Args:
        base_model: folder or hub name of the base.
        given: what the caller says it is: the hub's name of a licence, or a :class:`Licence`.

    Raises:
        DavaeError: none is given, and no card of the base names one.
    """
    if isinstance(given, Licence):
        return given
    if given:
        return Licence(given)
    card = _card_of(base_model)
    entries = read_front_matter(card) if card is not None else {}
    if not entries.get("license"):
        looked = f"{card} names none" if card is not None else "its model card is not on this machine"
        raise DavaeError(
            f"the licence of the base '{base_model}' is not known ({looked}), and a card without one is not written: "
            "give it as license='apache-2.0' (--license), as the base's page names it"
        )
    link = entries.get("license_link")
    if link and "://" not in str(link) and not Path(base_model).is_dir():
        link = f"https://huggingface.co/{base_model}/blob/main/{link}"  # cards of the hub name a file beside them
    return Licence(str(entries["license"]), entries.get("license_name"), link)


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML entries at the head of a model card; empty where it has none.

    Raises:
        DavaeError: the head is not valid YAML.
    """
    lines = card.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return {}
    end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
    try:
        return yaml.safe_load("\n".join(lines[1:end])) or {}
    except yaml.YAMLError as error:
        raise DavaeError(f"{card}: the entries at its head are not valid YAML: {error}") from error


def _card_of(base_model: str | Path) -> Path | None:
    if Path(base_model).is_dir():
        card = Path(base_model) / "README.md"
        return card if card.is_file() else None
    try:
        cached = try_to_load_from_cache(str(base_model), "README.md")
    except HFValidationError:  # not a name of the hub
        return None
    return Path(cached) if isinstance(cached, str) else None
