"""Instruction tuning on a digits demo, in the sizes that are promised. It needs a demo:

    make demo
    .venv/bin/python -m pytest -m slow tests/test_instruct.py

or EMU_JAX_DEMO=DIR for one that is elsewhere.
"""

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from emu_jax import checkpoint
from emu_jax.convert.engine import convert
from emu_jax.evaluate.instruct import score
from emu_jax.generate.api import load
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
DEMO = Path(os.environ.get("EMU_JAX_DEMO", ROOT / "runs" / "demo"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(run directory, seconds)."""
    if not (DEMO / "config.json").is_file():
        pytest.skip(f"there is no demo at {DEMO}: make demo, or set EMU_JAX_DEMO")
    folder = tmp_path_factory.mktemp("instruct")
    cfg = load_config(TrainConfig, ROOT / "configs" / "digits_instruct.py", [])
    data = dataclasses.replace(cfg.data, root=str(folder / "data"))
    cfg = dataclasses.replace(cfg, init_from=str(DEMO.absolute()), data=data)
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: devices)
        started = time.process_time()
        train(cfg, folder / "run")
        seconds = (time.process_time() - started) / 2  # of two cores
    settings = json.loads((folder / "run" / "generation.json").read_text())
    (folder / "run" / "generation.json").write_text(json.dumps(settings | {"system": ""}))
    return folder / "run", seconds


def test_a_tuned_model_answers_three_questions(tuned):
    run, seconds = tuned
    count = lambda shapes: sum(math.prod(s.shape) for s in shapes.values())  # noqa: E731
    step = run / str(checkpoint.latest_step(run))
    trained = count(checkpoint.stored_shapes(step / "params"))
    assert trained < 0.02 * count(checkpoint.run_shapes(run))
    assert seconds < 300
    right = score(load(run, batch_size=100))
    print(f"{right}, {trained} parameters trained in {seconds:.0f} s")
    assert right["named"] >= 0.95 and right["even"] >= 0.95 and right["next"] >= 0.80


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_go_through_peft_and_back(tuned, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    run, _ = tuned
    convert(run, tmp_path / "hf", to="hf")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf" / "llama")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "hf" / "lora")
    theirs.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    convert(tmp_path / "saved", tmp_path / "back", base=run)

    ours, back = load(run), load(tmp_path / "back")
    assert back.cfg.llama.lora == ours.cfg.llama.lora
    before, after = (dict(nnx.to_flat_state(nnx.state(e.model))) for e in (ours, back))
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(value[...], after[path][...], err_msg=str(path))
