"""The progress line: what it always shows, and what it shows where there is room."""

import torch

from davae.runtime.pictures import image_grid
from davae.runtime.progress import Progress


def _progress(name="a stage with a long name, level 2 of 3"):
    progress = Progress(name, 100_000, 12_000, images=32, enabled=False)
    progress.done = 12_500
    progress.losses({"total": 0.12345, "learning_rate": 1.0, "reconstruction": 0.1, "alignment": 2.0})
    return progress


def test_count_and_time_left_are_shown_on_any_width():
    for width in (40, 60, 80, 120, 200):
        line = _progress().line(1000.0, width)
        assert "12500/100000  2d 00:36:40 left" in line
        assert len(line) <= width


def test_a_wide_line_has_rates_losses_memory_and_a_bar():
    line = _progress("stage").line(1000.0, 200)
    for part in ("2.00 s/step", "16 images/s", "total 0.1235", "reconstruction 0.1", " GB", "━━╌"):
        assert part in line
    assert "learning_rate" not in line
    narrow = _progress("stage").line(1000.0, 80)
    assert "2.00 s/step  16 images/s" in narrow


def test_the_end_and_a_fast_loop():
    progress = Progress("short", 4, enabled=False)
    progress.done = 4
    assert progress.line(2.0, 80).startswith("short 4/4  0:00 left  2.00 steps/s")


def test_labels_stand_below_their_images():
    rows = [-torch.ones(2, 3, 32, 32), -torch.ones(2, 3, 32, 32)]
    plain, labelled = image_grid(rows), image_grid(rows, [["a", "a prompt that is much too long"]])
    assert labelled.size == (plain.size[0], plain.size[1] + 10)
    band = labelled.crop((0, 32, 66, 44)).convert("L")
    assert band.getextrema()[0] < 128  # text on white
    assert band.getpixel((65, 6)) == 255
    assert labelled.crop((0, 44, 66, 76)).tobytes() == plain.crop((0, 34, 66, 66)).tobytes()
