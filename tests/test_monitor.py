"""Monitoring of a run under way: where its time goes, hangs, traces, requests, documents."""

import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from helpers import read_documents

from emu_jax.errors import UserError
from emu_jax.sharding import make_mesh
from emu_jax.train import signals
from emu_jax.train.signals import STOP, TRACE, Signals
from emu_jax.train.telemetry import goodput
from emu_jax.train.telemetry.goodput import Goodput, overlap, seconds_before
from emu_jax.train.telemetry.metrics import DOCUMENTS_FILE, StepLog
from emu_jax.train.telemetry.tracing import Tracer, parse_steps
from emu_jax.train.telemetry.watchdog import Watchdog


def test_overlap_counts_each_moment_once():
    assert overlap([], (0, 5)) == 0
    assert overlap([(1, 2), (8, 9)], (0, 5)) == 1
    assert overlap([(3, 9), (1, 4), (2, 3)], (0, 5)) == 4
    assert overlap([(0, 9)], (2, 5)) == 3


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def monotonic(self):
        return self.now


def test_time_is_split_by_what_the_devices_wait_for(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)

    def seconds(run: Goodput) -> dict[str, float]:
        found = {k: run.metrics()[f"{k}_seconds"] for k in goodput.KINDS}
        return {kind: value for kind, value in found.items() if value}

    run = Goodput()
    with run.timed("data"):
        clock.now = 103
    clock.now = 104
    run._heard(goodput.COMPILING[0], 1.0)  # tracing, within the launch
    clock.now = 109
    run._heard(goodput.COMPILATION, 5.0)
    run._heard("/jax/some/other/event", 50.0)
    run.step(dispatched=103, ended=111)  # 3 s of data, 6 of compilation, 2 of work
    assert seconds(run) == {"data": 3, "compile": 6, "step": 2}
    assert run.metrics()["goodput"] == pytest.approx(2 / 11)
    assert run.metrics()["compilations"] == 1

    # The next step was launched while this one ran, and data were read behind it, too.
    clock.now = 105
    with run.timed("data"):
        clock.now = 110
    run.step(dispatched=110, ended=115)
    assert seconds(run) == {"data": 3, "compile": 6, "step": 6}

    # The loop saved a checkpoint for 5 s, the first of which the step still ran in.
    clock.now = 119
    with run.timed("checkpoint"):
        clock.now = 124
    run.step(dispatched=118, ended=120)
    run.step(dispatched=126, ended=127)
    assert seconds(run) == {"data": 3, "compile": 6, "step": 9, "checkpoint": 4, "other": 5}

    # An evaluation of 6 s, which compiled for 2 s.
    with run.timed("eval"):
        clock.now = 132
        run._heard(goodput.COMPILATION, 2.0)
        clock.now = 133
    run.step(dispatched=133, ended=135)
    assert seconds(run) == {
        "data": 3,
        "compile": 8,
        "step": 11,
        "checkpoint": 4,
        "eval": 4,
        "other": 5,
    }
    run.add({"step": 10.0, "lost": 2.0})
    assert seconds(run) == {
        "data": 3,
        "compile": 8,
        "step": 21,
        "checkpoint": 4,
        "eval": 4,
        "other": 5,
        "lost": 2,
    }


def test_steps_done_again_are_lost_time():
    rows = [
        {"step": step, "step_seconds": 2.0 * step, "data_seconds": 1.0, "lost_seconds": 0.5}
        for step in (1, 10, 20, 30)
    ]
    before = seconds_before(rows, step=20)
    assert (before["step"], before["lost"], before["data"]) == (40.0, 20.5, 1.0)
    assert seconds_before(rows, step=25) == before  # of the steps between, no row tells
    assert seconds_before([], step=20) == {}
    assert seconds_before([{"step": 1, "loss": 2.0}], step=1)["step"] == 0.0


def hang(until: threading.Event) -> None:
    until.wait()


def test_the_watchdog_shows_where_threads_are(tmp_path, capsys):
    path = tmp_path / "stacks.txt"
    woken = threading.Event()
    sleeper = threading.Thread(target=hang, args=(woken,))
    sleeper.start()
    with Watchdog(path, seconds=0.4) as watchdog:
        time.sleep(0.6)
        assert not path.exists(), "it watches before the first step has ended"
        watchdog.step_ended(6)
        with watchdog.paused():
            time.sleep(0.6)
        assert not path.exists(), "it watches while it is paused"
        watchdog.step_ended(7)
        for _ in range(200):
            if path.exists() and path.read_text().count("since step 7") >= 2:
                break
            time.sleep(0.05)
    woken.set()
    sleeper.join()
    text = path.read_text()
    assert text.count("since step 7") >= 2 and "since step 6" not in text
    assert "in hang" in text and "test_monitor.py" in text
    assert "in hang" in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device\nand more")

    monkeypatch.setattr("jax.profiler.start_trace", lambda place: None)
    monkeypatch.setattr("jax.profiler.stop_trace", fail)
    with Tracer(tmp_path, range(1, 3)) as tracer:
        tracer.before(1)
        tracer.after(2)
    said = capsys.readouterr().err.splitlines()
    assert said[1:] == ["failed to write the trace: RESOURCE_EXHAUSTED: No space left on device"]


