"""The command line: what is printed where, exit statuses, and one line for each mistake."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import emu_jax
from emu_jax import cli
from emu_jax.errors import UserError
from emu_jax.generate import cli_io
from emu_jax.train.loop import TrainReport

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(steps=5))
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(capsys):
    """Runs the command in this process: (exit status, stdout, stderr)."""

    def call(*arguments) -> tuple[int, str, str]:
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as exit:
            status = exit.code
        return (status, *capsys.readouterr())

    return call


def expect_error(result, *parts):
    """Exit 2 with one line on stderr that holds all of `parts`."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("emu-jax: error: ") and err.count("\n") == 1 and err.endswith("\n")
    for part in parts:
        assert part in err


class FakeEmu:
    def generate_text(self, prompts, *, seed):
        return [f"{len(parts)} parts" for parts in prompts]

    def generate_image(self, prompts, *, seed):
        return [Image.fromarray(np.full((2, 3, 3), each, np.uint8)) for each in seed]

    def complete(self, prompts, *, seed):
        (image,) = self.generate_image(prompts, seed=[seed])
        return [["one", image, "two", image] for _ in prompts]


@pytest.fixture
def fake_emu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded = {}

    def load(directory, **settings):
        loaded.update(settings)
        return FakeEmu()

    monkeypatch.setitem(vars(emu_jax), "load", load)
    return loaded


# Mistakes


def test_no_verb_and_unknown_verbs(run):
    expect_error(run(), f"no verb given; known: {', '.join(cli.VERBS)}; see")
    expect_error(run("trian"), "unknown verb 'trian'; did you mean 'train'?")
    expect_error(run("zzz"), f"unknown verb 'zzz'; known: {', '.join(sorted(cli.VERBS))}; see")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--jsn",), "VERB"),
        (("--",), "VERB"),
        (("demo", "--sed", "3"), "unknown argument '--sed'"),
        (("demo", "--seed", "x"), "invalid int value: 'x'"),
        (("demo", "--config.a=1"), "--config.a=1: `emu-jax demo` takes no config"),
        (("train",), "required: --config, --workdir"),
        (("generate", "--checkpoint", "d"), "give the PARTs of one prompt, or --batch FILE"),
        (("generate", "--checkpoint", "d", "--batch", "f", "x"), "or --batch FILE"),
        (("generate", "--checkpoint", "d", "--output", "song", "x"), "'song'"),
        (
            ("train", "--config", "c", "--workdir", "ftp://b/x"),
            "--workdir: ftp:// is not supported (ftp://b/x): use a local path, gs:// or s3://",
        ),
        (("serve", "--checkpoint=gs://"), "--checkpoint: gs:// names no bucket: write gs://BUCKET"),
        (("plan", "--out", "s3://b/x"), "--out: s3://b/x is not a local path"),
        (("train", "--config", "gs://b/c.py"), "--config: gs://b/c.py is not a local path"),
    ],
)
def test_mistakes_in_flags(run, arguments, message):
    expect_error(run(*arguments), message)


def test_missing_config_file(run, tmp_path, config):
    path = tmp_path / "smal.py"
    result = run("train", "--config", path, "--workdir", tmp_path / "run")
    expect_error(result, f"no config file {path}; did you mean 'small'?")


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.typo=1", "unknown config key 'typo'"),
        ("--config.stesp=1", "unknown config key 'stesp'; did you mean 'steps'?"),
        ("--config.steps=many", "config key 'steps' must be int, not 'many'"),
        ("--config.steps", "write --config.steps=VALUE"),
        ("--confg.steps=1", "unknown argument '--confg.steps=1'"),
    ],
)
def test_mistakes_in_the_config(run, tmp_path, config, override, message):
    result = run("train", "--config", config, "--workdir", tmp_path / "run", override)
    expect_error(result, message)
    assert not (tmp_path / "run").exists()


def test_missing_checkpoint(run, tmp_path):
    expect_error(run("generate", "--checkpoint", tmp_path / "nowhere", "hello"), "nowhere")


def test_unreadable_images(run, fake_emu, tmp_path):
    (tmp_path / "not.png").write_text("words")
    for name in ("missing.png", "not.png"):
        expect_error(run("generate", "--checkpoint", "d", f"@{tmp_path / name}"), name)


