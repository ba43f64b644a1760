"""The benchmarks of inference, at the smallest size: they check that both sides agree."""

import os
import subprocess
import sys

import pytest

from emu_jax import bench
from emu_jax.storage import shipped

pytestmark = pytest.mark.optimized

pytest.importorskip("torch", reason="what is compared with")


@pytest.mark.slow
def test_every_part_of_the_script_for_a_gpu(tmp_path):
    """At toy sizes on a CPU. The parts check that both sides agree."""
    script = shipped("benchmarks") / "gpu.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([script, "--smoke", tmp_path], env=environment, check=True)
    page = bench.Page(tmp_path / "performance.md")
    (record,) = page.records()["gpu"].values()
    parts = record["figures"]["parts"]
    assert len(parts) == 9 and not any("failed" in part for part in parts.values())
    for part in parts.values():
        assert "|" in bench.load_benchmark(part["benchmark"]).table(part["figures"])
        assert all(value > 0 for value in medians(part["figures"]))
    assert page.rendered(text := page.path.read_text(), page.records()) == text
    assert "Text, 16 rows (`text_generation size=digits" in text


@pytest.mark.slow
def test_checkpoints():
    module = bench.load_benchmark("checkpoints")
    figures = module.run(turns=2, size="digits")
    assert figures["blocks_s"]["median"] <= figures["save_s"]["median"]  # of the same turns
    assert "|" in module.table(figures)
    assert all(value > 0 for value in medians(figures))


def medians(figures: dict):
    for value in figures.values():
        if isinstance(value, dict):
            yield from [value["median"]] if "median" in value else medians(value)


@pytest.mark.slow
def test_startup():
    module = bench.load_benchmark("startup")
    figures = module.run(size="digits", turns=1)
    assert "|" in module.table(figures)
    # With what the first process compiled, the second compiles nothing.
    assert figures["warm"]["compile"]["median"] < figures["cold"]["compile"]["median"]
