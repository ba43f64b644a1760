"""Tuning of a digits demo, in the sizes that are promised: on answers, and of Emu2 also on the
generation of images. It needs a demo:

    make demo
    .venv/bin/python -m pytest -m slow tests/test_instruct.py

or EMU_JAX_DEMO=DIR for one that is elsewhere, of Emu1 or Emu2.
"""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from emu_jax import checkpoint
from emu_jax.convert.convert import convert
from emu_jax.data import digits
from emu_jax.demo.demo import Judge, _autoencode, _draw
from emu_jax.generate.api import Emu, load
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config
from emu_jax.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
DEMO = Path(os.environ.get("EMU_JAX_DEMO", ROOT / "runs" / "demo"))
SEQUENCES = 200  # number of counting sequences


def score(emu: Emu, *, fit: str = "train", split: str = "heldout", seed: int = 0) -> dict[str, Any]:
    """Returns the accuracy on each of the three questions of `digits.QUESTIONS`.

    The first two are asked about every image of the split. The third is asked about counting
    sequences of images. Its answer is correct if the judge, trained on `fit`, recognizes the
    generated image as the next digit.
    """
    named, even, following = digits.QUESTIONS
    images, labels = digits.digit_images(split)
    shown = [Image.fromarray(p).convert("RGB") for p in images]
    names = emu.generate_text([[p, named] for p in shown])
    parities = emu.generate_text([[p, even] for p in shown])

    rng = np.random.default_rng(seed)
    by_label = [np.flatnonzero(labels == digit) for digit in range(10)]
    counts = [digits.counting_digits(rng) for _ in range(SEQUENCES)]
    prompts = [[*(shown[rng.choice(by_label[d])] for d in c[:-1]), following] for c in counts]
    answers = emu.complete(prompts, max_images=1, seed=seed)
    drawn = [[np.asarray(p) for p in parts if not isinstance(p, str)] for parts in answers]
    some = [i for i, parts in enumerate(drawn) if parts]
    read: dict[int, int] = {}
    if some:
        judge = Judge(fit, emu.image_size)
        read = dict(zip(some, judge(np.stack([drawn[i][0] for i in some])), strict=True))
    return {
        "named": _mean([digits.parse_digit(n) == d for n, d in zip(names, labels, strict=True)]),
        "even": _mean(
            [p == ("no" if d % 2 else "yes") for p, d in zip(parities, labels, strict=True)]
        ),
        "next": _mean([read.get(i) == c[-1] for i, c in enumerate(counts)]),
    }


def _mean(right: Any) -> float:
    return round(float(np.mean(right)), 4)


def of_family(name: str) -> None:
    """Skips the test unless the demo is of this family."""
    if not (DEMO / "config.json").is_file():
        pytest.skip(f"there is no demo at {DEMO}: make demo, or set EMU_JAX_DEMO")
    if checkpoint.load_model_config(DEMO).family != name:
        pytest.skip(f"the demo at {DEMO} is not of the family {name}")


@pytest.fixture(scope="module", params=["digits_instruct", "digits2_chat"])
def tuned(request, tmp_path_factory):
    """(run directory, seconds)."""
    of_family("emu" if request.param == "digits_instruct" else "emu2")
    return tune(request.param, tmp_path_factory.mktemp("instruct"))


def tune(name: str, folder: Path) -> tuple[Path, float]:
    """Trains a config from the demo. Returns (run directory, seconds)."""
    cfg = load_config(TrainConfig, ROOT / "configs" / f"{name}.py", [])
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
    adapted = checkpoint.load_model_config(run).llama.lora is not None
    if adapted:
        assert trained < 0.02 * count(checkpoint.run_shapes(run))
    assert seconds < 300
    right = score(load(run, batch_size=100))
    print(f"{right}, {trained} parameters trained in {seconds:.0f} s")
    assert (
        right["named"] >= 0.95
        and right["even"] >= 0.95
        and right["next"] >= (0.80 if adapted else 0.75)
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_go_through_peft_and_back(tuned, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    of_family("emu")
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


def test_a_model_tuned_on_the_last_image_draws(tmp_path):
    """Twenty images of each digit, from words, as the demo scores them; and how the demo draws."""
    of_family("emu2")
    run, seconds = tune("digits2_gen", tmp_path)
    right = {}
    for name, folder in (("demo", DEMO), ("tuned", run)):
        emu = load(folder, batch_size=100)
        judge = Judge("train", emu.image_size)
        _, drawn = _draw(emu, judge, seed=0)
        _, painted = _autoencode(emu, judge, "heldout", seed=0)
        right[name] = {"drawn": drawn, "autoencoded": painted}
    print(f"{right}, {seconds:.0f} s")
    assert right["tuned"]["drawn"] >= 0.9
    assert right["tuned"]["autoencoded"] == right["demo"]["autoencoded"]  # neither part was trained
