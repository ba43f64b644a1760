"""Run directories in object stores: paths, checkpoints, the lock, logs, and faults of the store."""

import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import read_documents
from test_saving import assert_restores, items, wanted, write
from test_train import parameters, small

from emu_jax import checkpoint, storage
from emu_jax.errors import UserError
from emu_jax.evaluate.run import Store
from emu_jax.storage import as_path, create_text, join, read_log, relative, write_text, writing
from emu_jax.train import lock
from emu_jax.train.checkpoints import Checkpoints
from emu_jax.train.lock import Lock
from emu_jax.train.loop import train
from emu_jax.train.telemetry.metrics import read_metrics


@pytest.fixture
def impatient(monkeypatch):
    """Requests are retried for a second."""
    monkeypatch.setattr(storage, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)


@pytest.fixture
def workdir(store) -> Path:
    return as_path(f"{store.folder}/run")


@pytest.fixture
def bucket(gcs) -> Path:
    """As `workdir`, in one kind of store: where the two cannot differ."""
    return as_path(f"{gcs.folder}/run")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Paths -----------------------------------------------------------------------------------


def test_a_store_s_path_is_a_path():
    path = as_path("gs://bucket/a/../run/")
    assert isinstance(path, Path) and str(path) == os.fspath(path) == "gs://bucket/run"
    assert path == as_path(path) == pickle.loads(pickle.dumps(path)) and path != Path("bucket/run")
    assert str(path / "1" / "params") == "gs://bucket/run/1/params"
    assert path.parent.parent == path.parent == as_path("gs://bucket") and path.is_absolute()
    assert path.with_name("x.json").suffix == ".json" and path.resolve() == path.absolute() == path
    assert (path / "1" / "d").relative_to(path).parts == ("1", "d")
    assert (path / "1").is_relative_to(path) and not path.is_relative_to(Path("/bucket/run"))
    assert not Path("/bucket/run").is_relative_to(path)
    assert as_path("runs/x") == Path("runs/x") and type(as_path("runs/x")) is type(Path())
    for text, problem in (
        ("ftp://b/x", "ftp:// is not supported"),
        ("hf://a/b", "not supported .* emu-jax convert hf://a/b DST, .*, or use a local path"),
        ("s3://", "names no bucket"),
    ):
        with pytest.raises(UserError, match=problem):
            as_path(text)


def test_a_run_s_parents_are_relative_within_a_store():
    run = as_path("gs://bucket/runs/b")
    for parent, written in (
        (as_path("gs://bucket/runs/a"), "../a"),
        (as_path("gs://other/runs/a"), "gs://other/runs/a"),
        (as_path("s3://bucket/runs/a"), "s3://bucket/runs/a"),
        (Path("/runs/a"), "/runs/a"),
    ):
        assert relative(parent, run) == written and join(run, written) == parent
    assert relative(Path("/runs/a"), Path("/runs/b")) == "../a"
    assert join(Path("/runs/b"), "../a") == Path("/runs/a")
    assert join(Path("runs/b"), "gs://bucket/a/../c") == as_path("gs://bucket/c")


# --- Objects ---------------------------------------------------------------------------------


