"""Several processes on one machine train as one, and go on after each of the ways to stop."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import read_documents
from jax.experimental import mesh_utils

from emu_jax import checkpoint
from emu_jax.train.config import EvalConfig, TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train
from emu_jax.train.telemetry.metrics import read_evaluations, read_metrics

pytestmark = pytest.mark.slow

DIGITS = Path(__file__).parent.parent / "configs" / "digits.py"
STEPS = 24
DEVICES = 2  # of each process
# 6 rows are no multiple of the devices; not all of these steps are saved.
EVAL = EvalConfig(every=3, batches=1, batch_size=6)
EVALUATED = range(3, STEPS + 1, 3)
KINDS = ("pairs", "pages", "storyboards")


def shrunk(root: str) -> TrainConfig:
    """configs/digits.py, from nothing, of fewer layers and shorter rows; all of it learns from
    the first steps on."""
    cfg = load_config(TrainConfig, DIGITS, [])
    model = dataclasses.replace(
        cfg.model,
        vision=dataclasses.replace(cfg.model.vision, layers=1),
        llama=dataclasses.replace(cfg.model.llama, layers=1),
    )
    data = dataclasses.replace(
        cfg.data,
        root=root,
        batch_size=8,
        row_tokens=40,
        row_images=4,
        block_documents=64,
        row_group=2,  # each process plans its own rows
    )
    groups = tuple(
        dataclasses.replace(group, lr=1e-3, delay_steps=0, warmup_steps=4)
        for group in cfg.optimizer.groups
    )
    return dataclasses.replace(
        cfg,
        model=model,
        data=data,
        parents={},
        steps=STEPS,
        log_every=1,
        checkpoint_every=4,
        keep_checkpoints=3,
        eval=(EVAL,),
        log_documents=True,
        optimizer=dataclasses.replace(cfg.optimizer, groups=groups),
    )


def scattered(shape: Sequence[int], devices: Sequence[jax.Device], **_) -> np.ndarray:
    """A grid in which the devices of a process are no neighbors, as in a mesh of TPUs."""
    processes = {device.process_index for device in devices}
    each = [[d for d in devices if d.process_index == process] for process in sorted(processes)]
    return np.array([device for row in zip(*each, strict=True) for device in row]).reshape(shape)


def main(root: str, workdir: str, **changes) -> None:
    """Main function of each process."""
    if int(os.environ["JAX_NUM_PROCESSES"]) > 1:
        mesh_utils.create_device_mesh = scattered
    try:
        train(dataclasses.replace(shrunk(root), **changes), Path(workdir))
    except KeyboardInterrupt:
        sys.exit(130)


class Job:
    """A run on some processes, of two CPU devices each, which are `scattered`.

    Args:
        changes: to `shrunk`, as source code.
    """

    def __init__(
        self, count: int, root: str, workdir: Path, devices: int = DEVICES, changes: str = ""
    ):
        from conftest import UNOPTIMIZED  # not in the processes: it gives them other devices

        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        code += "import test_restarts; from emu_jax.train.config import MeshConfig; "
        code += f"test_restarts.main({root!r}, {str(workdir)!r}, {changes})"
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "NPROC": "16",  # see `test_train.passes_with_more_threads`
            "XLA_FLAGS": UNOPTIMIZED,  # what is compared is compiled alike
        }
        self.logs = [workdir.with_name(f"{workdir.name}.{n}.log") for n in range(count)]
        self.processes = []
        for n, log in enumerate(self.logs):
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment | {"JAX_PROCESS_ID": str(n)},
                )
            self.processes.append(process)

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def wait_for(self, condition, seconds: float = 500) -> None:
        for _ in range(int(seconds / 0.02)):
            if condition():
                return
            assert all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.02)
        raise AssertionError("it did not happen:\n" + self.said())

    def finish(self, status: int = 0) -> None:
        try:
            for process in self.processes:
                assert process.wait(timeout=500) == status, self.said()
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    return read_metrics(workdir)["digits"]


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows_of(workdir)}


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    place = workdir / str(checkpoint.latest_step(workdir)) / "params"
    shapes = checkpoint.stored_shapes(place)
    wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in shapes.items()}
    return jax.tree.map(np.asarray, checkpoint.read_arrays(place, wanted))


@pytest.fixture(scope="module")
def root(tmp_path_factory, copy_digits):
    return str(copy_digits(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(root, runs):
    """The uninterrupted run of one process, with one device."""
    Job(1, root, runs / "one", devices=1).finish()
    return runs / "one"


@pytest.fixture(scope="module")
def two(root, runs):
    """The uninterrupted run of two processes."""
    Job(2, root, runs / "two").finish()
    return runs / "two"


@pytest.fixture(scope="module")
def killed(root, runs):
    """A run of two processes, the second of which was killed behind a checkpoint."""
    workdir = runs / "killed"
    job = Job(2, root, workdir)
    job.wait_for(lambda: any((workdir / str(step)).exists() for step in (8, 12)))
    job.processes[1].kill()
    job.kill()  # the other waits for it: whoever launched them ends it
    assert 8 <= checkpoint.latest_step(workdir) < STEPS, "it was over before the signal came"
    return workdir


def assert_same_losses(found: dict[int, float], expected: dict[int, float]) -> None:
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step


def evaluations(workdir: Path) -> dict[int, dict[str, float]]:
    """{step: metrics} of the held-out losses."""
    rows = read_evaluations(workdir)["heldout"]
    left_out = ("stage", "evaluation", "step", "time", "seconds")
    found = [{k: v for k, v in row.items() if k not in left_out} for row in rows]
    assert all(f"{kind}/text_loss" in row for row in found for kind in KINDS)
    assert len({row["step"] for row in rows}) == len(rows), "one ran twice"
    return {row["step"]: values for row, values in zip(rows, found, strict=True)}


def assert_same_evaluations(found: Path, expected: Path, steps: Sequence[int] = EVALUATED) -> None:
    ours, theirs = evaluations(found), evaluations(expected)
    assert list(ours) == list(steps)
    for step, values in ours.items():
        assert values.keys() == theirs[step].keys()
        for name, value in values.items():
            assert value == pytest.approx(theirs[step][name], rel=1e-5, abs=1e-7), (step, name)


def sorted_documents(workdir: Path) -> dict[int, list[tuple[str, int]]]:
    return {step: sorted(documents) for step, documents in read_documents(workdir).items()}


def test_two_processes_train_as_one(one, two):
    assert list(losses(one)) == list(losses(two)) == list(range(1, STEPS + 1))
    assert_same_losses(losses(two), losses(one))
    assert_same_evaluations(two, one)
    assert sorted_documents(two) == sorted_documents(one)


def test_processes_that_share_rows_train_as_one(root, runs, one):
    """Processes 0 and 1 have shares 0 and 2 of four, processes 2 and 3 the others."""
    workdir = runs / "shared"
    Job(4, root, workdir, changes="mesh=MeshConfig(context=2)").finish()
    assert list(losses(workdir)) == list(losses(one))
    assert_same_losses(losses(workdir), losses(one))
    assert_same_evaluations(workdir, one)
    assert sorted_documents(workdir) == sorted_documents(one)


def test_evaluation_changes_nothing_that_is_trained(root, runs, two):
    Job(2, root, runs / "plain", changes="eval=()").finish()
    assert losses(runs / "plain") == losses(two)
    expected, found = parameters(runs / "plain"), parameters(two)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_killed_run_ends_bit_identical(root, runs, two, killed):
    workdir = shutil.copytree(killed, runs / "again")
    Job(2, root, workdir).finish()
    assert losses(workdir) == losses(two)
    assert evaluations(workdir) == evaluations(two)
    expected, found = parameters(two), parameters(workdir)
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_killed_run_goes_on_with_other_numbers_of_processes(root, runs, two, killed):
    """On four, until a signal to one of them stops all with a checkpoint, then on one."""
    workdir = shutil.copytree(killed, runs / "others")
    started, first = time.time(), checkpoint.latest_step(workdir) + 1
    job = Job(4, root, workdir)

    def new_steps() -> int:
        return sum(r["step"] >= first and r["time"] > started for r in rows_of(workdir))

    job.wait_for(lambda: new_steps() >= 2)
    job.processes[2].send_signal(signal.SIGTERM)
    job.finish(status=130)
    step = checkpoint.latest_step(workdir)
    assert first < step < STEPS, "it was over before the signal came"
    assert list(losses(workdir)) == list(range(1, step + 1))
    assert max(sorted_documents(workdir)) == step
    # One that was due at the last step may wait for the run to resume.
    rows = [done for done in evaluations(workdir) if done < step]
    assert rows == [done for done in EVALUATED if done < step]
    assert parameters(workdir).keys() == parameters(two).keys()
    assert not list(workdir.glob("*.orbax-checkpoint-tmp"))

    Job(1, root, workdir).finish()
    assert list(losses(workdir)) == list(range(1, STEPS + 1))
    assert_same_losses(losses(workdir), losses(two))
    assert_same_evaluations(workdir, two)
    assert sorted_documents(workdir) == sorted_documents(two)
    expected, found = parameters(two), parameters(workdir)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-4, err_msg=path)
