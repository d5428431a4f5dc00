import math
from pathlib import Path

import pytest

from davae.errors import DavaeError
from davae.report import words
from davae.report.plots import loss_plot
from davae.report.words import loss_terms, read_metrics, smoothed


def test_terms_are_read_over_their_own_steps_and_bookkeeping_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "loss": 0.5, "lr": 1, "images_per_second": 3, "grad_norm": 1, "note": "x"}\n'
        '{"step": 1, "loss": 1.0, "lr": 1, "images_per_second": 3, "grad_norm": 1}\n'
        '{"step": 2, "loss": 0.4, "kl": NaN, "lr": 1}\n'
        '{"step": 3, "kl": 2.0, "swd": 0.25}\n'
        '{"step": 4, "kl": 1.0, "lo'  # cut short by a kill
    )
    series = read_metrics(path)
    assert series["loss"] == ([1, 2], [1.0, 0.4])  # what was written last counts
    assert series["kl"][0] == [2, 3]
    assert loss_terms(series) == ["loss"]
    assert series["swd/finest"] == ([3], [0.25])  # what an earlier run called otherwise
    path.write_text('{"step": 1, "loss": 1}\nnot json\n')
    with pytest.raises(DavaeError, match="line 2 is not JSON"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(DavaeError, match="whole-numbered 'step'"):
        read_metrics(path)


def test_smoothing_keeps_a_straight_line_and_flattens_noise() -> None:
    line = [float(i) for i in range(200)]
    assert smoothed(line) == pytest.approx(line)
    noise = smoothed([(-1.0) ** i for i in range(200)])
    assert max(map(abs, noise[20:-20])) < 0.2
    gap = smoothed([1.0, math.nan, 1.0])
    assert gap[0] == 1.0
    assert math.isnan(gap[1])


def test_losses_that_are_zero_or_negative_or_not_finite_can_be_drawn() -> None:
    for values in ([0.0, -1.0, 2.0], [math.nan, 1.0, math.inf], [1.0, 1.0, 1.0], [math.nan] * 3):
        curve = {"loss": ([0, 1, 2], values)}
        assert "<svg" in loss_plot("x", curve, curve, description="a loss")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.significant(0.0), "0"),
        (words.significant(1234.5), "1234"),
        (words.significant(0.04567), "0.0457"),
        (words.significant(2.4e-7, 2), "2.4\u202f×\u202f10⁻⁷"),
        (words.metric_label("swd/finest"), "SWD, finest level"),
        (words.metric_label("fid/inception"), "FID, inception"),
        (words.metric_label("held_out_total"), "held_out_total"),
        (words.better("precision/inception"), "higher"),
        (words.better("kid/inception"), "lower"),
        (words.seconds(0.0421), "42.1 ms"),
        (words.seconds(95.04), "95.0 s"),
        (words.seconds(311.2), "5 min 11 s"),
        (words.seconds(7261), "2 h 01 min"),
        (words.operations(4.6e10), "46.0 G"),
        (words.memory(1.83e9), "1.83 GB"),
        (words.times(3.381), "3.4×"),
        (words.any_value([1, True, None]), "1, yes, none"),
        (words.any_value(3e-4), "0.0003"),
    ],
)
def test_numbers_as_a_person_reads_them(written: str, expected: str) -> None:
    assert written == expected
