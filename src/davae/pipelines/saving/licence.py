"""The licence in a model card; an upgraded model inherits that of its base."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from davae.errors import DavaeError
from davae.recipes.yaml_text import plain_yaml
from davae.runtime.text_files import lines_of, read_text

logger = logging.getLogger(__name__)
_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
"""
HUB_IDS = frozenset(_IDS.split())
"""The hub's ids of licences (hf.co/docs/hub/repositories-licenses), without ``other``."""


@dataclass(frozen=True)
class Licence:
    """A licence in the hub's terms.

    Attributes:
        id: the hub's id, such as ``apache-2.0``; ``other`` if it has none for this licence.
        name: for ``other``: the licence's name.
        link: for ``other``: the address of its text.
    """

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def title(self) -> str:
        """The name; without one, the id."""
        return self.name or self.id

    def front_matter(self) -> dict[str, str]:
        """The entries of a model card's front matter."""
        entries = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in entries.items() if value}


def find_licence(
    base_model: str | Path, given: str | Licence | None = None, *, name: str | None = None, link: str | None = None
) -> Licence:
    """The licence for a model card: the given one, otherwise that in the base's model card.

    The card is the ``README.md`` of a local folder, or of a hub model in the local cache; nothing is downloaded. A
    licence without an id on the hub becomes ``other`` with its name, as the hub requires; name and link, unless given,
    are the base's if its card names the same licence.

    Args:
        base_model: folder or hub name of the base.
        given: the hub's id of a licence, the name of another one, or a :class:`Licence` (returned as is).
        name: the name of a licence without an id on the hub.
        link: the address of its text.

    Raises:
        DavaeError: none is given, and the base's card is absent or names none or several; a name or link is given with
            an id of the hub; two names are given; or ``other`` has no name.
    """
    if isinstance(given, Licence):
        return given
    given = given.lower() if given and given.lower() in (*HUB_IDS, "other") else given
    if given in HUB_IDS:
        if name or link:
            raise DavaeError(
                f"the licence '{given}' is an id of the hub: leave --license-name and --license-link out, or give "
                "--license other with them"
            )
        return Licence(given)
    if given not in (None, "other") and name and given.casefold() != name.casefold():
        raise DavaeError(
            f"the licence has two names, '{given}' (--license) and '{name}' (--license-name): give one of them"
        )
    card = _card_of(base_model)
    entries = read_front_matter(card) if card is not None else {}
    own = _licence_of(base_model, entries)
    if given in (None, "other") and own is not None and (given is None or own.id == given):
        if own.id == "other" and not own.name:
            if given is None and not name:
                raise DavaeError(f"{card} says licence 'other' without a name: give it as name=... (--license-name)")
            link = link or (_inherited_link(own) if name else None)
        elif not name:
            return _as_the_base(own, link)
    named = name or (given if given != "other" else None)
    if named is None:
        if given == "other":
            raise DavaeError("licence 'other' needs a name: give it as name=... (--license-name) too")
        looked = "its model card is not on this machine"
        if card is not None:
            looked = f"{card} names {'several' if entries.get('license') else 'none'}"
        raise DavaeError(
            f"the licence of the base '{base_model}' is not known ({looked}), and a model card must name one: "
            "give it as license='apache-2.0' (--license), as the base's page names it"
        )
    if own is not None and own.title != "other" and named.casefold() in (own.id.casefold(), own.title.casefold()):
        return _as_the_base(own, link)
    if link is None:
        logger.warning(
            "the card has no link to the text of the licence '%s': give its address as link=... (--license-link)",
            named,
        )
    return Licence("other", named, link)


def _as_the_base(own: Licence, link: str | None) -> Licence:
    """The base's licence, with the given link if there is one.

    Raises:
        DavaeError: a link is given with an id of the hub.
    """
    if link and own.id in HUB_IDS:
        raise DavaeError(
            f"the base's licence is '{own.id}', an id of the hub: leave --license-link out, or give "
            "--license other and --license-name as well"
        )
    return Licence(own.id, own.name, link or _inherited_link(own))


def _inherited_link(own: Licence) -> str | None:
    """The base's link if it is an address; None, with a warning, for a file beside the base's card."""
    if own.link is None or "://" in own.link:
        return own.link
    logger.warning(
        "the base's card has the licence '%s' in a file beside it, %s, which is not copied: the new card has no "
        "link to its text. Give its address as link=... (--license-link)",
        own.title,
        own.link,
    )
    return None


def _licence_of(base_model: str | Path, entries: dict[str, Any]) -> Licence | None:
    """The licence in the entries of the base's card; None if they name none or several."""
    link, found, name = (
        str(value[0] if isinstance(value, list) and len(value) == 1 else value) if value else None
        for value in (entries.get("license_link"), entries.get("license"), entries.get("license_name"))
    )
    if found is None or (isinstance(entries["license"], list) and len(entries["license"]) > 1):
        return None
    if link and "://" not in link and not Path(base_model).is_dir():
        link = f"https://huggingface.co/{base_model}/blob/main/{link}"  # a file beside the card on the hub
    if found.lower() in (*HUB_IDS, "other"):
        return Licence(found.lower(), name, link)
    return Licence("other", name or found, link)


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML entries at the head of a model card; empty if it has none, or if they are not a mapping.

    Raises:
        DavaeError: the head is not valid YAML.
    """
    lines = lines_of(read_text(card))
    if not lines or lines[0].strip() != "---" or "---" not in (line.rstrip() for line in lines[1:]):
        return {}
    end = next(i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---")
    try:
        entries = plain_yaml("\n".join(lines[1:end]))
    except ValueError as error:
        raise DavaeError(f"{card}: the entries at its head are not valid YAML: {error}") from error
    return entries if isinstance(entries, dict) else {}


def _card_of(base_model: str | Path) -> Path | None:
    if Path(base_model).is_dir():
        card = Path(base_model) / "README.md"
        return card if card.is_file() else None
    try:
        cached = try_to_load_from_cache(str(base_model), "README.md")
    except HFValidationError:  # not a valid name on the hub
        return None
    return Path(cached) if isinstance(cached, str) else None
