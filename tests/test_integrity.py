"""Damage within a checkpoint's files is found by everything that reads it."""

import asyncio
import gc
import json
import logging
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src import asyncio_utils
from orbax.checkpoint._src.serialization import tensorstore_utils
from orbax.checkpoint.experimental import v1

from emu_jax import checkpoint, integrity
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.train import checkpoints as checkpoints_module
from emu_jax.train.checkpoints import Checkpoints


def state(step: int):
    rng = np.random.default_rng(step)
    params = {
        "a": {"wide": rng.normal(size=(64, 96)), "low": rng.normal(size=(32, 16))},
        "scale": rng.normal(size=(8,)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    params["a"]["low"] = params["a"]["low"].astype(jnp.bfloat16)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"params": params, "optimizer": {"mu": zeros, "count": jnp.int32(step)}}


def items(step: int):
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in state(step).items()}
    return arrays | {"position": ocp.args.JsonSave({"step": step, "groups": [[step, 0]]})}


def wanted():
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state(0))
    arrays = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
    return arrays | {"position": ocp.args.JsonRestore()}


def flat_params(step: int):
    flat = checkpoint.flatten(state(step)["params"])
    return flat, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flat.items()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run directory with two steps."""
    # Each damaged step is collected, which takes seconds if earlier files left millions of objects.
    gc.freeze()
    workdir = tmp_path_factory.mktemp("sound")
    with Checkpoints(workdir, 10) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, items(step))
    return workdir


def assert_equal(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def resumed(workdir: Path) -> int:
    """The step that a run goes on from, whose values are right."""
    with Checkpoints(workdir, 10) as checkpoints:
        step, saved = checkpoints.restore(wanted())
    assert saved["position"] == {"step": step, "groups": [[step, 0]]}
    assert_equal({k: saved[k] for k in ("params", "optimizer")}, state(step))
    return step


def loads(workdir: Path, step: int = 2) -> bool:
    """Returns whether the parameters load, and checks those that do."""
    expected, shapes = flat_params(step)
    try:
        assert_equal(checkpoint.read_arrays(workdir / str(step) / "params", shapes), expected)
        return True
    except UserError as error:
        assert "\n" not in str(error)
        return False


def flip(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def hole(content: bytes, rng: random.Random) -> bytes:
    """A block that was never written, as after a power cut."""
    size = min(len(content), 512)
    at = rng.randrange(len(content) - size + 1)
    return content[:at] + bytes(size) + content[at + size :]


def assert_damage_is_found(sound: Path, workdir: Path, file: Path, content: bytes) -> None:
    """Replaces a file of step 2 of a copy, and sees that a run, loading and verification notice,
    unless no value has changed; the copy is as before afterwards."""
    place, before = workdir / file, (workdir / file).read_bytes()
    if content == before:
        return
    place.write_bytes(content)
    report = checkpoint.verify_steps(workdir)
    (problems,) = [step.problems for step in report.steps]
    loaded = loads(workdir)
    if file.parts[1] == "params" and not loaded:
        assert problems, "verification finds what loading finds"
    if step := resumed(workdir):
        assert (workdir / "1").is_dir()
        aside = workdir / "2.damaged"
        assert aside.is_dir() == (step == 1)
        if aside.is_dir():
            assert problems, "verification finds what a run finds"
            aside.rename(workdir / "2")
    place.write_bytes(before)


def files_of(sound: Path) -> list[Path]:
    return [p.relative_to(sound) for p in sorted((sound / "2").rglob("*")) if p.is_file()]


def test_a_flipped_bit_in_any_kind_of_file_is_found(sound, tmp_path):
    """One bit in the middle of the data of a large array, of each file that has a value."""
    workdir = shutil.copytree(sound, tmp_path / "run")
    data = max((sound / "2" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    place = data.relative_to(sound)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    for file in (place, Path("2/params/_METADATA"), Path("2/position/metadata")):
        damaged = flip((sound / file).read_bytes(), random.Random(0))
        (workdir / file).write_bytes(content if file == place else damaged)
        assert not checkpoint.verify_steps(workdir).passed
        assert loads(workdir) == (file.parts[1] != "params")
        assert resumed(workdir) == 1
        (workdir / "2.damaged").rename(workdir / "2")
        shutil.copy(sound / file, workdir / file)
    assert resumed(workdir) == 2 and loads(workdir)


@pytest.mark.slow  # everything that reads a step, 110 times; EMU_JAX_REPEAT=5: 500 flips, 50 holes
def test_every_flipped_bit_and_hole_that_changes_a_value_is_found(sound, tmp_path):
    workdir = shutil.copytree(sound, tmp_path / "run")
    rng, files = random.Random(7), files_of(sound)
    sizes = [(sound / file).stat().st_size for file in files]
    for number in range(110 * int(os.environ.get("EMU_JAX_REPEAT", "1"))):
        # Half of them anywhere, half in each file alike.
        file = rng.choices(files, sizes)[0] if number % 2 else files[number % len(files)]
        content = (sound / file).read_bytes()
        damage = hole if number % 11 == 10 else flip
        assert_damage_is_found(sound, workdir, file, damage(content, rng))
    assert resumed(workdir) == 2


def test_the_host_that_writes_an_array_adds_checksums_to_its_chunks(sound, tmp_path):
    """By both of orbax's interfaces: training's, and conversion's."""
    v1.partial.save(tmp_path / "new", state(1)["params"])
    v1.partial.finalize(tmp_path / "new")
    for item in (sound / "2" / "params", sound / "2" / "optimizer", tmp_path / "new" / "state"):
        assert integrity._has_checksums(item)


