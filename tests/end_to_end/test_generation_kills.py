"""Two kills of a short run; `python -m tests.end_to_end.generation_kills --count 500` makes five hundred images."""

from tests.end_to_end.generation_kills import generate_and_kill


def test_two_kills_leave_no_trace(tmp_path):
    seen = generate_and_kill(36, 2, tmp_path)
    assert seen["images"] == seen["distinct"] == 36
    assert 0 < seen["images_at_each_kill"][0] < seen["images_at_each_kill"][1] < 36
    assert seen["differing"] == []
    assert seen["figures"]["swd/mean"] > 0
    assert seen["figures"] == seen["figures_undisturbed"]
