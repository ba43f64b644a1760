"""The stages that the docstrings of configs/emu2_37b*.py lead through, at the smallest size."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from emu_jax import checkpoint
from emu_jax.config import emu2, emu2_gen, save_json
from emu_jax.convert.convert import convert
from emu_jax.sharding import make_mesh, nest
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config, override
from emu_jax.train.dry_run import dry_run
from emu_jax.train.step import Trainer
from emu_jax.train.warm_start import WarmStart

ROOT = Path(__file__).parent.parent
EMU2 = Path(__file__).parent / "golden" / "emu2_tiny"
# By the full size: the recorded model's, which has 8 x 8 patches.
IMAGE_SIZES = {224: 28, 448: 56}
EMBEDDINGS = {64: 16, 256: 64}


def train_commands(name: str) -> list[tuple[Path, list[str]]]:
    """Returns the run directory and the overrides of each command in a config's docstring."""
    docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text())) or ""
    commands = []
    for line in re.findall(r"emu-jax (train .*)", re.sub(r"\\\n\s*", " ", docstring)):
        words = shlex.split(line)
        assert words[:4] == ["train", "--config", f"configs/{name}.py", "--workdir"]
        overrides = [word.removeprefix("--config.") for word in words[5:]]
        commands.append((Path(words[4]), overrides))
    return commands


def small(name: str, overrides: list[str]) -> TrainConfig:
    """Returns a stage's config with a command's overrides, at the recorded model's size, for one
    step on digits."""
    cfg = load_config(TrainConfig, ROOT / "configs" / f"{name}.py", overrides)
    pooling = cfg.model.pooling
    assert pooling
    sizes = {
        "model.vision.image_size": IMAGE_SIZES[cfg.model.vision.image_size],
        "model.vision.patch_size": 7,
        "model.pooling.n_embeddings": EMBEDDINGS[pooling.n_embeddings],
        "model.pooling.n_frame": 16,
        "data.image_size": IMAGE_SIZES[cfg.data.image_size],
        "data.n_causal": EMBEDDINGS[cfg.data.n_causal],
        "data.n_frame": 16 if cfg.data.n_frame else 0,
        "data.target_size": 16,
        "data.root": "digits",
        "data.embedded": "digits",
        "data.sources": [],
        "data.batch_size": 1,
        "data.row_tokens": 256,
        "data.row_images": 2,
        "data.row_group": 1,
        "data.prefetch": 0,
        "steps": 1,
        "accumulate": 1,
        "eval": [],
        "dtype": "float32",
        "attention": "xla",
    }
    cfg = override(dataclasses.replace(cfg, keep_best={}), [f"{k}={v!r}" for k, v in sizes.items()])
    mixture = {"instructions": 1.0} if cfg.data.instruct else {"pairs": 1.0}
    data = dataclasses.replace(cfg.data, mixture=mixture)
    return dataclasses.replace(cfg, data=data)


def write_first_step(cfg: TrainConfig, workdir: Path, shift: float) -> None:
    """Writes what a run saves, without compiling a step: trained parameters move by `shift`."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    warm_start = WarmStart.resolve(cfg, workdir)
    with jax.set_mesh(mesh):
        trainer = Trainer(warm_start.cfg, mesh)
        params = warm_start.load(trainer.param_shapes)
    assert params.keys() == trainer.param_shapes.keys()
    unsaved = warm_start.unsaved({path: trainer.param_shapes[path] for path in trainer.frozen})
    saved = {
        path: np.asarray(value, np.float32) + (path not in trainer.frozen) * np.float32(shift)
        for path, value in params.items()
        if path not in unsaved
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((workdir / "1" / "params").absolute(), nest(saved))
    tokenizer = trainer.objective.load_tokenizer()
    warm_start.write_run_files(tokenizer, trainer.objective.has_all_towers)


def parameter(run: Path, path: str) -> np.ndarray:
    everywhere = NamedSharding(make_mesh(1, 1, 1, devices=jax.devices()[:1]), PartitionSpec())
    shape = checkpoint.run_shapes(run)[path].shape
    wanted = jax.ShapeDtypeStruct(shape, np.float32, sharding=everywhere)
    return np.asarray(checkpoint.read_params(run, {path: wanted})[path])


def test_the_documented_chain_reaches_the_end(tmp_path, monkeypatch, copy_digits):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.chdir(tmp_path)
    copy_digits(tmp_path / "digits")
    fresh = Path("runs/emu2_fresh")
    convert(EMU2 / "Emu2-Gen", fresh)  # has all that `emu-jax init` writes
    for name in ("_1a", "_1b", "", "_painter", "_gen", "_chat"):
        for workdir, overrides in train_commands(f"emu2_37b{name}"):
            cfg = small(f"emu2_37b{name}", overrides)
            report = dry_run(cfg, workdir)
            assert report.passed, (name, report.problems)
            write_first_step(cfg, workdir, 1.0)

    # Emu2-Gen has every tower: the language model trained in four stages, the denoiser in one.
    gen = Path("runs/emu2_gen")
    model = checkpoint.load_model_config(gen)
    assert {path.partition(".")[0] for path in checkpoint.run_shapes(gen)} == set(model.towers)
    for path, stages in (("visual.blocks.mlp.fc1.bias", 2), ("llama.norm.scale", 4)):
        np.testing.assert_allclose(parameter(gen, path), parameter(fresh, path) + stages, atol=1e-5)
    path = "unet.conv_in.kernel"
    np.testing.assert_allclose(parameter(gen, path), parameter(fresh, path) + 1, atol=1e-5)
    assert parameter(gen, checkpoint.POSITIONS).shape[0] == 8 * 8 + 1
    # Padding rows are those of the plan.
    rows = {
        run: checkpoint.run_shapes(Path(run))["llama.embed_tokens.embedding"].shape[0]
        for run in ("runs/emu2_fresh", "runs/emu2_1a", "runs/emu2_gen", "runs/emu2_chat")
    }
    assert list(rows.values()) == [784, 896, 896, 896]


def test_a_decoder_comes_with_its_configuration(tmp_path):
    """A run from a model without a decoder, as of a native file, and from the run of a decoder."""
    model, decoder = emu2(), emu2_gen()
    assert decoder.vae
    vae = dataclasses.replace(decoder.vae, scaling_factor=0.25)
    decoder = dataclasses.replace(decoder, vae=vae)
    for name, cfg in (("base", model), ("fresh", decoder)):
        (tmp_path / name).mkdir()
        save_json(cfg, tmp_path / name / "config.json")
    ((_, overrides),) = train_commands("emu2_37b_painter")
    overrides[0] = f"init_from={tmp_path / 'base'}"
    parents = [override.replace("emu2_fresh", "fresh") for override in overrides[1:]]
    path = ROOT / "configs" / "emu2_37b_painter.py"
    cfg = load_config(TrainConfig, path, [overrides[0], *parents])
    resolved = WarmStart.resolve(cfg, tmp_path / "run").cfg
    assert resolved.model == decoder
    assert resolved.parents["unet"] == "../fresh" and "base" in resolved.parents["visual"]
