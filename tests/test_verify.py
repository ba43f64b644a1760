"""`emu-jax verify`: passes on what the release computed, and fails on anything else."""

import json
import shutil

import numpy as np
import pytest
from conftest import GOLDEN
from test_convert import instruct_dir, run_dir  # noqa: F401  (fixtures)

from emu_jax import cli
from emu_jax.convert.engine import convert


def verify(capsys, checkpoint, golden=GOLDEN):
    folders = ["--checkpoint", str(checkpoint), "--golden", str(golden)]
    status = cli.main(["verify", *folders, "--json"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return status, json.loads(lines[-1]) if lines else captured.err, lines[:-1]


def test_the_pretrained_model_covers_every_key(run_dir, golden, capsys):  # noqa: F811
    status, result, lines = verify(capsys, run_dir)
    assert (status, result["passed"], result["failed"]) == (0, True, [])
    instruct = {key for key in golden if key.startswith("instruct/")}
    assert set(result["not_applicable"]) == instruct
    assert result["checked"] == len(golden.files) - len(instruct)
    assert [line.split()[0] for line in lines] == golden.files
    assert result["worst"]["error"] <= result["worst"]["tolerance"]


@pytest.mark.parametrize("merge", [False, True])
def test_the_instruct_model_covers_its_keys(instruct_dir, merge, tmp_path, capsys):  # noqa: F811
    if merge:
        convert(instruct_dir, tmp_path / "merged", merge_lora=True)
    status, result, _ = verify(capsys, tmp_path / "merged" if merge else instruct_dir)
    assert (status, result["passed"], result["checked"]) == (0, True, 2)


def test_a_release_verifies_as_it_is(instruct_dir, tmp_path, capsys):  # noqa: F811
    """`load` reads the release's own files too."""
    convert(instruct_dir, tmp_path / "release", to="emu")
    status, result, _ = verify(capsys, tmp_path / "release")
    assert (status, result["passed"], result["checked"]) == (0, True, 2)


def test_a_difference_is_found(instruct_dir, golden, tmp_path, capsys):  # noqa: F811
    other = {key: golden[key] for key in golden}
    other["instruct/logits"] = other["instruct/logits"].copy()
    other["instruct/logits"][0, 5, 7] += 2e-4 * np.abs(other["instruct/logits"]).max()
    other["instruct/ids"] = other["instruct/ids"] + 0
    other["instruct/ids"][0, 3] += 1
    shutil.copy(GOLDEN / "meta.json", tmp_path)
    np.savez(tmp_path / "expected.npz", **other)
    status, result, _ = verify(capsys, instruct_dir, tmp_path)
    assert status == 1 and not result["passed"]
    assert result["failed"] == ["instruct/ids", "instruct/logits"]


def test_mistakes_are_one_line(instruct_dir, tmp_path, capsys):  # noqa: F811
    status, err, _ = verify(capsys, tmp_path / "nowhere")
    assert status == 2 and "nowhere" in err
    status, err, _ = verify(capsys, instruct_dir, tmp_path)
    assert status == 2 and "expected.npz" in err and err.count("\n") == 1
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "expected.npz").write_bytes(b"PK damaged")
    status, err, _ = verify(capsys, instruct_dir, tmp_path)
    assert status == 2 and err.count("\n") == 1
