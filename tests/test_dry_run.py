"""`emu-jax train --dry-run`: the figures of a run, and a line for everything that would stop it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from emu_jax import cli
from emu_jax.config import TokenIds, digits, save_json, to_dict
from emu_jax.data.config import SourceConfig
from emu_jax.data.digits import encode_png
from emu_jax.data.documents import Document, Image, Text, write_documents
from emu_jax.data.pipeline import Batches
from emu_jax.hardware import Chip
from emu_jax.tokenizer import Tokenizer
from emu_jax.train import dry_run as module
from emu_jax.train.config import (
    EvalConfig,
    GroupConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    digits_data,
)
from emu_jax.train.dry_run import dry_run, dry_run_summary
from emu_jax.train.lock import Lock

PAIRS, PAGES = 300, 100  # documents
GROUPS = (GroupConfig(r"^(llama|unet|vae|text|visual)\.", lr=1e-3), GroupConfig(".*", lr=0.0))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """A few hundred documents of two kinds, and a tokenizer."""
    root = tmp_path_factory.mktemp("data")
    tokenizer = Tokenizer.train(["one two three"], 300)
    tokenizer.save(root / "tokenizer")
    image = Image(encode_png(np.zeros((8, 8), np.uint8)))
    for kind, count, parts in (
        ("pairs", PAIRS, (image, Text("one two"))),
        ("pages", PAGES, (Text("one"), image, Text("two three one"), image)),
    ):
        documents = [Document(parts)] * count
        write_documents(root / "train" / f"{kind}.array_record", documents)
    return str(root)


def small(objective: str, root: str, **changes) -> TrainConfig:
    data = digits_data(
        root=root, batch_size=8, block_documents=64, mixture={"pairs": 3.0, "pages": 1.0}
    )
    data = dataclasses.replace(data, **{"embedded": "", **changes.pop("data", {})})
    folder = Path(root) / "tokenizer"
    model = digits(Tokenizer.load(folder).base_size) if folder.is_dir() else digits()
    model = dataclasses.replace(
        model,
        unet=dataclasses.replace(
            model.unet,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
    )
    cfg = TrainConfig(
        name=f"small {objective}",
        objective=objective,
        model=model,
        data=data,
        optimizer=OptimizerConfig(groups=GROUPS),
    )
    return dataclasses.replace(cfg, **changes)


def tree(*folders) -> list[tuple[str, int]]:
    """Every file below some folders, with its time."""
    paths = [path for folder in folders for path in Path(folder).rglob("*")]
    return sorted((str(path), path.stat().st_mtime_ns) for path in paths)


def save_step(workdir: Path, cfg: TrainConfig, step: int) -> None:
    """Writes a run directory with a checkpoint of one parameter."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((workdir / str(step) / "params").absolute(), {"a": jnp.zeros(2)})
    save_json(cfg, workdir / "train.json")
    save_json(cfg.model, workdir / "config.json")


