"""The demo's stages, without training them."""

from pathlib import Path

import pytest

from emu_jax.demo import demo


@pytest.mark.parametrize("family", demo.STAGES)
def test_stages_start_from_earlier_ones(family, tmp_path):
    """Each parent is the run of an earlier stage that trains what is taken from it."""
    *parents, last = demo.STAGES[family]
    runs: dict[Path, str] = {}
    for name in (*parents, last):
        workdir = tmp_path if name == last else tmp_path / "parents" / name
        cfg = demo._stage(name, tmp_path, "train", 3, last=name == last)
        assert (cfg.name, cfg.seed, cfg.data.split) == (name, 3, "train")
        assert cfg.model.family == family or cfg.objective == "vae"
        for parent in cfg.parents.values():
            assert (workdir / parent).resolve() in runs, (name, parent)
        runs[workdir.resolve()] = name
    assert demo.MAIN_STAGE[family] in runs.values()
    assert {"vae", "llama"} <= set(cfg.parents)  # the last run is the whole model
    assert cfg.objective in ("decoder", "painter")
