"""A run's own account of itself, and what breaks while it trains."""

import dataclasses
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_documents
from test_saving import cut, largest_file
from test_train import one_batch, parameters, small

from emu_jax import checkpoint
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.sharding import make_mesh
from emu_jax.train.loop import train
from emu_jax.train.objectives import ClipObjective
from emu_jax.train.step import Trainer
from emu_jax.train.telemetry.goodput import KINDS
from emu_jax.train.telemetry.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """As on a machine with a single device, where programs compile sooner."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory, copy_digits):
    return str(copy_digits(tmp_path_factory.mktemp("digits")))


def run(root: str, **changes):
    return small(
        "clip", root, keep_checkpoints=10, log_documents=True, profile_steps="3:5", **changes
    )


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An undisturbed run of six steps, with a checkpoint at every second one."""
    workdir = tmp_path_factory.mktemp("whole")
    train(run(root), workdir)
    return workdir


def rows_of(workdir: Path):
    return read_metrics(workdir)["emu"]


def assert_ends_like(whole: Path, workdir: Path) -> None:
    expected, found = parameters(whole), parameters(workdir)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert [row["step"] for row in rows_of(workdir)] == [row["step"] for row in rows_of(whole)]
    assert read_documents(workdir) == read_documents(whole)


def test_a_run_says_what_it_did(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    compilations = [row["compilations"] for row in rows]
    assert compilations[1] > 0 and compilations[1:] == [compilations[1]] * 5
    seconds = [sum(row[f"{kind}_seconds"] for kind in KINDS) for row in rows]
    for before, after in zip(rows, rows[1:], strict=False):
        for kind in KINDS:
            assert after[f"{kind}_seconds"] >= before[f"{kind}_seconds"] >= 0
    passed = rows[-1]["time"] - rows[0]["time"]
    assert seconds[-1] - seconds[0] == pytest.approx(passed, rel=0.1, abs=0.2)
    for kind in ("step", "compile", "checkpoint"):
        assert rows[-1][f"{kind}_seconds"] > 0
    assert rows[-1]["goodput"] == pytest.approx(rows[-1]["step_seconds"] / seconds[-1])
    assert sum(8 / row["images_per_second"] for row in rows[1:]) == pytest.approx(
        passed, rel=0.1, abs=0.5
    )
    assert all(row["tokens_per_second"] > 0 for row in rows[1:])
    assert rows[-1]["skipped_steps"] == rows[-1]["lost_seconds"] == 0
    assert list((whole / "profile" / "3" / "process-0").rglob("*.xplane.pb"))
    assert {step: len(read) for step, read in read_documents(whole).items()} == dict.fromkeys(
        range(1, 7), 8
    )
    assert not list(whole.glob("stacks-*"))


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_alone(root, whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    cut(largest_file(workdir / "6" / "params"))
    assert train(run(root), workdir).step == 6
    said = capsys.readouterr().err
    assert "checkpoint 6 cannot be read (params: " in said and "resuming from step 4" in said
    assert (workdir / "6.damaged").is_dir()
    assert_ends_like(whole, workdir)
    assert rows_of(workdir)[-1]["lost_seconds"] > 0


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_skipped_and_counted(root, tmp_path, monkeypatch):
    cfg = run(root)
    clean = ClipObjective.loss
    step_key = jax.random.split(jax.random.key(cfg.seed))[1]
    poisoned = jax.random.key_data(jax.random.fold_in(step_key, 2))  # step 3

    def loss(self, module, batch, key, targets=None):
        value, metrics = clean(self, module, batch, key, targets)
        here = jnp.all(jax.random.key_data(key) == poisoned)
        return value * jnp.where(here, jnp.nan, 1), metrics

    monkeypatch.setattr(ClipObjective, "loss", loss)
    train(cfg, tmp_path)
    rows = rows_of(tmp_path)
    assert [bool(np.isnan(row["loss"])) for row in rows] == [n == 3 for n in range(1, 7)]
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    for path, value in parameters(tmp_path).items():
        assert np.isfinite(value).all(), path


@pytest.mark.slow
def test_data_that_cannot_be_read_any_more_end_the_run(root, tmp_path):
    """The file is cut short in mid-epoch. Once it is repaired, the run resumes."""
    copy = shutil.copytree(root, tmp_path / "data")
    file = copy / "train" / "pairs.array_record"
    whole = file.read_bytes()
    stat = file.stat()
    cfg = run(str(copy), steps=100_000)
    workdir = tmp_path / "run"

    def cut_later() -> None:
        while not (workdir / "4").is_dir():
            time.sleep(0.05)
        cut(file)

    cutting = threading.Thread(target=cut_later)
    cutting.start()
    with pytest.raises(UserError) as told:
        train(cfg, workdir)
    cutting.join()
    assert str(file) in str(told.value) and "\n" not in str(told.value)
    saved = checkpoint.latest_step(workdir)
    assert saved >= 4 and all(np.isfinite(v).all() for v in parameters(workdir).values())
    file.write_bytes(whole)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert train(dataclasses.replace(cfg, steps=saved + 2), workdir).step == saved + 2


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_costs_nothing_saved(root, whole, tmp_path):
    size = sum(p.stat().st_size for p in (whole / "6").rglob("*") if p.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.7 * size)}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    # A trace would take room, and how much nobody knows.
    cfg = dataclasses.replace(run(root), profile_steps="")
    try:
        with pytest.raises(UserError) as told:
            train(cfg, disk)
        step = checkpoint.latest_step(disk)
        assert str(told.value) == (
            f"failed to save step {step + 2} to {disk}: No space left on device: fix this and "
            f"rerun; training resumes from step {step}"
        )
        workdir = shutil.copytree(disk, tmp_path / "larger")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    train(cfg, workdir)
    assert_ends_like(whole, workdir)


@pytest.fixture
def signals_after_a_run():
    """Signals that come when the run has ended already interrupt no test."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def interrupt(workdir: Path, first: int, delay: float) -> threading.Thread:
    """Sends two signals to this process, once a run has logged some more steps."""
    log = workdir / "metrics.jsonl"

    def lines() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    before = lines()

    def send() -> None:
        while lines() < before + 3:
            time.sleep(0.01)
        for number in (first, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(delay)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.slow  # a run a signal
def test_the_last_line_of_an_interrupted_run_is_true(
    root, tmp_path, monkeypatch, capsys, signals_after_a_run
):
    """However close together signals come: the step that is named was saved, and the next start
    goes on from there."""
    cfg = dataclasses.replace(run(root, steps=100_000), checkpoint_every=1000, profile_steps="")
    monkeypatch.setattr("emu_jax.train.config_file.load_config", lambda *_: cfg)
    repeat = int(os.environ.get("EMU_JAX_REPEAT", "1"))
    saved = 0
    for first, delays in ((signal.SIGTERM, (0, 0.1)), (signal.SIGINT, (0.03, 1.2))):
        for delay in delays * repeat:
            sender = interrupt(tmp_path, first, delay)
            status = main(["train", "--config", "configs/digits.py", f"--workdir={tmp_path}"])
            sender.join()
            last = capsys.readouterr().err.splitlines()[-1]
            steps = checkpoint.complete_steps(tmp_path)
            if not steps:
                end = f"no step is saved in {tmp_path}: the same command starts from step 0"
            else:
                end = (
                    f"step {max(steps)} is saved in {tmp_path}: run the same command again to "
                    "resume from it"
                )
            assert (status, last) == (130, f"emu-jax: interrupted; {end}")
            if delay < 1:  # one request, which saved
                reached = rows_of(tmp_path)[-1]["step"]
                assert max(steps) == reached >= saved + 3
            saved = max(steps, default=0)
            assert not (tmp_path / "lock.json").exists()
    assert checkpoint.verify_steps(tmp_path, every=True).passed


@pytest.mark.slow
def test_a_bfloat16_first_moment_is_close_to_a_float32_one(root):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    moved = {}
    for dtype in ("float32", "bfloat16"):
        cfg = run(root)
        optimizer = dataclasses.replace(cfg.optimizer, moments_dtype=dtype)
        cfg = dataclasses.replace(cfg, optimizer=optimizer)
        with jax.set_mesh(mesh):
            trainer = Trainer(cfg, mesh)
            state = trainer.init({})
            first = jax.tree.map(np.array, state.trained)
            for leaf in jax.tree.leaves(state.optimizer[1].mu):
                assert leaf.dtype == dtype
            for leaf in jax.tree.leaves(state.optimizer[1].nu):
                assert leaf.dtype == np.float32
            batch = one_batch(cfg, "captions")
            for _ in range(5):
                state, _ = trainer.step(state, batch)
            moved[dtype] = {k: np.asarray(v) - first[k] for k, v in state.trained.items()}
    differ = False
    for path, change in moved["float32"].items():
        error = np.abs(moved["bfloat16"][path] - change).max()
        assert error <= 0.02 * np.abs(change).max(), path
        differ |= error > 0
    assert differ