def test_unwritable_save(run, fake_emu, tmp_path):
    save = ("generate", "--checkpoint", "d", "hello", "--save")
    expect_error(run(*save, "a.txt"), "--save a.txt", ".txt")
    expect_error(run(*save, "no/a.png"), "--save no/a.png", "no directory no")


def test_debug_shows_the_traceback(run, tmp_path):
    with pytest.raises(UserError, match="no config file"):
        run("train", "--config", tmp_path / "x.py", "--workdir", tmp_path, "--debug")


def test_what_the_system_refuses_is_one_line(run, tmp_path, config, monkeypatch):
    (tmp_path / "file").write_text("")

    def train(cfg, workdir, evaluations):
        workdir.mkdir()

    monkeypatch.setattr("emu_jax.train.loop.train", train)
    result = run("train", "--config", config, "--workdir", tmp_path / "file" / "run")
    expect_error(result, str(tmp_path / "file" / "run"), "Not a directory")


def test_defects_are_not_passed_off_as_mistakes(run, tmp_path, config, monkeypatch):
    def train(cfg, workdir, evaluations):
        raise ValueError("a defect")

    monkeypatch.setattr("emu_jax.train.loop.train", train)
    with pytest.raises(ValueError, match="a defect"):
        run("train", "--config", config, "--workdir", tmp_path)


# What the verbs do


def test_demo_prints_its_figures_last(run, tmp_path, monkeypatch):
    def demo(workdir: Path, seed: int, validation: bool, family: str):
        print("something")
        figures = {
            "workdir": str(workdir),
            "seed": seed,
            "validation": validation,
            "family": family,
        }
        return SimpleNamespace(to_json=lambda: figures)

    monkeypatch.setattr("emu_jax.demo.demo.run_demo", demo)
    status, out, err = run("demo")
    assert (status, err) == (0, "")
    assert json.loads(out.splitlines()[-1]) == {
        "workdir": "runs/demo",
        "seed": 0,
        "validation": False,
        "family": "emu",
    }
    _, out, _ = run("demo", "--workdir", tmp_path, "--seed", 3, "--validation", "--family", "emu2")
    assert json.loads(out.splitlines()[-1]) == {
        "workdir": str(tmp_path),
        "seed": 3,
        "validation": True,
        "family": "emu2",
    }


def test_train_hands_over_the_config(run, tmp_path, config, monkeypatch):
    seen = []

    def train(cfg, workdir, evaluations):
        seen.append((cfg.steps, cfg.seed, cfg.optimizer.clip_norm, workdir))
        return TrainReport(cfg.steps, seconds=1.5, metrics={"loss": 0.5})

    monkeypatch.setattr("emu_jax.train.loop.train", train)
    command = ("train", "--config", config, "--workdir", tmp_path)
    status, out, _ = run(*command)
    assert (status, out) == (0, f"trained to step 5: {tmp_path}\n")
    overrides = ("--config.steps=9", "--config.optimizer.clip_norm=2", "--config.seed=4")
    status, out, _ = run(*command, *overrides, "--json")
    assert status == 0 and json.loads(out) == {"step": 9, "seconds": 1.5, "loss": 0.5}
    assert seen == [(5, 0, 1.0, tmp_path), (9, 4, 2.0, tmp_path)]


