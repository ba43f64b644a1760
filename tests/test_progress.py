"""Progress: a bar on a terminal, plain lines elsewhere."""

import io
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from emu_jax import progress
from emu_jax.progress import ProgressBar, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the module."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_plain_lines_are_ten_seconds_apart_and_the_last_is_printed(capsys, clock):
    with ProgressBar("cats", 4000, "document", done=1000) as bar:
        for _ in range(5):
            clock(4)
            bar.add(100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "cats: 1,300 of 4,000 documents, 25.00 documents/s, 1m48s left",
        "cats: 1,500 of 4,000 documents, 25.00 documents/s, 1m40s left",
    ]


def test_bytes_and_unknown_totals(capsys, clock):
    for total, unit in ((4 << 30, "B"), (None, "B"), (None, "image"), (None, "step")):
        with ProgressBar("name", total, unit) as bar:
            clock(64)
            bar.update(1 << 30)
    assert capsys.readouterr().err.splitlines() == [
        "name: 1.0 of 4.0 GiB, 16.0 MiB/s, 3m12s left",
        "name: 1.0 GiB, 16.0 MiB/s",
        "name: 1,073,741,824 images, 16777216.00 images/s",
        "name: step 1073741824, 16777216.00 steps/s",
    ]


def test_figures_are_shown_from_the_start(capsys, clock):
    with ProgressBar("emu", 20, "step", done=10, values={"loss": 0.5}) as bar:
        clock(0.5)
        bar.update(12, {"loss": 0.25})
    assert capsys.readouterr().err.splitlines() == [
        "emu: step 10/20, loss 0.5",
        "emu: step 12/20, loss 0.25, 4.00 steps/s, 0m02s left",
    ]


def test_short_or_disabled_tasks_print_nothing(capsys, clock):
    with ProgressBar("short", 2, "item", min_seconds=1.0) as bar:
        clock(0.5)
        bar.add(2)
    with ProgressBar("other process", 2, "item", enabled=False, values={"loss": 1.0}) as bar:
        clock(60)
        bar.add(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("enabled", [True, False])
def test_bar_on_a_terminal(monkeypatch, enabled):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressBar("cats", 8, "item", done=2, enabled=enabled) as bar:
        bar.update(8, {"loss": 0.5})
    shown = sys.stderr.getvalue()
    assert ("cats" in shown and "8/8" in shown and "loss=0.5" in shown) == enabled
    assert bool(shown) == enabled


def test_track_yields_every_item(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(track(iter("abc"), 3, "letters", "letter")) == ["a", "b", "c"]
    assert "3/3" in sys.stderr.getvalue()


def test_the_last_line_of_a_short_task_is_printed_by_default(capsys, clock):
    with ProgressBar("short", 2, "item") as bar:
        clock(0.5)
        bar.add(2)
    assert capsys.readouterr().err == "short: 2 of 2 items, 4.00 items/s, 0m00s left\n"