def test_the_watchdog_lets_steps_alone_that_end_in_time(tmp_path):
    with Watchdog(tmp_path / "stacks.txt", seconds=2.0) as watchdog:
        for step in range(10):
            watchdog.step_ended(step)
            time.sleep(0.02)
    with Watchdog(tmp_path / "stacks.txt", seconds=0) as watchdog:
        watchdog.step_ended(1)
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_profile_steps():
    assert parse_steps("10:13") == range(10, 13)
    assert not parse_steps("")
    for wrong in ("10", "13:10", "0:3", "a:b", "5:5"):
        with pytest.raises(UserError, match="profile_steps"):
            parse_steps(wrong)


def test_steps_are_traced_as_set_and_on_request(tmp_path):
    square = jax.jit(lambda x: x @ x)
    with Tracer(tmp_path, parse_steps("2:4")) as tracer:
        for step in range(1, 10):
            if step == 7:
                tracer.request(next_step=8)
            tracer.before(step)
            square(jnp.ones((8, 8))).block_until_ready()
            tracer.after(step)
            assert tracer._tracing == (step in (2, 8, 9))
    for first in ("2", "8"):  # the second ends with the run
        assert list((tmp_path / first / "process-0").rglob("*.xplane.pb"))


NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def clock(monkeypatch):
    """`train.signals` reads this clock; and a signal reaches Python even where the process that
    started it ignores it."""
    clock = Clock()
    monkeypatch.setattr(signals, "time", clock)
    before = [signal.signal(number, signal.SIG_DFL) for number in NUMBERS]
    yield clock
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_signals_are_votes(clock, mesh, capfd):
    with Signals() as listener:
        listener.listen(mesh)
        nothing = listener.vote(jnp.zeros(()))
        send(signal.SIGUSR1)
        traced, after = listener.vote(jnp.zeros(())), listener.vote(jnp.zeros(()))
        assert [vote[TRACE] for vote in (nothing, traced, after)] == [0, 1, 0]
        # A launcher signals a process and its group, or passes on what both got.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            send(number)
            assert listener.vote(jnp.zeros(()))[STOP]
        assert not after[STOP]
        said = "SIGTERM: saving, then stopping (Ctrl-C: stopping at once)\n"
        assert capfd.readouterr().err == said
        clock.now += 5
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)  # once is enough
    assert [signal.getsignal(number) for number in NUMBERS] == [signal.SIG_DFL] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_a_signal_interrupts(number, clock):
    with Signals(), pytest.raises(KeyboardInterrupt):
        send(number)


def test_signals_interrupt_no_save_and_no_orderly_end(clock, mesh, capfd):
    with Signals() as listener:
        with pytest.raises(KeyboardInterrupt), listener.interruptible():
            listener.listen(mesh)
            send(signal.SIGINT)
            clock.now += 5
            saved = False
            with listener.hold():
                send(signal.SIGINT)
                saved = True
        assert saved
        capfd.readouterr()
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert capfd.readouterr().err == "already stopping: waiting for the save in progress\n"


def test_each_step_s_documents_stand_once(tmp_path):
    assert not read_documents(tmp_path)
    with StepLog(tmp_path, DOCUMENTS_FILE, enabled=True, start_step=0) as log:
        for step in (1, 2, 3):
            log.log(step, [("pairs", step), ("pages", 7)])
    other = tmp_path / "documents-1.jsonl"  # of a process that is there no more
    lines = [{"step": step, "documents": [["pairs", 10 * step]]} for step in (1, 2, 3)]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "doc')
    with StepLog(tmp_path, DOCUMENTS_FILE, enabled=True, start_step=2) as log:
        log.log(3, [("pairs", 5)])
    assert read_documents(tmp_path) == {
        1: [("pairs", 1), ("pages", 7), ("pairs", 10)],
        2: [("pairs", 2), ("pages", 7), ("pairs", 20)],
        3: [("pairs", 5)],
    }
    with StepLog(tmp_path / "none", DOCUMENTS_FILE, enabled=False, start_step=0) as log:
        log.log(1, [("pairs", 5)])
    assert not (tmp_path / "none").exists()
