"""The training step on any mesh, restarts, and what ends a run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from conftest import UNOPTIMIZED, as_emu2

from emu_jax import checkpoint
from emu_jax.config import RematConfig, TokenIds, digits, load_json, to_dict
from emu_jax.data.pipeline import Batches
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.sharding import batch_sharding, make_mesh
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import (
    OBJECTIVE_TRAITS,
    EvalConfig,
    GroupConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    digits_data,
)
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train
from emu_jax.train.optimizer import make_optimizer
from emu_jax.train.step import Trainer
from emu_jax.train.telemetry.metrics import read_metrics

DECODERS = [name for name, traits in OBJECTIVE_TRAITS.items() if traits.trains_unet]
CONFIGS = Path(__file__).parent.parent / "configs"
MESHES = {
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "mixed": (2, 2, 2),
    "context": (2, 2, 1, 2),
    "longer context": (1, 2, 1, 4),
    "rows, heads and context": (1, 2, 2, 2),
}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory, copy_digits):
    return str(copy_digits(tmp_path_factory.mktemp("digits")))


def small(objective: str, root: str, **changes) -> TrainConfig:
    """A stage of the digits, small enough to compile in seconds: of an objective, or Emu2's second
    stage ("emu2")."""
    model = digits()
    model = dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, layers=2),
        llama=dataclasses.replace(model.llama, layers=2),
        unet=dataclasses.replace(
            model.unet,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
    )
    if objective in ("painter", "emu2"):
        model = as_emu2(model)
    trained = {"emu2": r"^(?!visual\.)"} | dict.fromkeys(DECODERS, "^unet")
    group = GroupConfig(trained.get(objective, ".*"), lr=1e-3)
    cfg = TrainConfig(
        objective="emu" if objective == "emu2" else objective,
        model=model,
        dtype="float32",
        steps=6,
        log_every=1,
        checkpoint_every=2,
        data=digits_data(root=root, batch_size=8, row_tokens=40, row_images=4, block_documents=64),
        optimizer=OptimizerConfig(groups=(group, GroupConfig(".*", lr=0.0))),
    )
    return dataclasses.replace(cfg, **changes)


def one_batch(cfg: TrainConfig, kind: str):
    with Batches(cfg.data, Tokenizer.load(Path(cfg.data.root) / "tokenizer"), kind) as batches:
        return next(batches)


def loss_and_gradients(cfg: TrainConfig, mesh, params=None):
    """(loss, {path: gradient}, parameters) as numpy, computed on `mesh`, and the FLOPs of one of
    its devices."""
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        batch = one_batch(cfg, trainer.objective.batch_kind)
        shardings = trainer.template.shardings
        params = trainer.template.init() if params is None else jax.device_put(params, shardings)
        batch = jax.device_put(batch, batch_sharding(mesh))

        def loss_fn(trained, frozen, batch):
            return trainer.loss(trained | frozen, batch, np.int32(0))[0]

        trained = {k: params[k] for k in trainer.trained}
        frozen = {k: params[k] for k in trainer.frozen}
        step = jax.jit(jax.value_and_grad(loss_fn)).lower(trained, frozen, batch).compile()
        loss, grads = step(trained, frozen, batch)
        to_numpy = lambda tree: jax.tree.map(np.asarray, tree)  # noqa: E731
        flops = step.cost_analysis()["flops"]
        return float(loss), to_numpy(grads), to_numpy(params), flops


OTHERS = ("clip", "vae", "decoder", "painter", "emu2")


def passes_with_more_threads(request: pytest.FixtureRequest) -> bool:
    """Runs a test in a process with 16 threads for JAX's CPU devices; False in that process.

    With a thread for each core, devices that wait in different collectives may hold all threads,
    and the process is aborted. Meshes with `context` have such collectives.
    """
    if os.environ.get("NPROC"):
        return False
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", request.node.nodeid]
    done = subprocess.run(
        command,
        env=environment | {"NPROC": "16"},
        cwd=request.config.rootpath,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return True


@pytest.fixture
def one_device(monkeypatch):
    """As on a machine with a single device, where programs compile sooner."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.mark.parametrize(
    "objective, meshes",
    [
        ("emu", ["rows, heads and context"]),
        # The multimodal step is the one that must hold on every kind of mesh.
        pytest.param("emu", ["data", "fsdp", "tensor", "mixed"], marks=pytest.mark.slow),
        pytest.param("emu", ["context", "longer context"], marks=pytest.mark.slow),
        pytest.param("emu2", ["context"], marks=pytest.mark.slow),
        *(pytest.param(name, ["mixed"], marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_step_is_the_same_on_every_mesh(objective, meshes, data_root, request):
    if "context" in meshes[0] and passes_with_more_threads(request):
        return
    cfg = small(objective, data_root)
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    loss, grads, params, flops = loss_and_gradients(cfg, one)
    assert np.isfinite(loss) and any(np.abs(g).max() > 0 for g in grads.values())
    for name in meshes:
        mesh = make_mesh(*MESHES[name])
        other_loss, other_grads, _, share = loss_and_gradients(cfg, mesh, params)
        if "context" in name:
            # Its devices compute parts of rows. At most 0.35 of the work is done by each of them:
            # 0.56 without a split of tokens, 0.74 without one of images.
            assert share < (1 + 0.35 * (mesh.shape["context"] - 1)) * flops / mesh.size
        assert abs(other_loss - loss) <= 1e-5 * abs(loss), name
        # Some gradients are zero in theory: measured against the tower's largest.
        for tower in {path.split(".")[0] for path in grads}:
            paths = [path for path in grads if path.split(".")[0] == tower]
            largest = max(np.abs(grads[path]).max() for path in paths)
            for path in paths:
                error = np.abs(other_grads[path] - grads[path]).max()
                assert error <= 1e-5 * largest, (name, path, error / largest)


@pytest.mark.slow
def test_statistics_by_tower_are_the_same_on_every_mesh(data_root):
    cfg = small("clip", data_root, tower_metrics=True)
    found = []
    for mesh in (make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(*MESHES["mixed"])):
        with jax.set_mesh(mesh):
            trainer = Trainer(cfg, mesh)
            batch = jax.device_put(one_batch(cfg, "captions"), batch_sharding(mesh))
            state, metrics = trainer.step(trainer.init({}), batch)
            metrics |= trainer.tower_metrics(state)
        found.append({name: float(value) for name, value in metrics.items()})
        if mesh.size == 1:
            with jax.set_mesh(mesh):
                plain = Trainer(dataclasses.replace(cfg, tower_metrics=False), mesh)
                without, _ = plain.step(plain.init({}), batch)
            for path, value in without.trained.items():  # they change no parameter
                np.testing.assert_array_equal(state.trained[path], value, err_msg=path)
    one, split = found
    towers = {path.split(".")[0] for path in trainer.trained}
    assert {"visual", "text"} <= towers
    for name in ("grad_norm", "update_ratio", "lr"):
        for tower in towers:
            key = f"{name}/{tower}"
            assert one[key] >= 0 and split[key] == pytest.approx(one[key], rel=1e-5), key
    whole = sum(one[f"grad_norm/{tower}"] ** 2 for tower in towers) ** 0.5
    assert whole == pytest.approx(one["grad_norm"], rel=1e-6)


def test_the_text_objective_reads_the_words_alone(data_root):
    """Its loss, in blocks, is the naive one over text targets; images change nothing."""
    cfg = small("text", data_root, loss_block=16)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        params = trainer.template.init()
        batch = one_batch(cfg, "rows")
        loss = jax.jit(lambda p, b: trainer.loss(p, b, np.int32(0))[0])
        llama = trainer.template.module(params).llama
        x = llama.embed_tokens(batch["tokens"])
        logits = llama.logits(llama(x, batch["positions"], batch["segment_ids"]))[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        mask = batch["text_loss_mask"][:, 1:] & same
        expected = float(np.sum(losses * mask) / np.sum(mask))
        assert float(loss(params, batch)) == pytest.approx(expected, rel=1e-6)
        assert all(path.startswith("llama.") for path in params)
        blank = batch | {"images": np.zeros_like(batch["images"])}
        assert float(loss(params, blank)) == float(loss(params, batch))


@pytest.mark.slow
@pytest.mark.parametrize("name, parts", [("one", 4), ("mixed", 2), ("context", 2)])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, parts, data_root, request):
    if name == "context" and passes_with_more_threads(request):
        return
    cfg = small("emu", data_root, regression_weight=2.0)
    assert cfg.model.cformer.dropout == 0, "what is dropped would follow the parts"
    mesh = make_mesh(*MESHES[name]) if name in MESHES else make_mesh(devices=jax.devices()[:1])
    batch = one_batch(cfg, "rows")
    batch["text_loss_mask"][0] = False  # so that parts differ in how many targets they have
    found = []
    with jax.set_mesh(mesh):
        for accumulate in (1, parts):
            trainer = Trainer(dataclasses.replace(cfg, accumulate=accumulate), mesh)
            state = trainer.init({})
            placed = jax.device_put(batch, batch_sharding(mesh))
            (loss, metrics), grads = jax.jit(trainer.gradients)(state, placed)
            found.append((metrics | {"loss": loss}, jax.tree.map(np.asarray, grads)))
    (whole, whole_grads), (summed, summed_grads) = found
    for metric in ("loss", "text_loss", "regression_loss"):
        assert float(summed[metric]) == pytest.approx(float(whole[metric]), rel=1e-5)
    largest = max(np.abs(g).max() for g in whole_grads.values())
    for path, grad in whole_grads.items():
        assert np.abs(summed_grads[path] - grad).max() <= 1e-5 * largest, path
    assert largest > 0


def test_what_compares_rows_is_not_cut_into_parts(data_root, tmp_path):
    with pytest.raises(UserError, match="set accumulate to 1"):
        small("clip", data_root, accumulate=2)
    with pytest.raises(UserError, match="make it a multiple of 24"):
        train(small("emu", data_root, accumulate=3), tmp_path)


def test_rows_that_a_mesh_cannot_split_are_refused(data_root):
    cfg = small("emu", data_root)
    mesh = make_mesh(data=2, context=4)
    for change, message in (
        ({"row_tokens": 42}, "data.row_tokens is 42, which the mesh's context = 4 does not divide"),
        ({"row_images": 6}, "data.row_images is 6, which the mesh's context = 4 does not divide"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **change)), mesh)
    source = SourceConfig("long", paths=("long.arrayrecord",), row_tokens=42)
    held_out = EvalConfig("books", sources=(source,))
    message = r"row_tokens of source 'long' \(evaluation 'books'\) is 42, which"
    with pytest.raises(UserError, match=message):
        Trainer(dataclasses.replace(cfg, eval=(held_out,)), mesh)
    with pytest.raises(UserError, match="heads is 4, which the mesh's context x tensor = 8 does"):
        Trainer(cfg, make_mesh(tensor=2, context=4))
    with pytest.raises(UserError, match="objective 'clip' reads no rows of tokens"):
        Trainer(small("clip", data_root), mesh)


def test_parameters_are_split_over_the_mesh(data_root):
    cfg = small("emu", data_root)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        state = trainer.init({})
        assert state.optimizer[1].mu.keys() == state.trained.keys()
        for tree in (state.trained, state.optimizer[1].mu, state.optimizer[1].nu):
            kernel = tree["llama.layers.mlp.gate_proj.kernel"]
            assert kernel.sharding.shard_shape(kernel.shape) == (2, 64, 176)
        table = state.trained["llama.embed_tokens.embedding"]
        assert table.sharding.shard_shape(table.shape) == (176, 64)


def parameters(directory: Path):
    step = checkpoint.latest_step(directory)
    shapes = checkpoint.stored_shapes(directory / str(step) / "params")
    wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in shapes.items()}
    return jax.tree.map(
        np.asarray, checkpoint.read_arrays(directory / str(step) / "params", wanted)
    )


STEPS = 80  # of the runs that are stopped
COMMAND = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_train
from emu_jax.train.loop import train
cfg = test_train.small({objective!r}, {root!r}, steps={steps}, checkpoint_every={every})
train(cfg, Path({workdir!r}))
"""


def run_in_process(root, workdir, objective, every=1000):
    """A run on one device, with JAX's own asynchronous dispatch.

    Writing a checkpoint takes as long as several steps.
    """
    tests = str(Path(__file__).parent)
    code = COMMAND.format(
        tests=tests,
        root=root,
        workdir=str(workdir),
        objective=objective,
        every=every,
        steps=STEPS,
    )
    environment = os.environ | {
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "true",
        "XLA_FLAGS": f"{UNOPTIMIZED} --xla_force_host_platform_device_count=1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process):
    said = process.communicate()[1]
    assert process.returncode == 0, said


def wait_for(condition, process):
    for _ in range(10000):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("it did not happen")


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective, stops",
    [
        ("emu", (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
        ("emu2", (signal.SIGTERM,)),
        ("painter", (signal.SIGKILL,)),
    ],
)
def test_stopped_run_ends_bit_identical(objective, stops, data_root, tmp_path):
    """However often it is stopped: as a run that was not."""
    workdir, saved = tmp_path / "stopped", 0
    workdir.mkdir()
    for how in stops:
        killed, started = how == signal.SIGKILL, time.time()
        # A kill loses what came after the last checkpoint; other signals must save by themselves.
        process = run_in_process(data_root, workdir, objective, 4 if killed else 1000)

        def under_way(killed=killed, started=started, saved=saved):
            if killed:
                return max(checkpoint.complete_steps(workdir), default=0) >= saved + 8
            if not (workdir / "metrics.jsonl").exists():
                return False
            rows = read_metrics(workdir).get("emu", [])
            return sum(row["time"] > started for row in rows) >= 5

        wait_for(under_way, process)
        process.send_signal(how)
        process.communicate()
        before, saved = saved, checkpoint.latest_step(workdir)
        assert before < saved < STEPS, "it was over before the signal came"
    finish(run_in_process(data_root, workdir, objective))

    finish(run_in_process(data_root, tmp_path / "whole", objective))
    found, expected = parameters(workdir), parameters(tmp_path / "whole")
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(value, found[path], err_msg=path)
    assert [r["step"] for r in read_metrics(workdir)["emu"]] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_two_processes_train_as_one(data_root, tmp_path):
    """`launch/local.sh 2` with two devices each, against one process of four."""
    script = Path(__file__).parent.parent / "launch" / "local.sh"
    config = tmp_path / "config.py"
    config.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_train\n"
        "from emu_jax.train.config import config_dict\n"
        f"get_config = lambda: config_dict(test_train.small('emu', {data_root!r}))\n"
    )
    command = str(Path(sys.executable).parent / "emu-jax")
    environment = os.environ | {"EMU_JAX": command, "XLA_FLAGS": UNOPTIMIZED}
    for count, devices in ((1, 4), (2, 2)):
        workdir = tmp_path / str(count)
        done = subprocess.run(
            [str(script), str(count), "--config", str(config), "--workdir", str(workdir)],
            env=environment | {"DEVICES": str(devices)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / n)["emu"] for n in ("1", "2"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_optimizer_is_optaxs(moments):
    """But that it stays where it is when a step is not finite; and it copies no float32 moments."""
    groups = (GroupConfig("bias", lr=0.1, decay="constant"), GroupConfig(lr=0.2, decay="constant"))
    cfg = OptimizerConfig(groups=groups, clip_norm=2.0, moments_dtype=moments)
    shapes = {"kernel": (300, 400), "bias": (4,)}
    draw = lambda seed: {n: jax.random.normal(jax.random.key(seed), shapes[n]) for n in shapes}  # noqa: E731
    ours = make_optimizer(cfg, 9, draw(0))
    theirs = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=moments),
        optax.add_decayed_weights(cfg.weight_decay, {"kernel": True, "bias": False}),
        optax.partition(
            {"a": optax.scale(-0.2), "b": optax.scale(-0.1)}, {"kernel": "a", "bias": "b"}
        ),
    )

    def step(grads, state, finite):
        params, state = state
        norm = optax.tree.norm(grads)
        updates, state = ours.update(grads, state, params, norm=norm, finite=finite)
        return optax.apply_updates(params, updates), state

    compiled = (
        jax.jit(step, donate_argnums=1)
        .lower(draw(0), (draw(0), ours.init(draw(0))), True)
        .compile()
    )
    if moments == "float32":
        assert compiled.memory_analysis().temp_size_in_bytes < 300 * 400

    run = lambda *x: compiled(*jax.tree.map(jax.numpy.array, x))  # noqa: E731 (what it gets is used up)
    found = draw(0), ours.init(draw(0))
    wanted, kept = draw(0), theirs.init(draw(0))
    for seed, scale in enumerate((0.001, 5.0, 0.0, 5.0)):  # below and above what is clipped
        grads = jax.tree.map(lambda g, scale=scale: scale * g, draw(9 + seed))
        updates, kept = jax.jit(theirs.update)(grads, kept, wanted)
        wanted = optax.apply_updates(wanted, updates)
        found = run(grads, found, True)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[0][name], value, rtol=2e-5, atol=2e-6)
        _, stayed = run(grads | {"bias": grads["bias"].at[0].set(np.nan)}, found, False)
        jax.tree.map(np.testing.assert_array_equal, stayed, found[1])
        assert found[1][1].mu["kernel"].dtype == moments


@pytest.mark.slow
def test_documents_of_a_row_do_not_see_each_other(data_root):
    """Neither text nor padding of another document changes a document's hidden states."""
    cfg = small("emu", data_root)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        params = trainer.template.init()
        module = trainer.template.module(params)
        batch = one_batch(cfg, "rows")
        segments = batch["segment_ids"]
        assert (segments == 0).any() and (segments == 2).any()

        def hidden(tokens):
            x = module.embed(tokens)
            return np.asarray(module.llama(x, batch["positions"], segments))

        before = hidden(batch["tokens"])
        for other in (0, 1):
            after = hidden(np.where(segments == other, 5, batch["tokens"]))
            np.testing.assert_allclose(after[segments == 2], before[segments == 2], atol=1e-6)
            assert np.abs(after[segments == other] - before[segments == other]).max() > 1e-3

        loss = float(trainer.loss(params, batch, np.int32(0))[0])
        padded = batch | {"tokens": np.where(segments == 0, 5, batch["tokens"])}
        changed = float(trainer.loss(params, padded, np.int32(0))[0])
        assert changed == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    "objective", ["emu", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_bfloat16_is_close_to_float32(objective, data_root):
    """Compute in bfloat16 moves the loss by its rounding, no more."""
    losses = []
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for dtype in ("float32", "bfloat16"):
        cfg = small(objective, data_root, dtype=dtype)
        with jax.set_mesh(mesh):
            trainer = Trainer(cfg, mesh)
            batch = one_batch(cfg, trainer.objective.batch_kind)
            loss = jax.jit(lambda params, batch, t=trainer: t.loss(params, batch, np.int32(0))[0])
            losses.append(loss(trainer.template.init(), batch))
    assert losses[1].dtype == np.float32
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=0.03)


def test_rematerialisation_reaches_what_trains(data_root):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for objective in ("emu", "clip", "decoder"):
        cfg = small(objective, data_root, remat=RematConfig.everywhere("full"))
        with jax.set_mesh(mesh):
            trainer = Trainer(cfg, mesh)
            batch = one_batch(cfg, trainer.objective.batch_kind)
            step = jax.make_jaxpr(trainer.update)(trainer.state_shapes, batch)
        assert "remat" in str(step), objective


@pytest.mark.slow
def test_a_run_directory_keeps_its_run(data_root, tmp_path, one_device):
    """Going on with other settings is refused before anything saved is touched."""
    cfg = small("clip", data_root, steps=2)
    train(cfg, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
    for change in (
        {"kl_weight": 1.0},
        {"optimizer": OptimizerConfig(groups=(GroupConfig(lr=2e-3),))},
        {"data": dataclasses.replace(cfg.data, seed=5)},
    ):
        with pytest.raises(UserError, match="holds a run with"):
            train(dataclasses.replace(cfg, steps=4, **change), tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
    assert train(dataclasses.replace(cfg, steps=3, log_every=2), tmp_path).step == 3


def test_errors_are_one_clear_line(data_root, tmp_path, one_device):
    base = small("emu", data_root)
    with pytest.raises(UserError, match=r"did you mean 'decoder'"):
        train(dataclasses.replace(base, objective="decodr"), tmp_path / "a")
    with pytest.raises(UserError, match="does not exist"):
        train(dataclasses.replace(base, parents={"visual": "../nothing"}), tmp_path / "b")
    with pytest.raises(UserError, match="no optimizer group matches parameter"):
        groups = (GroupConfig("^llama", lr=1e-3),)
        train(dataclasses.replace(base, optimizer=OptimizerConfig(groups=groups)), tmp_path / "c")
    with pytest.raises(UserError, match="make data, fsdp and tensor multiply to 1"):
        train(dataclasses.replace(base, mesh=MeshConfig(3, 1, 1)), tmp_path / "d")
    for change, message in (
        ({"data": dataclasses.replace(base.data, n_causal=5)}, "n_causal is 5, the model needs 4"),
        ({"model": dataclasses.replace(base.model, tokens=TokenIds())}, "the tokenizer's ids are"),
    ):
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(base, **change), tmp_path / "g")
    train(dataclasses.replace(base, steps=1, loss_block=0), tmp_path / "e")
    wider = dataclasses.replace(base.model.vision, width=48)
    model = dataclasses.replace(base.model, vision=wider)
    with pytest.raises(UserError, match="its vision is not configured as"):
        train(dataclasses.replace(base, model=model, parents={"visual": "../e"}), tmp_path / "f")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("remat.llama", "ful", "unknown remat.llama 'ful'; did you mean 'full'"),
        ("dtype", "bfloat", "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        ("attention", "spalsh", "unknown attention 'spalsh'; did you mean 'splash'"),
        ("log_every", 0, "log_every is 0: make it at least 1"),
        ("loss_block", -1, "loss_block is -1: make it at least 0"),
        ("hang_seconds", float("nan"), "hang_seconds is nan: make it at least 0"),
        ("ema_decay", 1.0, "ema_decay is 1.0: make it at least 0.0 and below 1.0"),
        ("profile_steps", "5", "profile_steps '5'"),
        ("mesh.context", 0, r"context is 0 \(mesh\): make it at least 1"),
        ("mesh.fsdp", -1, r"fsdp is -1 \(mesh\): make it at least 0"),
        ("data.batch_size", 0, "'batch_size' must be at least 1"),
        ("optimizer.b2", 1.0, r"b2 is 1.0 \(optimizer\): make it at least 0.0 and below 1.0"),
        ("optimizer.clip_norm", 0.0, r"clip_norm is 0.0 \(optimizer\): make it above 0.0"),
        ("optimizer.moments_dtype", "float16", "optimizer.moments_dtype 'float16'"),
        ("optimizer.groups.0.pattern", "(", "optimizer pattern '\\('"),
        ("optimizer.groups.0.lr", -1.0, "lr is -1.0 .*: make it at least 0.0"),
        ("optimizer.groups.0.decay", "cosin", "unknown decay 'cosin' .*did you mean 'cosine'"),
    ],
)
def test_a_bad_setting_is_refused_where_it_is_read(key, value, message, tmp_path):
    """From a config file as from the run directory of an older version, with one line."""
    values = to_dict(TrainConfig())
    *path, last = key.split(".")
    group = values
    for part in path:
        group = group[int(part) if isinstance(group, list) else part]
    group[last] = value
    (tmp_path / "train.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as told:
        load_json(TrainConfig, tmp_path / "train.json")
    assert str(told.value).startswith(f"{tmp_path / 'train.json'}: ") and "\n" not in str(
        told.value
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_builds(path):
    """Each file is a valid TrainConfig, its model has shapes, its docstring the command."""
    cfg = load_config(TrainConfig, path, [])
    assert f"emu-jax train --config configs/{path.name} --workdir" in path.read_text()
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
    assert trainer.trained


def test_the_fine_tuning_config_reads_pairs_alone():
    cfg = load_config(TrainConfig, CONFIGS / "finetune.py", [])
    assert [kind for kind, weight in cfg.data.mixture.items() if weight > 0] == ["pairs"]


@pytest.mark.slow
def test_autoencoder_measures_its_scaling_factor(data_root, tmp_path, one_device):
    metrics = train(small("vae", data_root, steps=2), tmp_path).metrics
    factor = checkpoint.load_model_config(tmp_path).vae.scaling_factor
    assert factor == pytest.approx(1 / metrics["latent_std"], rel=1e-3)