@pytest.mark.parametrize("theirs", [None, lambda shape, chunk_shape: {}])
def test_an_orbax_that_would_write_no_checksums_is_refused(theirs, monkeypatch):
    if theirs is None:
        monkeypatch.delattr(tensorstore_utils, "_build_zarr3_metadata")
    else:
        monkeypatch.setattr(tensorstore_utils, "_build_zarr3_metadata", theirs)
    with pytest.raises(UserError, match=r"orbax-checkpoint [\d.]+ would write .* pip install orb"):
        integrity._choose_codecs()


def test_shares_of_a_step_are_read_once(sound):
    item, read = sound / "2" / "params", []
    for index in range(3):
        mine: list[int] = []
        assert not list(integrity.unreadable_arrays(item, index, 3, mine.append))
        read.append(mine)
    sizes = [a.nbytes for a in jax.tree.leaves(state(2)["params"])]
    assert sorted(sum(read, [])) == sorted(sizes) and all(read)


def test_shares_of_an_array_of_many_chunks_are_read_once(tmp_path, monkeypatch):
    """Neither divides the other evenly: the array into chunks, the chunks into shares."""
    monkeypatch.setattr(checkpoints_module, "CHUNK_BYTES", 2**11)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, items(1))
    read = []
    for index in range(3):
        mine: list[int] = []
        item = tmp_path / "1" / "params"
        assert not list(integrity.unreadable_arrays(item, index, 3, mine.append))
        read.append(mine)
    whole: list[int] = []
    assert not list(integrity.unreadable_arrays(item, progress=whole.append))
    counts = [len(mine) for mine in read]
    assert sorted(sum(read, [])) == sorted(whole) and sum(counts) > 12
    assert max(counts) - min(counts) <= 1


def test_a_checkpoint_without_checksums_is_read_with_a_warning(tmp_path, caplog):
    ocp.PyTreeCheckpointer().save(tmp_path / "1" / "params", state(1)["params"])
    assert loads(tmp_path, 1) and loads(tmp_path, 1)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "has no checksums (an older version wrote it): read unverified"
    )
    report = checkpoint.verify_steps(tmp_path)
    assert report.passed and not report.steps[0].verified


def test_checksums_that_are_gone_are_damage(sound, tmp_path):
    workdir = shutil.copytree(sound, tmp_path / "run")
    (workdir / "2" / integrity.CHECKSUMS).unlink()
    assert not loads(workdir) and resumed(workdir) == 1


