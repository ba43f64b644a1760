"""One job at a time in a run directory."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_saving import items

from emu_jax.errors import UserError
from emu_jax.train import lock
from emu_jax.train.checkpoints import Checkpoints
from emu_jax.train.lock import Lock


@pytest.fixture
def quick(monkeypatch):
    """Seconds become hundredths."""
    for name in ("BEAT_SECONDS", "LOCK_STALE_SECONDS", "SETTLE_SECONDS"):
        monkeypatch.setattr(lock, name, getattr(lock, name) / 100)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock.json"


def owner_of(path: Path) -> dict:
    return json.loads(path.read_text())


def elsewhere(path: Path, **changes) -> dict:
    """Leaves the lock of a process on another host."""
    owner = lock._identity() | {"host": "other", "token": "x", "beat": time.time()} | changes
    path.write_text(json.dumps(owner))
    return owner


def test_a_second_job_is_refused_and_touches_nothing(tmp_path):
    with Checkpoints(tmp_path, 10) as checkpoints:
        checkpoints.save(1, items(1))
        half = tmp_path / "7.orbax-checkpoint-tmp"
        half.mkdir()
        owner = owner_of(tmp_path / "lock.json")
        with pytest.raises(UserError) as told, Checkpoints(tmp_path, 1):
            pass
        assert str(told.value) == (
            f"{tmp_path} is in use by process {owner['pid']} on {owner['host']}, since "
            f"{owner['since']}: stop that job first, or use another --workdir (if that job is no "
            f"longer running, delete {tmp_path / 'lock.json'})"
        )
        assert half.is_dir()
    assert (tmp_path / "1").is_dir() and not (tmp_path / "lock.json").exists()


def test_a_full_disk_at_the_start_is_one_line(tmp_path, monkeypatch):
    def acquire(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Lock, "acquire", acquire)
    with pytest.raises(UserError, match="lock.json: No space left"), Checkpoints(tmp_path, 1):
        pass


def test_a_dead_owner_on_this_host_costs_no_waiting(path, quick, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    monkeypatch.setattr(lock, "LOCK_STALE_SECONDS", 1e9)
    # The number may be another process's by now.
    for pid, started in ((child.pid, "1"), (lock.os.getpid(), "1")):
        path.write_text(json.dumps(lock._identity() | {"pid": pid, "started": started}))
        held = Lock(path)
        held.acquire()
        assert owner_of(path)["token"] == held._token
        held.release()
        assert not list(path.parent.iterdir())


def test_an_owner_elsewhere_is_dead_when_its_heart_stops(path, quick):
    elsewhere(path)
    began = time.monotonic()
    held = Lock(path)
    held.acquire()
    assert lock.LOCK_STALE_SECONDS <= time.monotonic() - began < 20 * lock.LOCK_STALE_SECONDS
    held.release()


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_lock_that_does_not_fit_on_the_disk_is_not_left_behind(path, taken_over, monkeypatch):
    if taken_over:
        path.write_text(json.dumps(lock._identity() | {"pid": 2**22 + 1, "token": "dead"}))
    before = [p.name for p in path.parent.iterdir()]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            Lock(path).acquire()
    assert [p.name for p in path.parent.iterdir()] == before


def test_an_owner_elsewhere_lives_while_its_heart_beats(path, quick, monkeypatch):
    """Whatever its clock says."""
    monkeypatch.setattr(lock, "LOCK_STALE_SECONDS", 2.0)
    owner = elsewhere(path, beat=time.time() - 10_000)
    beats = threading.Timer(
        0.3, lambda: path.write_text(json.dumps(owner | {"beat": owner["beat"] + 10}))
    )
    beats.start()
    with pytest.raises(UserError, match="in use by process .* on other"):
        Lock(path).acquire()
    beats.join()
    assert owner_of(path)["token"] == "x"


def test_half_a_lock_file_is_waited_for_like_an_owner_elsewhere(path, quick):
    path.write_text('{"host": "o')
    held = Lock(path)
    held.acquire()
    assert owner_of(path)["token"] == held._token
    held.release()


def test_the_heart_beats_on_after_storage_was_away_and_the_start_stays(path, quick, monkeypatch):
    held = Lock(path)
    held.acquire()
    first = owner_of(path)
    failed = threading.Event()

    def fail(self, *_, **__):
        if self.name != path.name:
            raise OSError(5, "Input/output error", str(self))

    def fail_too(self, **_):
        failed.set()
        fail(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        patch.setattr(Path, "unlink", fail_too)
        assert failed.wait(20)
    monkeypatch.setattr(lock.time, "strftime", lambda *_: "later")
    for _ in range(200):
        if (now := owner_of(path))["beat"] > first["beat"]:
            break
        time.sleep(0.05)
    assert now["beat"] > first["beat"] and now | {"beat": 0} == first | {"beat": 0}
    held.release()


def test_the_lock_stays_fresh_and_a_run_that_lost_it_stops(tmp_path, quick):
    path = tmp_path / "lock.json"
    with pytest.raises(UserError, match="process 1 on other.* has taken over"):
        with Checkpoints(tmp_path, 1) as checkpoints:
            first = owner_of(path)["beat"]
            for _ in range(200):
                if owner_of(path)["beat"] > first:
                    break
                time.sleep(0.05)
            else:
                pytest.fail("no heartbeat")
            checkpoints.save(1, items(1))
            checkpoints.wait()
            checkpoints._lock._closed.set()  # this process is suspended
            checkpoints._lock._thread.join()
            elsewhere(path, pid=1)
            checkpoints.save(2, items(2))
    assert owner_of(path)["token"] == "x" and (tmp_path / "1").is_dir()


def test_a_save_that_fails_because_the_lock_was_lost_leaves_the_other_job_alone(tmp_path):
    step, half = tmp_path / "2", tmp_path / "4.orbax-checkpoint-tmp"

    def fail() -> None:
        raise OSError(2, "No such file or directory")

    with pytest.raises(UserError, match="failed to save step 2"):
        with Checkpoints(tmp_path, 1) as checkpoints:
            checkpoints._lock._closed.set()  # this process is suspended
            checkpoints._lock._thread.join()
            elsewhere(tmp_path / "lock.json")
            step.mkdir()
            half.mkdir()
            checkpoints._saving = 2
            checkpoints._attempt(fail)
    assert step.is_dir() and half.is_dir()


def test_one_of_many_that_find_a_dead_owner_gets_the_lock(path, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.2)
    path.write_text(json.dumps(lock._identity() | {"pid": 2**22 + 1, "token": "dead"}))
    locks, won = [Lock(path) for _ in range(8)], []

    def acquire(one: Lock) -> None:
        try:
            one.acquire()
            won.append(one)
        except UserError:
            pass

    threads = [threading.Thread(target=acquire, args=(one,)) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = won
    assert owner_of(path)["token"] == winner._token
    winner.release()
