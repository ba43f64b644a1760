"""The benchmarks of inference, at the smallest size: they check that both sides agree."""

import pytest

from emu_jax import bench

pytestmark = pytest.mark.optimized

pytest.importorskip("torch", reason="what is compared with")

TINY = {
    "text_generation": {"size": "digits", "prompt": 12, "tokens": 8, "rows": 2},
    "regression": {"size": "digits", "prompt": 12, "family": "both"},
    "sampling": {"size": "digits", "steps": 4},
    "encoding": {"size": "digits", "images": 4},
    "checkpoints": {"size": "digits"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_both_sides_agree(name):
    module = bench.load(name)
    if floors := getattr(module, "floors", None):  # small ones: what they say means nothing here
        peak, copy, floors.SECONDS = floors.peak, floors.fastest_copy, 0.001
        floors.peak, floors.fastest_copy = lambda dtype: peak(dtype, 64), lambda: copy(64)
    figures = module.run(turns=2, **TINY[name])
    if name == "checkpoints":  # of the same turns
        assert figures["blocks_s"]["median"] <= figures["save_s"]["median"]
    assert "|" in module.table(figures)
    assert all(value > 0 for value in medians(figures))


def medians(figures: dict):
    for value in figures.values():
        if isinstance(value, dict):
            yield from [value["median"]] if "median" in value else medians(value)


@pytest.mark.slow
def test_startup():
    module = bench.load("startup")
    figures = module.run(size="digits", turns=1)
    assert "|" in module.table(figures)
    # With what the first process compiled, the second compiles nothing.
    assert figures["warm"]["compile"]["median"] < figures["cold"]["compile"]["median"]