def test_the_figures_of_a_run(data_root, tmp_path):
    """With packed rows, steps per epoch are known once an earlier run has counted the tokens."""
    cfg = small("emu", data_root, steps=50)
    file_cfg = dataclasses.replace(cfg, steps=40)
    before = tree(tmp_path, data_root)
    report = dry_run(cfg, tmp_path / "run", file_cfg)
    assert tree(tmp_path, data_root) == before
    assert report.passed and report.problems == []
    assert report.changed == {"steps": [40, 50], "attention": ["auto", "cpu"]}
    assert report.config == to_dict(cfg) | {"attention": "cpu"}
    assert (report.tokens_per_step, report.images_per_step) == (8 * 64, 8 * 8)
    assert report.mesh == {"data": 1, "fsdp": 8, "tensor": 1} and "fsdp=8" in report.mesh_reasons
    assert report.parameters["cformer"].trained == 0 < report.parameters["cformer"].frozen
    assert report.parameters["llama"].frozen == 0
    kinds = report.device_bytes
    trained = sum(tower.trained for tower in report.parameters.values())
    assert trained / 8 < kinds["gradients"] / 4 < trained / 2  # not all widths divide by 8
    assert kinds["optimizer"] == pytest.approx(2 * kinds["gradients"], rel=1e-3)
    frozen = sum(tower.frozen for tower in report.parameters.values())
    # Trained parameters and both moments in float32, frozen parameters in bfloat16.
    assert report.saving.bytes == pytest.approx(12 * trained + 2 * frozen, abs=100)
    assert report.start.step is None and report.saving.workdir == str(tmp_path / "run")
    (batch,) = report.batches
    pairs, pages = batch.sources
    assert (pairs.documents, pages.documents) == (PAIRS, PAGES)
    assert (pairs.share, pairs.steps_per_epoch, pages.steps_per_epoch) == (0.75, None, None)
    text = dry_run_summary(report)
    assert "* steps = 50  (file: 40)" in text and "  log_every = 10\n" in text
    assert "steps per epoch unknown until indexed" in text and "emu-jax plan" in text

    with Batches(cfg.data, cfg.data.load_tokenizer(), "rows", plan_only=True) as batches:
        for _ in range(20):
            next(batches)
        rows = batches.statistics()["documents"] / 20
    ((pairs, pages),) = (batch.sources for batch in dry_run(cfg, tmp_path / "run").batches)
    assert pairs.steps_per_epoch == pytest.approx(PAIRS / (0.75 * rows), rel=0.03)
    assert pages.steps_per_epoch == pytest.approx(PAGES / (0.25 * rows), rel=0.03)


