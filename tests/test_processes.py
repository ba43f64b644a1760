"""Checkpoints of several processes: each reads back its share, all agree, one lock."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from emu_jax import checkpoint, integrity
from emu_jax.errors import UserError
from emu_jax.train.checkpoints import Checkpoints
from emu_jax.train.distributed import initialize_distributed

COUNT = 3


def main(workdir: Path) -> None:
    """Main function of each process; it prints a JSON object."""
    initialize_distributed()
    mesh = jax.make_mesh((jax.device_count(),), ("rows",))
    sharding = NamedSharding(mesh, PartitionSpec("rows"))
    values = np.arange(6000, dtype=np.float32).reshape(12, 500)

    def items(step: int):
        array = jax.make_array_from_callback(values.shape, sharding, lambda i: values[i] + step)
        return {"params": ocp.args.StandardSave({"a": array})}

    shape = jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=sharding)
    wanted = {"params": ocp.args.StandardRestore({"a": shape})}
    said: dict[str, object] = {}
    read: list[tuple[int, int]] = []
    unreadable_arrays = integrity.unreadable_arrays

    def counted(item, index, count):
        chunks: list[int] = []
        yield from unreadable_arrays(item, index, count, chunks.append)
        read.append((len(chunks), sum(chunks)))

    integrity.unreadable_arrays = counted
    with Checkpoints(workdir, 2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, items(step))
        checkpoints.wait()
    said["read"] = list(read)
    if jax.process_index() == 0:
        said["steps"] = sorted(checkpoint.complete_steps(workdir))
        data = max(
            (workdir / "3" / "params" / "ocdbt.process_1").rglob("*"),
            key=lambda p: p.stat().st_size,
        )
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    ocp.multihost.sync_global_processes("damaged")
    listed: list[Path] = []
    integrity._database = lambda item, context: listed.append(item)
    said |= disagreement(workdir / "other", items, wanted)
    said["listed"] = len(listed)
    with Checkpoints(workdir, 2) as checkpoints:
        step, saved = checkpoints.restore(wanted)
    mine = [
        (np.asarray(s.data) == values[s.index] + step).all()
        for s in saved["params"]["a"].addressable_shards
    ]
    said |= {"restored": step, "right": bool(all(mine))}
    # Somebody else's lock.
    if jax.process_index() == 0:
        (workdir / "lock.json").write_text(json.dumps(json.loads(os.environ["OWNER"])))
    try:
        Checkpoints(workdir, 2).__enter__()
    except UserError as error:
        said["refused"] = str(error)
    print("SAID", json.dumps(said))


def disagreement(workdir: Path, items, wanted) -> dict[str, object]:
    """One process cannot read its share of step 2 back; then the lead alone has lost the lock."""
    workdir.mkdir(exist_ok=True)
    said: dict[str, object] = {}
    unreadable_arrays = integrity.unreadable_arrays
    with Checkpoints(workdir, 2) as checkpoints:
        checkpoints.save(1, items(1))
        checkpoints.wait()
        if jax.process_index() == 1:
            integrity.unreadable_arrays = lambda *_: iter(["a worn disk"])
        checkpoints.save(2, items(2))
        checkpoints._written.result()
        said["unread"] = checkpoints.check()
        said["failed"] = error_of(checkpoints.wait)
        integrity.unreadable_arrays = unreadable_arrays
        said["newest"] = checkpoints.restore(wanted)[0]
        if jax.process_index() == 0:
            (workdir / "lock.json").write_text(json.dumps({"token": "x", "pid": 7, "host": "h"}))
        said["lost"] = error_of(lambda: checkpoints.save(3, items(3)))
    return said


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
        return ""
    except UserError as error:
        return str(error)


@pytest.mark.slow  # three processes start: 15 seconds
def test_three_processes_save_verify_and_restore_as_one(tmp_path):
    from emu_jax.train import lock

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_processes"
    code += f"; test_processes.main(test_processes.Path({str(tmp_path)!r}))"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(COUNT),
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "",
        "OWNER": json.dumps(lock._identity() | {"token": "x", "beat": 0}),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment | {"JAX_PROCESS_ID": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(COUNT)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = []
    for process, (out, err) in zip(processes, ended, strict=True):
        assert process.returncode == 0, err
        said.append(json.loads(out.partition("SAID")[2]))
    assert said[0]["steps"] == [2, 3]
    for one in said:
        assert one["restored"] == 2 and one["right"]
        assert one["refused"].startswith(f"{tmp_path} is in use by process {os.getpid()} on ")
        # A third of the bytes of each of three saves, once.
        assert one["read"] == [[1, 6000 * 4 // COUNT]] * 3
    # What one process finds, all raise.
    assert [one["unread"] for one in said] == [False, True, False]
    other = tmp_path / "other"
    for one in said:
        assert one["failed"] == (
            f"failed to save step 2 to {other}: read back, a worn disk: fix this and rerun; "
            "training resumes from step 1"
        )
        assert one["newest"] == 1 and one["lost"] == said[0]["lost"]
        assert one["lost"].startswith("process 7 on h, since None has taken over")
        assert one["listed"] == 0  # keys of a database: more with more processes
    (aside,) = tmp_path.glob("*.damaged")
    assert aside.name == "3.damaged"
    assert [err.count("checkpoint 3 cannot be read") for _, err in ended] == [1, 0, 0]
