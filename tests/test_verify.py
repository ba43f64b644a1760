"""`emu-jax verify`: passes on what the release computed, and fails on anything else."""

import json
import shutil

import numpy as np
import pytest
from conftest import GOLDEN
from test_convert import instruct_dir, run_dir  # noqa: F401  (fixtures)

from emu_jax import cli
from emu_jax.convert.convert import convert

pytestmark = pytest.mark.optimized


def verify(capsys, checkpoint, golden=GOLDEN):
    folders = ["--checkpoint", str(checkpoint), "--golden", str(golden)]
    status = cli.main(["verify", *folders, "--json"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return status, json.loads(lines[-1]) if lines else captured.err, lines[:-1]


@pytest.mark.slow
def test_the_pretrained_model_covers_every_key(run_dir, golden, capsys):  # noqa: F811
    status, result, lines = verify(capsys, run_dir)
    assert (status, result["passed"], result["failed"]) == (0, True, [])
    instruct = {key for key in golden if key.startswith("instruct/")}
    assert set(result["not_applicable"]) == instruct
    assert result["checked"] == len(golden.files) - len(instruct)
    assert [line.split()[0] for line in lines] == golden.files
    assert result["worst"]["error"] <= result["worst"]["tolerance"]


@pytest.mark.slow
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


def record(folder, change, change_meta=lambda meta: None):
    """A golden folder that differs from the release's: `change` edits its tensors."""
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("*.bin", "*.pt", "unet", "vae"))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    with np.load(GOLDEN / "expected.npz") as stored:
        arrays = dict(stored)
    meta = json.loads((folder / "meta.json").read_text())
    change(arrays)
    change_meta(meta)
    np.savez(folder / "expected.npz", **arrays)
    (folder / "meta.json").write_text(json.dumps(meta))


def keep(arrays, *prefixes):
    for key in [key for key in arrays if not key.startswith(prefixes)]:
        del arrays[key]


def test_what_a_recording_lacks_fails_its_rows(run_dir, tmp_path, capsys):  # noqa: F811
    def change(arrays):
        keep(
            arrays,
            "predict/",
            "train/ids",
            "generate/greedy/",
            "sample/cond",
            "preprocess/0",
            "preprocess/1",
            "vit/pixels",
            "gen_image/text_only",
            "cformer/",
        )
        arrays["sample/cond"] = arrays["sample/cond"] * 1.01
        arrays["cformer/out"] = arrays["cformer/out"] * np.nan

    def change_meta(meta):
        meta["prompts"] = meta["prompts"] * 2  # more images than were recorded
        meta["video_frame_indices"][0]["indices"][0] += 1
        del meta["spec"]["candidates"]

    record(tmp_path / "golden", change, change_meta)
    (tmp_path / "golden" / "preprocess_1.png").unlink()
    status, result, lines = verify(capsys, run_dir, tmp_path / "golden")
    assert status == 1
    assert set(result["failed"]) == {
        "predict/ranks",
        "train/ids",
        "generate/greedy/ids",
        "sample/cond",
        "cformer/out",
        "preprocess/0/process_img",
        "preprocess/1/process_img",
        "preprocess/1/pipeline",
    }
    assert result["worst"] == {"key": "cformer/out", "error": None, "tolerance": 2e-5}
    notes = {line.split()[0]: line for line in lines}
    assert "<image> tokens" in notes["train/ids"] and "frames" in notes["preprocess/0/process_img"]
    assert "candidates" in notes["predict/ranks"] and "gen_image" in notes["sample/cond"]


def test_decoded_texts_count(run_dir, tmp_path, capsys):  # noqa: F811
    def change_meta(meta):
        meta["generate"]["greedy"]["texts"][1] += "!"

    record(tmp_path / "golden", lambda a: keep(a, "generate/greedy/", "vit/pixels"), change_meta)
    status, result, lines = verify(capsys, run_dir, tmp_path / "golden")
    assert (status, result["failed"]) == (1, ["generate/greedy/ids"])
    assert any("the ids are equal, but read" in line for line in lines)


@pytest.mark.slow
def test_several_latents_and_one_timestep(run_dir, tmp_path, capsys):  # noqa: F811
    def change(arrays):
        keep(
            arrays,
            "vit/pixels",
            "unet/",
            "sample/init",
            "sample/cond",
            "sample/4_1.0/",
            "gen_image/",
        )
        for key in ("init_latents", "4_1.0/latents", "4_1.0/image"):
            arrays[f"sample/{key}"] = np.repeat(arrays[f"sample/{key}"], 3, axis=0)
        arrays["unet/t"] = np.int64(5)
        arrays["unet/out"] = np.zeros_like(arrays["unet/sample"])

    record(tmp_path / "golden", change)
    status, result, lines = verify(capsys, run_dir, tmp_path / "golden")
    assert (status, result["failed"]) == (1, ["unet/out"])  # computed, and not the zeros
    assert result["worst"]["key"] == "unet/out" and result["worst"]["error"] > 1


def test_mistakes_are_one_line(instruct_dir, tmp_path, capsys):  # noqa: F811
    status, err, _ = verify(capsys, tmp_path / "nowhere")
    assert status == 2 and "nowhere" in err
    status, err, _ = verify(capsys, instruct_dir, tmp_path)
    assert status == 2 and "expected.npz" in err and err.count("\n") == 1
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "expected.npz").write_bytes(b"PK damaged")
    status, err, _ = verify(capsys, instruct_dir, tmp_path)
    assert status == 2 and err.count("\n") == 1