def test_objects_are_files(workdir, store):
    assert not workdir.exists() and not workdir.is_dir() and not storage.files(workdir)
    for read in (workdir.read_bytes, lambda: list(workdir.iterdir()), workdir.stat, workdir.unlink):
        if read != workdir.unlink or store.scheme == "gs":  # S3 deletes what is not there
            with pytest.raises(FileNotFoundError) as error:
                read()
            assert error.value.filename == str(workdir)
    write_text(workdir / "a.json", '{"a": "ü"}\n')
    assert storage.read_json_object(workdir / "a.json") == {"a": "ü"}
    assert (workdir / "a.json").is_file() and not (workdir / "a.json").is_dir() and workdir.is_dir()
    assert (workdir / "a.json").stat().st_size == 12
    with writing(workdir / "tree") as temporary:
        (temporary / "1" / "deep").mkdir(parents=True)
        (temporary / "1" / "deep" / "d").write_bytes(bytes(range(256)))
        (temporary / "z").write_text("z")
    assert names(workdir) == ["a.json", "tree"] and storage.folders(workdir) == ["tree"]
    assert {str(p.relative_to(workdir)) for p in storage.files(workdir)} == {
        "a.json",
        "tree/1/deep/d",
        "tree/z",
    }
    assert [p.parent.name for p in workdir.glob("*/1/deep")] == ["1"]
    assert [p.name for p in workdir.glob("*.json")] == ["a.json"]
    with (workdir / "tree" / "1" / "deep" / "d").open("rb") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == bytes([253, 254, 255])
        file.seek(100)
        assert file.read(2) == bytes([100, 101])
    with storage.local_copy(workdir / "tree") as copy:
        assert (copy / "z").read_text() == "z" and len(storage.files(copy)) == 2
    with storage.local_copy(workdir / "nothing") as copy:
        assert not copy.exists()
    with pytest.raises(NotADirectoryError):
        list((workdir / "a.json").iterdir())
    for action in (lambda: workdir.rename("b"), lambda: (workdir / "a").open("a")):
        with pytest.raises(OSError) as error:
            action()
        assert error.value.errno == errno.ENOTSUP
    storage.remove(workdir / "tree")
    storage.remove(workdir / "tree")
    assert names(workdir) == ["a.json"]


def test_only_one_process_creates_an_object(workdir):
    create_text(workdir / "x", "first")
    with pytest.raises(FileExistsError):
        create_text(workdir / "x", "second")
    assert (workdir / "x").read_text() == "first"


def test_a_failed_write_uploads_nothing(bucket):
    write_text(bucket / "x", "old")
    with pytest.raises(ValueError, match="half"), writing(bucket / "x") as temporary:
        temporary.write_text("new")
        raise ValueError("half")
    assert (bucket / "x").read_text() == "old"


def test_a_log_is_a_few_objects(bucket, gcs, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "LOG_BYTES", 100)
    lines = [f"{n:09d}\n" for n in range(25)]
    for path in (bucket / "log", tmp_path / "log"):
        for begin in (0, 5, 12):  # three processes, one after the other
            log = storage.open_log(path)
            for line in lines[begin : {0: 5, 5: 12, 12: 25}[begin]]:
                log.write(line)
            log.sync()
            log.close()
        assert read_log(path).decode() == "".join(lines)
    assert names(bucket) == ["log", "log.1", "log.2"]
    assert [len(part.read_bytes()) for part in storage.log_parts(bucket / "log")] == [100, 100, 50]
    puts = [name for method, name in gcs.requests if method in ("PUT", "POST")]
    assert len(puts) == 5  # one for each sync, and one for each object that was filled
    with pytest.raises(FileNotFoundError):
        read_log(bucket / "none")


def test_a_mirror_uploads_what_has_changed(bucket, gcs, tmp_path):
    mirror = storage.Mirror(bucket / "events")
    (mirror.local / "a").write_text("1")
    (mirror.local / "b").write_text("2")
    mirror.sync()
    (mirror.local / "a").write_text("11")
    gcs.requests.clear()
    mirror.sync()
    assert len({name for method, name in gcs.requests if method in ("PUT", "POST")}) == 1
    assert (bucket / "events" / "a").read_text() == "11" and names(bucket / "events") == ["a", "b"]
    assert storage.Mirror(tmp_path).local == tmp_path


