from __future__ import annotations

import pytest

from davae.data import choose_part
from davae.errors import DavaeError

NAMES = [f"class/{i}.jpg" for i in range(1000)]


def test_parts_are_disjoint_complete_and_of_the_right_size() -> None:
    train, held = choose_part(NAMES, 0.1, "train"), choose_part(NAMES, 0.1, "held_out")
    assert sorted(train + held) == list(range(1000))
    assert 70 < len(held) < 130
    assert len(choose_part(NAMES, 25, "held_out")) == 25


def test_adding_images_moves_none() -> None:
    def names(count: int) -> set[str]:
        return {NAMES[i] for i in choose_part(NAMES[:count], 0.1, "held_out")}

    assert names(500) == names(1000) & set(NAMES[:500])
    shuffled = NAMES[::-1]
    assert names(1000) == {shuffled[i] for i in choose_part(shuffled, 0.1, "held_out")}


def test_small_sets_keep_one_on_either_side() -> None:
    for count in range(2, 12):
        assert len(choose_part(NAMES[:count], 0.001, "held_out")) == 1
        assert len(choose_part(NAMES[:count], 0.999, "train")) == 1


def test_impossible_requests() -> None:
    for hold_out, part, message in [
        (-0.1, "train", "share below 1 or a whole number"),
        (1.5, "train", "share below 1 or a whole number"),
        (1000, "train", "only 1000 images: set it to at most 999"),
        (0.1, "test", "known are train, held_out"),
    ]:
        with pytest.raises(DavaeError, match=message):
            choose_part(NAMES, hold_out, part)  # type: ignore[arg-type]
    with pytest.raises(DavaeError, match="hold_out is 1 and there are only 1 images: set it to 0"):
        choose_part(["a"], 1, "train")


@pytest.mark.parametrize(("count", "hold_out"), [(1, 0.5), (1, 0), (1000, 0)])
def test_nothing_held_out_is_a_set_without_images(count: int, hold_out: float) -> None:
    assert choose_part(NAMES[:count], hold_out, "held_out") == []
    assert choose_part(NAMES[:count], hold_out, "train") == list(range(count))
