"""`emu-jax bench`: what it finds, runs and prints."""

import json

import pytest

from emu_jax import bench, cli
from emu_jax.config import UserError, shipped


@pytest.fixture
def folder(monkeypatch, tmp_path):
    (tmp_path / "fast.py").write_text('"""How fast.\n\nMore."""\ndef run(): return {"rate": 2.5}')
    (tmp_path / "wide.py").write_text('def run(): return {"sides": {"left": 1, "right": "x"}}')
    monkeypatch.setattr(bench, "shipped", lambda name: tmp_path)


def test_run_all_and_one(folder):
    assert list(bench.run()) == ["fast", "wide", "machine"]
    figures = bench.run(["wide"])
    assert figures.pop("machine")["cores"] >= 1
    assert figures == {"wide": {"sides": {"left": 1, "right": "x"}}}


def test_unknown_name(folder):
    with pytest.raises(UserError, match="no benchmark 'fats'; did you mean 'fast'?"):
        bench.run(["wide", "fats"])


def test_what_is_printed(folder, capsys):
    assert cli.main(["bench", "fast", "wide"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["fast.rate", "2.5"], ["wide.sides.left", "1"], ["wide.sides.right", "x"],
    ]  # fmt: skip
    assert cli.main(["bench", "fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fast"] == {"rate": 2.5}
    assert cli.main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=1) == ["fast", "How fast."]


def test_every_benchmark_says_what_it_measures():
    paths = bench.benchmarks()
    assert shipped("benchmarks").name == "benchmarks" and "data" in paths
    for path in paths.values():
        assert bench.about(path).endswith("."), path
        assert "def run() -> dict" in path.read_text(), path


@pytest.mark.slow
def test_the_pipeline_keeps_up_with_decoding():
    figures = bench.run(["data"])["data"]
    assert 75_000 < figures["picture_bytes"] < 92_000
    assert figures["full_over_raw"]["median"] >= 0.85
    assert figures["fast_over_raw"]["median"] >= 2.0
