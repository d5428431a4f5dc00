from __future__ import annotations

import pytest

from davae.data import SkipLedger
from davae.errors import DavaeError


def test_each_file_counts_once_and_survives_a_checkpoint() -> None:
    ledger = SkipLedger(100)
    ledger.add([("b.png", "damaged"), ("a.png", "too small")])
    ledger.add([("b.png", "damaged again")])
    assert ledger.entries == [("a.png", "too small"), ("b.png", "damaged")]
    other = SkipLedger(100, [("c.png", "not an image")])
    other.load_state_dict(ledger.state_dict())
    assert other.count == 3


def test_summary_names_twenty() -> None:
    ledger = SkipLedger(100)
    assert ledger.summary() == "no file was skipped"
    ledger.add([("0.png", "why")])
    assert ledger.summary() == "1 file was skipped:\n  0.png: why"
    ledger.add([(f"{i:02d}.png", "why") for i in range(1, 26)])
    lines = ledger.summary().splitlines()
    assert lines[0] == "26 files were skipped:"
    assert len(lines) == 22
    assert lines[-1] == "  and 6 more"


def test_more_than_half_is_an_error_and_half_is_not() -> None:
    ledger = SkipLedger(4)
    ledger.add([("a", "r"), ("b", "r")])
    ledger.check()
    with pytest.raises(DavaeError, match=r"3 of 4 images .* more than half"):
        ledger.add([("c", "r")])
