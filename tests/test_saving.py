"""Checkpoints that cannot be written, and checkpoints that cannot be read."""

import json
import logging
import os
import resource
import subprocess
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from emu_jax import integrity
from emu_jax.errors import UserError
from emu_jax.train import checkpoints as checkpoints_module
from emu_jax.train.checkpoints import Checkpoints


def items(step: int):
    """Half a megabyte that does not compress."""
    values = jax.random.normal(jax.random.key(step), (128, 1024))
    return {
        "params": ocp.args.StandardSave({"a": {"b": values}, "step": jnp.int32(step)}),
        "position": ocp.args.JsonSave({"block": step}),
    }


def wanted():
    shape = jax.ShapeDtypeStruct((128, 1024), jnp.float32)
    return {
        "params": ocp.args.StandardRestore(
            {"a": {"b": shape}, "step": jax.ShapeDtypeStruct((), jnp.int32)}
        ),
        "position": ocp.args.JsonRestore(),
    }


def write(workdir: Path, steps, keep: int = 10) -> None:
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, items(step))


def assert_restores(workdir: Path, step: int) -> None:
    with Checkpoints(workdir, 10) as checkpoints:
        found, saved = checkpoints.restore(wanted())
    assert found == step == int(saved["params"]["step"]) == saved["position"]["block"]
    expected = jax.random.normal(jax.random.key(step), (128, 1024))
    np.testing.assert_array_equal(saved["params"]["a"]["b"], expected)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "array cut short": lambda step: cut(largest_file(step / "params")),
    "array gone": lambda step: largest_file(step / "params").unlink(),
    "shapes gone": lambda step: (step / "params" / "_METADATA").unlink(),
    "position cut short": lambda step: cut(step / "position" / "metadata"),
    "item gone": lambda step: (step / "params").rename(step.parent / "elsewhere"),
}


def test_the_newest_is_restored_and_old_ones_go(tmp_path):
    write(tmp_path, [2, 4, 10], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["10", "4"]
    assert_restores(tmp_path, 10)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_named(how, tmp_path, capsys):
    write(tmp_path, [1, 2, 3])
    DAMAGE[how](tmp_path / "3")
    assert_restores(tmp_path, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("checkpoint 3 cannot be read (")
    assert line.endswith(f"): renamed to {tmp_path / '3.damaged'}, resuming from step 2")
    assert (tmp_path / "3.damaged").is_dir() and not (tmp_path / "3").exists()
    # Its place is free, and a second one that is damaged does not take the first one's.
    write(tmp_path, [3])
    cut(tmp_path / "3" / "position" / "metadata")
    assert_restores(tmp_path, 2)
    assert (tmp_path / "3.damaged").is_dir() and (tmp_path / "3.damaged1").is_dir()


def test_all_damaged_is_an_error_that_touches_nothing(tmp_path):
    write(tmp_path, [1, 2])
    for step in ("1", "2"):
        cut(largest_file(tmp_path / step / "params"))
    before = sorted(tmp_path.rglob("*"))
    with (
        Checkpoints(tmp_path, 10) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint in .* can be read \(2: .*; 1: .*\)") as told,
    ):
        checkpoints.restore(wanted())
    assert "\n" not in str(told.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def small_files(tmp_path):
    """Files may not grow beyond a quarter of a megabyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write(tmp_path, [1, 2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "disk, reason", [("small_disk", "No space left on device"), ("small_files", "File too large")]
)
def test_a_save_that_fails_is_one_line_and_costs_nothing_saved(disk, reason, request, caplog):
    workdir = request.getfixturevalue(disk)
    caplog.set_level(logging.WARNING)
    with pytest.raises(UserError) as told:
        with Checkpoints(workdir, 10) as checkpoints:
            for step in range(3, 10):
                checkpoints.save(step, items(step))
    whole = sorted(int(p.name) for p in workdir.iterdir() if p.name.isdigit())
    failed = whole[-1] + 1
    assert str(told.value) == (
        f"failed to save step {failed} to {workdir}: {reason}: fix this and rerun; training "
        f"resumes from step {whole[-1]}"
    )
    assert not [record for record in caplog.records if record.exc_info]
    assert_restores(workdir, whole[-1])
    assert not list(workdir.glob("*tmp*")), "half a checkpoint stays"


def test_a_failed_save_is_noticed_beside_the_steps(small_files):
    with pytest.raises(UserError, match="failed to save step 3"):
        with Checkpoints(small_files, 10) as checkpoints:
            checkpoints.save(3, items(3))
            for _ in range(400):
                time.sleep(0.05)
                checkpoints.check()
            pytest.fail("nobody heard of it")


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    """At most one copy of the state is in memory, however often a run saves; and it stays one
    until the step was read back."""
    entered, go_on = threading.Event(), threading.Event()
    unreadable_arrays = integrity.unreadable_arrays

    def slow(item, *share):
        entered.set()
        assert go_on.wait(60)
        return unreadable_arrays(item, *share)

    monkeypatch.setattr(integrity, "unreadable_arrays", slow)
    with Checkpoints(tmp_path, 1) as checkpoints:
        begun = []
        save = checkpoints._checkpointer.save
        checkpoints._checkpointer.save = lambda place, args: (
            begun.append(place),
            save(place, args),
        )

        def run() -> None:
            for step in (1, 2):
                checkpoints.save(step, items(step))

        thread = threading.Thread(target=run)
        thread.start()
        assert entered.wait(60)
        checkpoints.check()  # waits for nothing
        time.sleep(0.2)
        assert begun == [tmp_path / "1"] and (tmp_path / "1").is_dir()
        go_on.set()
        thread.join()
        assert begun == [tmp_path / "1", tmp_path / "2"]
        checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]


def test_large_arrays_are_cut_into_chunks(tmp_path, monkeypatch):
    """Whoever reads a chunk (a check of what was written, a conversion) holds all of it."""
    assert checkpoints_module.CHUNK_BYTES == 2**26
    monkeypatch.setattr(checkpoints_module, "CHUNK_BYTES", 2**17)
    write(tmp_path, [1])
    sizes: list[int] = []
    assert not list(integrity.unreadable_arrays(tmp_path / "1" / "params", progress=sizes.append))
    assert sorted(sizes) == [4] + [2**17] * 4
    assert largest_file(tmp_path / "1").stat().st_size < 2**18
    assert_restores(tmp_path, 1)


def test_an_older_step_goes_only_after_the_newer_one_was_read_back(tmp_path, monkeypatch):
    write(tmp_path, [1])
    checked = []
    unreadable_arrays = integrity.unreadable_arrays

    def look(item, *share):
        checked.append((tmp_path / "1").is_dir())
        return unreadable_arrays(item, *share)

    monkeypatch.setattr(integrity, "unreadable_arrays", look)
    write(tmp_path, [2], keep=1)
    assert checked == [True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    write(tmp_path, [1])
    half = tmp_path / "2.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    (half / "params" / "x").write_text("half")
    write(tmp_path, [3])
    assert not half.exists()
    assert json.loads((tmp_path / "3" / "position" / "metadata").read_text()) == {"block": 3}