def test_generate_text(run, fake_emu, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    command = ("generate", "--checkpoint", "d", "--output", "text", "@a.png", "what is this?")
    assert run(*command) == (0, "2 parts\n", "")
    assert fake_emu == {"dtype": np.float32, "quantize": None}
    status, out, _ = run(*command, "--json", "--dtype", "bfloat16", "--quantize", "int4")
    assert status == 0 and json.loads(out) == {"parts": [{"text": "2 parts"}]}
    assert fake_emu == {"dtype": "bfloat16", "quantize": "int4"}


def test_serve_hands_over_the_types(run, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("emu_jax.serve.app.serve", lambda *_, **settings: seen.update(settings))
    types = ("--dtype", "bfloat16", "--quantize", "int8")
    assert run("serve", "--checkpoint", tmp_path, *types)[0] == 0
    assert (seen["dtype"], seen["quantize"]) == ("bfloat16", "int8")


def test_at_sign_means_an_image_and_two_a_sign(fake_emu, tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    assert cli_io.parse_part("a@b") == "a@b"
    assert cli_io.parse_part("@@home") == "@home"
    assert cli_io.parse_part("@a.png").size == (4, 3)


def test_generate_image(run, fake_emu, tmp_path):
    command = ("generate", "--checkpoint", "d", "--output", "image", "a seven", "--seed", 9)
    assert run(*command) == (0, "emu.png\n", "")
    with Image.open("emu.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved)[0, 0], [9, 9, 9])
    status, out, _ = run(*command, "--save", tmp_path / "b.bmp", "--json")
    assert json.loads(out) == {"parts": [{"image": str(tmp_path / "b.bmp")}]}
    with Image.open(tmp_path / "b.bmp") as saved:
        assert (saved.format, saved.size) == ("BMP", (3, 2))
    assert {p.name for p in tmp_path.iterdir()} == {"emu.png", "b.bmp"}


def test_generate_both(run, fake_emu, tmp_path):
    assert run("generate", "--checkpoint", "d", "count", "--save", "c.png") == (
        0,
        "one\nc-1.png\ntwo\nc-2.png\n",
        "",
    )
    assert {p.name for p in tmp_path.iterdir()} == {"c-1.png", "c-2.png"}


def test_generate_many(run, fake_emu, tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    (tmp_path / "many.jsonl").write_text('["@a.png", "what is this?"]\n\n"two"\n')
    command = ("generate", "--checkpoint", "d", "--batch", "many.jsonl", "--output")
    assert run(*command, "text") == (
        0,
        '[{"text": "2 parts"}]\n[{"text": "1 parts"}]\n',
        "",
    )
    status, out, _ = run(*command, "image", "--seed", 5, "--json")
    assert json.loads(out) == {"answers": [[{"image": "emu-1.png"}], [{"image": "emu-2.png"}]]}
    with Image.open("emu-2.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved)[0, 0], [6, 6, 6])
    assert run(*command, "auto", "--save", "c.png")[0] == 0
    images = {p.name for p in tmp_path.glob("c-*.png")}
    assert images == {"c-1-1.png", "c-1-2.png", "c-2-1.png", "c-2-2.png"}


def test_generate_hands_over_its_settings(run, fake_emu, monkeypatch):
    seen = []
    monkeypatch.setattr(
        FakeEmu, "generate_text", lambda self, prompts, **given: seen.append(given) or ["a"]
    )
    command = ("generate", "--checkpoint", "d", "--output", "text", "--seed", 2**32 - 1, "x")
    assert run(*command) == (0, "a\n", "")
    assert run(*command, "--max-new-tokens", 7) == (0, "a\n", "")
    assert seen == [{"seed": 2**32 - 1}, {"seed": 2**32 - 1, "max_new_tokens": 7}]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seed", -1, "a"], "--seed: -1 is not a seed: give a whole number from 0 to 4294967295"),
        (["--seed", 2**32, "a"], "4294967296 is not a seed"),
        (["--seed", "9" * 5000, "a"], "invalid int value: '9999"),
        (
            ["--output", "image", "--seed", 2**32 - 1, "--batch", "two.jsonl"],
            "--seed 4294967295 is too large for 2 prompts",
        ),
        (["--output", "text", "a \udcff b"], r"the text 'a \udcff b' is not UTF-8"),
        (["--batch", "half.jsonl"], r"half.jsonl, line 1: the text 'half \ud800' is not UTF-8"),
        (["--batch", "deep.jsonl"], "deep.jsonl, line 1: not a JSON list"),
        (["--batch", "latin.jsonl"], "cannot read latin.jsonl"),
    ],
)
def test_hostile_prompts_are_refused_before_the_model_is_loaded(
    arguments, message, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.jsonl").write_text('"a"\n"b"\n')
    (tmp_path / "half.jsonl").write_text('["half \\ud800"]')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "latin.jsonl").write_bytes('"caf\u00e9"'.encode("latin-1"))
    expect_error(run("generate", "--checkpoint", "d", *arguments), message)


def test_a_line_separator_ends_no_line_of_a_batch(run, fake_emu, tmp_path):
    (tmp_path / "one.jsonl").write_bytes('\ufeff["a\u2028b", "c"]\r\n'.encode())
    command = ("generate", "--checkpoint", "d", "--batch", "one.jsonl", "--output", "text")
    assert run(*command) == (0, '[{"text": "2 parts"}]\n', "")


def test_what_a_terminal_cannot_show_is_escaped(run, fake_emu, monkeypatch, tmp_path):
    """Also a file name that is not UTF-8; the file itself has the name that was given."""
    monkeypatch.setattr(FakeEmu, "generate_text", lambda *_, seed: ["\ufffd \u65e5"])
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["generate", "--checkpoint", "d", "--output", "text", "a"]) == 0
    assert (
        cli.main(
            ["generate", "--checkpoint", "d", "--output", "image", "a", "--save", "\udcff.png"]
        )
        == 0
    )
    assert stream.buffer.getvalue() == b"\\ufffd \\u65e5\n\\udcff.png\n"
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff.png"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "has no prompts"),
        ('["a"]\n{"a": 1}', "many.jsonl, line 2: not a JSON list"),
        ("[", "line 1"),
        ("[1]", "line 1"),
        ("[]", "line 1"),
        ('["@no.png"]', "no.png"),
    ],
)
def test_mistakes_in_a_batch(run, fake_emu, tmp_path, content, message):
    (tmp_path / "many.jsonl").write_text(content)
    expect_error(run("generate", "--checkpoint", "d", "--batch", "many.jsonl"), message)
    expect_error(run("generate", "--checkpoint", "d", "--batch", "gone"), "cannot read gone")


def test_interrupted(run, tmp_path, config, monkeypatch):
    def train(cfg, workdir, evaluations):
        raise KeyboardInterrupt

    monkeypatch.setattr("emu_jax.train.loop.train", train)
    workdir = tmp_path / "run"
    status, out, err = run("train", "--config", config, "--workdir", workdir)
    assert (status, out) == (130, "")
    nothing = f"no step is saved in {workdir}: the same command starts from step 0"
    assert err == f"emu-jax: interrupted; {nothing}\n"
    for name in ("8", "12", "16.orbax-checkpoint-tmp", "20.damaged"):
        (workdir / name).mkdir(parents=True)
    _, _, err = run("train", "--config", config, "--workdir", workdir)
    saved = f"step 12 is saved in {workdir}: run the same command again to resume from it"
    assert err == f"emu-jax: interrupted; {saved}\n"


# The process


def test_help_is_light_and_names_every_verb():
    script = (
        "import sys\nfrom emu_jax import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit as exit: assert exit.code == 0\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"jax", "numpy", "PIL"} & set(done.stderr.split())
    lines = [line for line in done.stdout.splitlines() if re.match(" {4}[a-z]", line)]
    assert [re.split("  +", line)[1] for line in lines] == list(cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(run, verb):
    status, out, err = run(*verb.split(), "--help")
    assert (status, err) == (0, "")
    assert "--json" in out and "--debug" in out


def test_version(run):
    assert run("--version") == (0, f"{emu_jax.__version__}\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_traceback(unbuffered):
    script = (
        "import sys, types, emu_jax\nfrom emu_jax import cli\n"
        "emu_jax.load = lambda _, **__: types.SimpleNamespace("
        "generate_text=lambda prompts, seed: ['words'])\n"
        "sys.exit(cli.main(['generate', '--checkpoint', 'd', '--output', 'text', 'x']))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_settings_of_generation_are_checked_before_the_model_loads():
    given = ["num_beams=1", "chat_format=hub", "early_stopping=true", "system=[USER]"]
    assert cli_io.parse_settings("text", given) == {
        "num_beams": 1,
        "chat_format": "hub",
        "early_stopping": True,
        "system": "[USER]",
    }
    for output, text, message in [
        ("text", "num_beams", "NAME=VALUE"),
        ("text", "num_beems=1", "did you mean"),
        ("text", "num_beams=many", "whole number"),
        ("image", "num_beams=1", "no effect on --output image"),
    ]:
        with pytest.raises(UserError, match=message):
            cli_io.parse_settings(output, [text])
