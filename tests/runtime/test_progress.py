"""Progress of long commands: the time left of a loop, and of the whole that it is a part of."""

import logging

import pytest

from davae.runtime import progress
from davae.runtime.progress import Phases, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in its only entry."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_of_the_whole_follows_the_pace(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Phases("demo", {"first": 100, "second": 50}) as whole:
        whole.begin("first")
        assert whole.left() == pytest.approx(150)
        with Progress("first", 10) as bar:
            for _ in range(5):  # at half the recorded speed
                clock[0] += 20
                bar.advance()
        assert whole.left() == pytest.approx(100 * 105 / 55)
        with Progress("something else", 3) as other:
            other.advance()
        assert whole.left() == pytest.approx(100 * 105 / 55)
        clock[0] = 200
        whole.begin("second")
        assert whole.left() == pytest.approx(50 * 205 / 105)
        clock[0] = 290
    assert whole.seconds == {"first": 200, "second": 90}
    assert Phases.current is None
    assert "demo, 1 of 2: first; about 2 min left" in caplog.text
    assert "demo, 2 of 2: second; about 98 s left" in caplog.text
    assert "first 2/10  2:40 left  demo: about 4 min left  20.00 s/step" in caplog.text


def test_a_loop_that_goes_on_has_less_before_it(clock: list[float]) -> None:
    with Phases("demo", {"first": 100, "second": 50}) as whole:
        whole.begin("first")
        with Progress("first", 10, start=8) as bar:
            assert whole.left() == pytest.approx(20 + 50)
            clock[0] = 10  # as recorded
            bar.advance()
            assert whole.left() == pytest.approx(10 + 50)


def test_outside_of_a_whole_a_loop_tells_of_itself(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("alone", 2) as bar:
        clock[0] = 30
        bar.advance()
    assert caplog.messages[0].startswith("alone 1/2  0:30 left  30.00 s/step")