def test_verify_says_what_is_damaged(sound, tmp_path, capsys):
    workdir = shutil.copytree(sound, tmp_path / "run")
    command = ["checkpoint", "verify", str(workdir)]
    assert main([*command, "--all", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(s["path"], s["verified"]) for s in report["steps"]] == [
        (str(workdir / "1"), True),
        (str(workdir / "2"), True),
    ]
    assert report["steps"][0]["bytes"] == sum(a.nbytes for a in jax.tree.leaves(state(1)))
    (workdir / "2" / "position" / "metadata").write_text("{}")
    data = max((workdir / "2" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert main(command) == 1
    first, *problems = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{workdir / '2'}: ") and first.endswith("damaged")
    assert f"{workdir}/2/position/metadata is damaged (checksum mismatch)" in problems[0]
    assert f"{workdir}/2/params: a." in problems[1] and problems[1].endswith(": checksum mismatch")
    assert main([*command, "--step", "1"]) == 0
    assert main([*command, "--step", "7"]) == 2
    assert capsys.readouterr().err.endswith("has no step 7: it has 1, 2\n")


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?", "back\\slash"])
def test_a_path_that_is_a_pattern_is_refused_at_the_start(name, tmp_path):
    with pytest.raises(UserError, match="the path contains "), Checkpoints(tmp_path / name, 1):
        pass


def test_odd_paths_work(tmp_path):
    workdir = tmp_path / "a %20\n'é漢#{}$HOME\""
    workdir.mkdir()
    with Checkpoints(workdir, 10) as checkpoints:
        checkpoints.save(2, items(2))
    assert resumed(workdir) == 2 and loads(workdir)


def test_a_save_that_cannot_be_read_back_ends_the_run_and_older_ones_stay(tmp_path, monkeypatch):
    seal = integrity.seal

    def damage(step: Path) -> None:
        seal(step)
        data = max((step / "params").rglob("*"), key=lambda p: p.stat().st_size)
        data.write_bytes(flip(data.read_bytes(), random.Random(1)))

    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, items(1))
        checkpoints.wait()
        monkeypatch.setattr(integrity, "seal", damage)
        checkpoints.save(2, items(2))
        with pytest.raises(UserError, match="failed to save step 2 to .*: read back, .*params"):
            checkpoints.wait()
    assert (tmp_path / "1").is_dir() and (tmp_path / "2.damaged").is_dir()
    assert resumed(tmp_path) == 1


def test_only_directories_are_steps(sound, tmp_path):
    workdir = shutil.copytree(sound, tmp_path / "run")
    (workdir / "20241128").write_text("a note")
    (workdir / "²").mkdir()
    assert checkpoint.latest_step(workdir) == 2 and resumed(workdir) == 2


@pytest.mark.parametrize("name", [".", "../b"])
def test_a_base_that_is_based_on_its_user_is_one_line(name, tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
    (tmp_path / "a" / "base.json").write_text(json.dumps({"llama": name}))
    (tmp_path / "b" / "base.json").write_text(json.dumps({"llama": "../a"}))
    with pytest.raises(UserError, match="which is based on it itself"):
        checkpoint.base_of(tmp_path / "a")


def test_tracebacks_of_failed_saves_alone_are_silenced(tmp_path, caplog):
    absl = logging.getLogger("absl")

    def fail() -> None:
        try:
            ocp.PyTreeCheckpointer().restore(tmp_path / "missing")
        except Exception as error:
            absl.exception("orbax's")
            try:
                raise ValueError("caused by orbax") from error
            except ValueError:
                absl.exception("caused by orbax's")

    with integrity.quiet_failures():
        try:
            raise RuntimeError("of a library that nobody speaks for")
        except RuntimeError:
            absl.exception("shown")
        fail()
    said = [record.getMessage() for record in caplog.records if record.exc_info]
    assert said == ["shown"]
    fail()
    assert caplog.records[-1].getMessage() == "caused by orbax's", "the filter has gone"


def test_a_failed_read_waits_for_those_beside_it():
    """TensorStore prints a traceback for each that ends when their event loop is closed."""
    ended = []

    async def read(seconds: float, error: Exception | None) -> None:
        await asyncio.sleep(seconds)
        ended.append(seconds)
        if error is not None:
            raise error

    async def read_all() -> None:
        await asyncio.gather(
            read(0, ValueError("damaged")), read(0.02, None), read(0.01, OSError())
        )

    with pytest.raises(ValueError, match="damaged"):
        asyncio_utils.run_sync(read_all())
    assert ended == [0, 0.01, 0.02]