@pytest.mark.parametrize(
    "objective", ["text", "clip", "vae", pytest.param("decoder", marks=pytest.mark.slow)]
)
def test_every_objective_has_figures(objective, data_root, tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    report = dry_run(small(objective, data_root), tmp_path)
    assert report.passed, report.problems
    assert report.model_flops > 0 and report.device_bytes["activations"] > 0
    images = {"text": 64, "clip": 8, "vae": 8, "decoder": 64 + 8}[objective]
    assert report.images_per_step == images
    assert report.tokens_per_step == (0 if objective == "vae" else 8 * 64)
    (pairs, *_) = report.batches[0].sources
    if objective in ("clip", "vae"):  # a row is a pair
        assert pairs.steps_per_epoch == PAIRS / 8
    assert all(source.documents for source in report.batches[0].sources)
    assert dry_run_summary(report)


def test_all_missing_paths_are_named_at_once(tmp_path):
    (tmp_path / "file").write_text("no directory")
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    sources = (
        SourceConfig("laion", "webdataset", (f"{tmp_path}/laion/*.tar", f"{tmp_path}/packed.tar")),
        SourceConfig("mmc4", "pages", (f"{tmp_path}/mmc4.jsonl",), media=(f"{tmp_path}/images",)),
        SourceConfig("other", "webdatset", ("x",)),
    )
    cfg = small("emu", str(tmp_path / "data"), data={"sources": sources})
    cfg = dataclasses.replace(
        cfg,
        mesh=MeshConfig(fsdp=3),
        parents={"llama": "../gone", "visual": "../away"},
        eval=(
            EvalConfig(sources=(SourceConfig("coco", "webdataset", (f"{tmp_path}/coco.tar",)),)),
            EvalConfig("odd", kind="los", split="heldout"),
        ),
    )
    report = dry_run(cfg, tmp_path / "file" / "run")
    assert not report.passed and report.mesh is None
    for part in (
        f"{tmp_path / 'file'} is not a directory",
        f"no checkpoint at {tmp_path / 'file' / 'gone'}",
        f"no checkpoint at {tmp_path / 'file' / 'away'}",
        "mesh data=2 fsdp=3 tensor=1 needs 6 devices",
        f"{tmp_path / 'data' / 'tokenizer'} has no tokenizer.json",
        f"source 'laion': nothing is at {tmp_path}/laion/*.tar",
        f"source 'laion': {tmp_path}/packed.tar is compressed with gzip",
        f"source 'mmc4': nothing is at {tmp_path}/mmc4.jsonl",
        f"source 'mmc4': media {tmp_path}/images is not there",
        "source 'other': unknown format 'webdatset'; did you mean 'webdataset'?",
        f"evaluation 'heldout': source 'coco': nothing is at {tmp_path}/coco.tar",
        "unknown kind 'los' (evaluation 'odd'); did you mean 'loss'?",
    ):
        assert sum(part in line for line in report.problems) == 1, (part, report.problems)
    assert len(report.problems) == 12 and all("\n" not in line for line in report.problems)
    assert report.parameters["llama"].trained > 0  # though no mesh fits


def test_what_does_not_fit_is_named_at_once(data_root, tmp_path, monkeypatch):
    """Vocabulary, sizes, rows, kinds of documents; memory and disk."""
    cfg = small("text", data_root, data={"mixture": {"pairs": 1.0, "pges": 1.0}, "n_causal": 5})
    model = dataclasses.replace(cfg.model, tokens=TokenIds.after(9))
    model = dataclasses.replace(model, llama=dataclasses.replace(model.llama, vocab_size=13))
    data = dataclasses.replace(cfg.data, batch_size=12)
    mesh = MeshConfig(data=8, fsdp=1, tensor=1)
    problems = dry_run(
        dataclasses.replace(cfg, model=model, data=data, mesh=mesh), tmp_path
    ).problems
    for part in (
        "tokens, the model 13: set model.llama.vocab_size",
        "data.n_causal is 5, the model needs 4",
        "data.batch_size 12 does not split over 8 devices",
        "has no pges.array_record; did you mean 'pages'?",
    ):
        assert sum(part in line for line in problems) == 1, (part, problems)
    assert len(problems) == 4

    with monkeypatch.context() as patch:
        chip = Chip(flops=1e12, hbm_bytes=2**20, hbm_bandwidth=1e12)
        patch.setattr(module, "chip_of", lambda kind: chip)
        space = SimpleNamespace(f_blocks=1, f_bavail=1, f_frsize=4096)
        patch.setattr(os, "statvfs", lambda path: space)
        patch.setattr(os, "access", lambda path, mode: False)
        problems = dry_run(small("text", data_root), tmp_path).problems
    for problem, part in zip(
        problems,
        (
            f"{tmp_path} is not writable",
            "parameters, gradients, optimizer state and batch take",
            "a checkpoint takes 0.01 GiB",
        ),
        strict=True,
    ):
        assert problem.startswith(part)

    # Errors of the model itself.
    frozen = OptimizerConfig(groups=(GroupConfig(".*", lr=0.0),))
    (problem,) = dry_run(small("text", data_root, optimizer=frozen), tmp_path).problems
    assert problem.startswith("every parameter is frozen")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = dry_run(small("text", data_root, tracker="wandb"), tmp_path).problems
    assert problem.startswith("tracker 'wandb' is not installed")


def test_a_run_that_would_resume(data_root, tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    cfg = small("text", data_root)
    for step in (4, 7):
        save_step(tmp_path, cfg, step)
    report = dry_run(dataclasses.replace(cfg, log_every=3), tmp_path)
    assert report.passed and report.start.step == 7 and "log_every" in report.start.may_change
    assert "resumes      from step 7" in dry_run_summary(report)
    (note,) = dry_run(dataclasses.replace(cfg, steps=7), tmp_path).notes
    assert note == "step 7 is saved, and steps is 7: nothing is left to do"

    lock = Lock(tmp_path / "lock.json")
    lock.acquire()
    try:
        problems = dry_run(dataclasses.replace(cfg, seed=1, objective="clip"), tmp_path).problems
    finally:
        lock.release()
    assert f"{tmp_path} is in use by process {os.getpid()}" in problems[0]
    assert [line.split(":")[0] for line in problems[1:]] == [
        f"{tmp_path} holds a run with objective='text', not 'clip'",
        f"{tmp_path} holds a run with seed=0, not 1",
    ]

    for step in (7, 4):
        (tmp_path / str(step) / "params" / "_METADATA").write_text("{")
        report = dry_run(cfg, tmp_path)
        damaged = [line for line in report.notes + report.problems if "set aside" in line]
        assert report.start.step == (4 if step == 7 else 7) and report.passed == (step == 7)
        assert len(damaged) == (1 if step == 7 else 2)


def test_parents_are_opened_and_compared(data_root, tmp_path, monkeypatch):
    """`init_from`, and parents that lack parameters or have other sizes."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    cfg = small("text", data_root)
    save_step(tmp_path / "parent", cfg, 1)
    (problem,) = dry_run(
        dataclasses.replace(cfg, parents={"llama": "../parent"}), tmp_path / "run"
    ).problems
    assert problem.startswith(f"parents.llama: {tmp_path / 'parent'} does not fit")
    assert "llama.lm_head.kernel is missing" in problem

    llama = dataclasses.replace(cfg.model.llama, layers=2)
    wider = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, llama=llama))
    (problem,) = dry_run(
        dataclasses.replace(wider, parents={"llama": "../parent"}), tmp_path / "run"
    ).problems
    assert "its llama is not configured as this run's" in problem

    # The model is that of the missing run: nothing is said of the vocabulary.
    missing = dataclasses.replace(cfg, model=TrainConfig().model, init_from=str(tmp_path / "no"))
    report = dry_run(missing, tmp_path / "run")
    assert report.problems == [f"no checkpoint at {tmp_path / 'no'}: the directory does not exist"]
    assert report.parameters is None and report.device_bytes is None


def test_embedded_digits_need_not_exist(tmp_path):
    """Their vocabulary is compared nevertheless."""
    data = {"embedded": "digits", "instruct": True}
    report = dry_run(small("text", str(tmp_path / "data"), data=data), tmp_path / "run")
    (problem,) = report.problems
    assert "has 352 tokens, the model 350" in problem and not tree(tmp_path)
    assert report.notes == [f"the digits are written to {tmp_path / 'data'} when the run starts"]


def test_the_command(data_root, tmp_path, capsys):
    config = tmp_path / "small.py"
    vocab = Tokenizer.load(Path(data_root) / "tokenizer").base_size
    config.write_text(
        "from emu_jax.train.config import TrainConfig, config_dict, digits_data\n"
        "from emu_jax.config import digits\n"
        "def get_config():\n"
        f"    data = digits_data(root={data_root!r}, batch_size=8, embedded='',\n"
        "        mixture={'pairs': 1.0})\n"
        f"    return config_dict(TrainConfig(objective='text', model=digits({vocab}), data=data))\n"
    )
    arguments = ["train", "--config", str(config), "--workdir", str(tmp_path / "run"), "--dry-run"]
    assert cli.main([*arguments, "--config.steps=7"]) == 0
    out, err = capsys.readouterr()
    assert "* steps = 7  (file: 1000)" in out and "error" not in err
    wrong = ["--config.mesh.fsdp=3", "--config.data.tokenizer=nowhere", "--json"]
    assert cli.main([*arguments, *wrong]) == 2
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not report["passed"] and len(report["problems"]) == 2
    lines = [line for line in err.splitlines() if line.startswith("emu-jax: error: ")]
    assert lines == [f"emu-jax: error: {problem}" for problem in report["problems"]]
    assert not (tmp_path / "run").exists()


# Prints the peak of its own resident memory, in KiB: ru_maxrss would be that of the parent.
MEASURED = """
import sys
from pathlib import Path
from emu_jax.cli import main

status = main(sys.argv[1:])
line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
print(line.split()[1])
sys.exit(status)
"""


@pytest.mark.slow
def test_the_14b_config_is_checked_in_a_minute(tmp_path):
    """On two cores, in 8 GiB; each missing path is named."""
    arguments = ["--config", "configs/emu_14b.py", "--workdir", str(tmp_path / "run"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "train", *arguments, "--dry-run"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    *_, line, peak = done.stdout.splitlines()
    report = json.loads(line)
    for path in ("data/laion-2b/*.tar", "data/mmc4/images", "data/webvid.jsonl", "data/tokenizer"):
        assert any(path in line for line in report["problems"]), report["problems"]
    assert report["model_flops"] > 1e17 and not (tmp_path / "run").exists()
    assert int(peak) < 8 * 2**20
