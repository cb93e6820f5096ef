"""How a run's time is counted."""

import time

import pytest

from cnnfamily.progress import Clock


def test_the_clock_counts_waiting_and_images(monkeypatch):
    """10 seconds, of which 1.5 and 1 went into waiting; then it begins anew."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(32)
    for seconds in (1.5, 1.0):
        with clock.waiting():
            now[0] += seconds
        now[0] += 3.75
        clock.count_step()
    assert clock.images_per_second == pytest.approx(6.4)
    assert clock.restart() == pytest.approx({"images_per_second": 6.4, "data_share": 0.25, "seconds": 10.0})
    now[0] += 4
    clock.count_step()
    assert clock.restart() == pytest.approx({"images_per_second": 8.0, "data_share": 0.0, "seconds": 4.0})
