"""Host memory: what restoring and loading hold, and that a long run holds no more with time."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from emu_jax import bench, checkpoint
from emu_jax.sharding import make_mesh
from emu_jax.train.checkpoints import Checkpoints

pytestmark = pytest.mark.optimized


def test_the_peak_is_of_what_was_there_between_two_looks():
    """In a process of its own: others' threads give memory back in the midst of a measurement."""
    program = """if True:
        import os, time
        from emu_jax.host_memory import PeakMemory, anonymous_bytes, resident_bytes
        with PeakMemory() as memory:
            held, end = bytearray(b"1") * 2**26, time.monotonic() + 60
            while memory.peak - memory.before < 2**26 and time.monotonic() < end:
                time.sleep(0.01)
            del held
        assert 2**26 <= memory.peak - memory.before < 2**27
        assert memory.peak - anonymous_bytes() > 2**25
        assert resident_bytes() > anonymous_bytes() > 0
        assert anonymous_bytes(os.getpid()) and anonymous_bytes(2**30) is None
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclasses.dataclass
class Argument:
    """Stands in for orbax's restore arguments of an array."""

    global_shape: tuple[int, ...]
    sharding: NamedSharding | None = None
    dtype: type = np.float32


def test_groups_are_of_what_this_process_holds(monkeypatch):
    monkeypatch.setattr(checkpoint, "_READ_BYTES", 100)
    groups = [[10], [10], [5], [6], [30], [1], [24], [1]]
    assert list(checkpoint._groups([Argument(tuple(s)) for s in groups])) == [3, 1, 1, 2, 1]
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    shapes = [Argument((12,), split), Argument((12,), split), Argument((4,), whole)]
    assert list(checkpoint._groups(shapes)) == [2, 1]
    assert list(checkpoint._groups([])) == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_arrays_are_read_in_groups(dtype, tmp_path, monkeypatch):
    """A run is restored, or a model read, also in another dtype than it was saved in."""
    saved = {f"a{n}": jnp.full((64, 64), n, jnp.float32) for n in range(6)}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, {"params": ocp.args.StandardSave(saved)})
    groups = []
    deserialize = ocp.type_handlers.ArrayHandler.deserialize

    def recorded(self, infos, args=None):
        groups.append([info.name for info in infos])
        return deserialize(self, infos, args)

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", recorded)
    monkeypatch.setattr(checkpoint, "_READ_BYTES", 2 * 64 * 64 * np.dtype(dtype).itemsize)
    device = NamedSharding(make_mesh(devices=jax.devices()[:1]), PartitionSpec())
    shape = jax.ShapeDtypeStruct((64, 64), dtype, sharding=device)
    wanted = dict.fromkeys(saved, shape)
    if dtype == jnp.float32:
        with Checkpoints(tmp_path, 1) as checkpoints:
            arrays = checkpoints.restore({"params": ocp.args.StandardRestore(wanted)})[1]["params"]
    else:
        arrays = checkpoint.read_arrays(tmp_path / "1" / "params", wanted)
    assert groups == [["a0", "a1"], ["a2", "a3"], ["a4", "a5"]]
    for n in range(6):
        np.testing.assert_array_equal(arrays[f"a{n}"], jnp.full((64, 64), n, dtype))


@pytest.mark.slow
def test_memory_does_not_grow_from_save_to_save(tmp_path):
    """Training on the digits in a process of its own, with 40 saves."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""}
    script = bench.benchmarks()["memory"]
    command = [sys.executable, str(script), "soak", "80", "40", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    resident = json.loads(done.stdout.splitlines()[-1])["resident_bytes"]
    print([round(r / 2**20, 1) for r in resident])
    assert len(resident) == 40
    assert max(resident[4:]) < 1.02 * resident[4]