def test_predictions_of_an_evaluation_are_resumed(bucket, monkeypatch):
    monkeypatch.setattr(storage, "LOG_BYTES", 100)
    rows = [{"id": str(n), "answer": "a" * 30, "said": [], "asked": ""} for n in range(4)]
    for process, first in ((0, 0), (1, 2), (0, 3)):
        predictions = Store(bucket / "out.json", {"seed": 0}, process)
        assert len(predictions.read()) == first
        with predictions.appending() as append:
            append(rows[first : first + 2 - first // 2])
    assert len(predictions.read()) == 4
    predictions.join(rows)
    assert list(predictions.read()) == ["0", "1", "2", "3"]
    assert names(bucket) == ["out.predictions.jsonl"]


# --- Faults ----------------------------------------------------------------------------------


def test_a_busy_store_is_asked_again(workdir, store):
    store.refuse(0.5)
    write_text(workdir / "x", "text")
    assert (workdir / "x").read_text() == "text"


def test_a_missing_permission_is_an_os_error(workdir, store):
    write_text(workdir / "x", "text")
    store.deny(str(workdir))
    for action in (
        (workdir / "x").read_bytes,
        workdir.exists,
        lambda: list(workdir.iterdir()),
        lambda: write_text(workdir / "x", "new"),
    ):
        with pytest.raises(
            PermissionError, match="no permission to (read|write) it: grant"
        ) as told:
            action()
        assert told.value.filename.startswith(str(workdir)) and "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"lock\.json: no permission to write it: grant"):
        Checkpoints(workdir, 1).__enter__()


def test_a_missing_workdir_is_named(store):
    with pytest.raises(FileNotFoundError, match=f"no such bucket: create {store.scheme}://none-x"):
        write_text(as_path(f"{store.scheme}://none-xyz/x"), "")


def test_a_store_that_never_answers_is_an_os_error(impatient, monkeypatch):
    class Dead:
        calls = 0

        def cat_file(self, key):
            Dead.calls += 1
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(storage, "file_system", lambda scheme: Dead())
    with pytest.raises(OSError, match="cannot read it, retried for 1 s .no route to host") as told:
        as_path("gs://bucket/x").read_bytes()
    assert told.value.errno == errno.EIO and Dead.calls > 3


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    storage.file_system.cache_clear()
    with pytest.raises(UserError, match=r"s3:// needs s3fs: pip install 'emu_jax\[s3\]'"):
        as_path("s3://bucket/x").exists()
    storage.file_system.cache_clear()


# --- Checkpoints -----------------------------------------------------------------------------


def test_steps_are_saved_restored_and_retired(workdir):
    write(workdir, [2, 4, 10], keep=2)
    assert names(workdir) == ["10", "4"]
    assert_restores(workdir, 10)
    report = checkpoint.verify_steps(workdir, every=True)
    assert report.passed and [step.verified for step in report.steps] == [True, True]
    assert not (workdir / "lock.json").exists()


def test_a_step_without_its_marker_is_removed(bucket, gcs):
    write(bucket, [2])
    gcs.deny(str(bucket / "4" / checkpoint.COMMIT_MARKER), "PUT", "POST")
    with pytest.raises(UserError, match="failed to save step 4 .*resumes from step 2"):
        write(bucket, [4])
    gcs.reset()
    (bucket / "6" / "params").joinpath("d").write_bytes(b"half")  # by a killed process
    assert checkpoint.complete_steps(bucket) == [2] and checkpoint.latest_step(bucket) == 2
    with Checkpoints(bucket, 10) as checkpoints:
        assert checkpoints.newest() == 2 and names(bucket) == ["2", "lock.json"]
        checkpoints.save(6, items(6))
    assert_restores(bucket, 6)
    for step in (2, 6):
        (bucket / str(step) / checkpoint.COMMIT_MARKER).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* \([26], [26]: no commit_success.txt"):
        checkpoint.latest_step(bucket)


def test_a_damaged_step_is_marked_and_replaced(bucket, capsys):
    write(bucket, [2, 3])
    (bucket / "3" / "params" / "_METADATA").write_text("{}")
    assert_restores(bucket, 2)
    marker = bucket / "3" / checkpoint.DAMAGED_MARKER
    assert f"set aside with {marker}, and replaced by the next step 3" in capsys.readouterr().err
    assert "checksum mismatch" in marker.read_text() and checkpoint.complete_steps(bucket) == [2]
    write(bucket, [3])
    assert not marker.exists()
    assert_restores(bucket, 3)


def test_a_failing_store_is_not_a_damaged_step(bucket, gcs):
    write(bucket, [2])
    with Checkpoints(bucket, 1) as checkpoints:
        gcs.deny(str(bucket / "2" / checkpoint.COMMIT_MARKER))
        gcs.deny(str(bucket / "2" / "params" / "_METADATA"))
        with pytest.raises(UserError, match="cannot read .*/2 .*no permission"):
            checkpoints.restore(wanted())
        gcs.reset()
    assert checkpoint.complete_steps(bucket) == [2]


def test_two_jobs_in_one_run_directory(bucket, monkeypatch):
    for name in ("BEAT_SECONDS", "LOCK_STALE_SECONDS", "SETTLE_SECONDS"):
        monkeypatch.setattr(lock, name, getattr(lock, name) / 100)
    with Checkpoints(bucket, 10) as checkpoints:
        with pytest.raises(UserError, match="is in use by process"), Checkpoints(bucket, 10):
            pass
        time.sleep(0.3)  # heartbeats
        monkeypatch.setattr(lock, "BEAT_SECONDS", 1e9)
        time.sleep(0.5)  # the last one ends: it would overwrite what follows
        beat = json.loads((bucket / "lock.json").read_text())
        dead = beat | {"host": "other", "token": "x"}
        (bucket / "lock.json").write_text(json.dumps(dead))  # another job took it over
        with pytest.raises(UserError, match="on other, since .* has taken over"):
            checkpoints.save(1, items(1))
    held = Lock(bucket / "lock.json")
    held.acquire()  # the other job is dead
    assert json.loads((bucket / "lock.json").read_text())["token"] == held._token
    held.release()
    assert not (bucket / "lock.json").exists() and not checkpoint.complete_steps(bucket)


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_step_before(bucket, gcs):
    write(bucket, [2])
    gcs.latency = 0.1
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    code += f"import test_object_stores as it; it.write(it.as_path({str(bucket)!r}), [4])"
    job = subprocess.Popen([sys.executable, "-c", code])
    arrays = "/".join((bucket / "4" / "params").parts[2:])
    while not any(m != "GET" and name.startswith(arrays) for m, name in list(gcs.requests)):
        assert job.poll() is None
        time.sleep(0.01)
    job.kill()
    job.wait()
    gcs.latency = 0.0
    assert sorted(checkpoint.step_folders(bucket)) == [2, 4] and (bucket / "lock.json").exists()
    assert checkpoint.complete_steps(bucket) == [2]
    assert_restores(bucket, 2)
    assert names(bucket) == ["2"]


@pytest.mark.slow
def test_a_store_that_is_busy_for_30_seconds_delays_a_save(bucket, gcs):
    with Checkpoints(bucket, 10) as checkpoints:
        checkpoints.save(2, items(2))
        gcs.refuse(30)
    assert_restores(bucket, 2)


# --- Runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory, copy_digits):
    return str(copy_digits(tmp_path_factory.mktemp("digits")))


def config(root: str, **changes):
    return small("clip", root, steps=4, log_documents=True, profile_steps="3:4", **changes)


def assert_equal_runs(one: Path, other: Path) -> None:
    expected, found = parameters(one), parameters(other)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    rows, others = read_metrics(one)["emu"], read_metrics(other)["emu"]
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    assert read_documents(one) == read_documents(other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp, of a trace
def test_a_run_in_a_store_is_the_run_on_a_disk(root, bucket, tmp_path, monkeypatch):
    """Also one that was stopped and has logged steps beyond its checkpoint."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    for workdir in (tmp_path, bucket):
        train(dataclasses.replace(config(root), steps=2), workdir)
        lost = read_metrics(workdir)["emu"][-1] | {"step": 3}
        log = storage.open_log(workdir / "metrics.jsonl")
        log.write(json.dumps(lost) + "\n")
        log.close()
        train(config(root), workdir)
    assert_equal_runs(tmp_path, bucket)
    assert {p.name for p in bucket.iterdir()} == {p.name for p in tmp_path.iterdir()} - {
        path.name for path in tmp_path.iterdir() if path.is_file() and not path.stat().st_size
    }
    for name in ("config.json", "tokenizer/tokenizer.json"):
        assert (bucket / name).read_bytes() == (tmp_path / name).read_bytes()
    assert {p.suffix for p in storage.files(bucket / "profile" / "3")} >= {".pb"}
    assert len(names(bucket / "tensorboard" / "emu")) == 2  # one for each process
    assert checkpoint.model_fingerprint(bucket) == checkpoint.model_fingerprint(bucket)
