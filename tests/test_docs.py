"""Checks of the documentation: every command goes through the real parser and
as many of its own checks as need no model, every config is loaded with its overrides."""

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest

from emu_jax import bench, cli
from emu_jax.data.build.build import BuildConfig
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.evaluate.run import Options
from emu_jax.evaluate.tasks import TASKS
from emu_jax.evaluate.tasks.base import FidOptions
from emu_jax.hardware import Topology
from emu_jax.hub import is_hub
from emu_jax.train.config import TrainConfig
from emu_jax.train.config_file import load_config, override

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^ *(?:[A-Z_]+=\S+ )?(?:emu-jax|python|make|pip) ", re.MULTILINE)
# Programs of others, whose arguments are not checked here.
OTHERS = {"gcloud", "docker", "kubectl", "xpk", "cd", "echo", "pre-commit", "lmms-eval", "jupyter"}
SOURCES = ("emu_jax", "tests", "tools", "benchmarks", "configs")
# Words that begin no docstring.
OPENINGS = re.compile(r"(What|Of|Those|Which|Where|Whether|How|Raises)\b")
# What `...` stands for: the arguments that a page leaves out of a verb's command.
LEFT_OUT = {
    "eval": "--checkpoint runs/emu --data data --out result.json",
    "data build": "SRC DST --format webdataset",
}


def text_of(page):
    """A page's Markdown; for a notebook its cells, without their outputs."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(
        f"```python\n{source}\n```" if kind == "code" else source for kind, source in sources
    )


def fenced(page):
    """(language, content) of each block of a page."""
    return [(m[1], m[2]) for m in FENCE.finditer(text_of(page))]


def command_lines(page):
    """The commands of a page, one line each: those of its blocks, and those in its prose."""
    for language, content in fenced(page):
        joined = re.sub(r"\\\n\s*", " ", content)
        if language == "sh" or COMMAND.search(content):
            yield from (line for line in joined.splitlines() if line.strip())
    prose = FENCE.sub("", text_of(page))
    for code in re.findall(r"`([^`]+)`", prose):
        code = " ".join(code.split())
        if re.match(r"(emu-jax|make|pip install|python|source|launch/\S+) ", code):
            yield code


def commands(page):
    """Words of each command: no comments, no redirection, no variables set before it."""
    for line in command_lines(page):
        for command in re.split(r" && | \| ", line):
            command = re.sub(r"[$<]\((?:[^()]|\([^()]*\))*\)", "SUBSTITUTED", command)
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Za-z_]+=.*", words[0]):
                words = words[1:]
            if ">" in words:
                words = words[: words.index(">")]
            if words:
                yield words


def check_emu_jax(words):
    """Parses the arguments of `emu-jax`, and checks what the verb would check first."""
    two = " ".join(words[:2])
    verb = two if two in cli.VERBS else words[0]
    if "..." in words:
        words = [word for word in words if word != "..."] + shlex.split(LEFT_OUT[verb])
    if words in (["VERB"], ["--help"]):
        return
    if words == verb.split():  # the verb is named, not run
        assert verb in cli.VERBS, f"there is no verb {verb}"
        return
    args = cli._parse(words)
    check_paths(verb, args)
    if verb in ("train", "precompute", "data inspect") or (verb == "plan" and args.config):
        load_config(TrainConfig, ROOT / args.config, args.overrides)
    if verb == "plan":
        for topology in args.topology.split(",") if args.topology else ():
            Topology.parse(topology, args.slices)
    elif verb == "eval":
        assert args.task in TASKS, args.task
        Options(
            split=args.split,
            examples=args.examples,
            shots=args.shots,
            support=args.support,
            limit=args.limit,
            seed=args.seed,
            batch_size=args.batch_size,
            fid=FidOptions(args.inception),
        )
    elif verb == "data build":
        source = SourceConfig(name=args.name, format=args.format, paths=tuple(args.paths))
        override(BuildConfig(source=source, shard_documents=args.shard_documents), args.set)
    elif verb == "bench":
        modules = {name: bench.load_benchmark(name) for name in args.names or bench.benchmarks()}
        bench._settings(args.settings, modules)


def check_paths(verb, args):
    """A run directory goes to other formats; a release becomes a run directory."""
    if verb == "convert" and not is_hub(args.src):
        is_run = args.src.parts[0] in ("runs", "RUN")
        assert not is_run or args.to != "jax" or args.merge_lora or args.quantize, (
            f"{args.src} is a run directory"
        )
        assert is_run or args.to == "jax", f"{args.src} is no run directory"
    if verb == "eval" and args.out.suffix != ".json":
        raise UserError(f"--out {args.out}")


def check_script(words):
    """A script knows each flag; what follows `--` are arguments of `train`."""
    script = ROOT / words[0]
    own, _, rest = (
        (words[1:], None, [])
        if "--" not in words
        else (words[1 : words.index("--")], None, words[words.index("--") + 1 :])
    )
    known = "".join(path.read_text() for path in (script, *script.parent.glob("common*")))
    for flag in (word.split("=")[0] for word in own if word.startswith("--")):
        assert re.search(rf"{flag}\b", known), f"{words[0]} does not know {flag}"
    if rest:
        check_emu_jax(["train", *rest])


def check(words):
    program = words[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if program == "emu-jax":
        check_emu_jax(words[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in words[1:] if "=" not in word), words
    elif program.endswith("pip") or words[:3] == ["python", "-m", "pip"]:
        for word in words:
            if found := re.search(r"\[([\w,]+)\]", word):
                assert set(found[1].split(",")) <= set(project["optional-dependencies"]), word
            if word.endswith(".txt"):
                assert (ROOT / word).is_file(), word
    elif re.fullmatch(r"python[\d.]*", program):
        for word in words:
            if word.endswith(".py"):
                assert (ROOT / word.removeprefix(".../")).is_file(), word
    elif program == "source":
        known = ("SUBSTITUTED", ".venv/bin/activate", "harness/bin/activate")
        assert len(words) == 2 and words[1] in known, words
    elif program.startswith(("launch/", "benchmarks/")):
        check_script(words)
    else:
        assert program in OTHERS, f"no check for {program}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page):
    failed = []
    for words in commands(page):
        try:
            check(words)
        except (AssertionError, UserError, KeyError, argparse.ArgumentError, OSError) as error:
            failed.append(f"{shlex.join(words)}: {error}")
        except SystemExit as exit:
            if exit.code:
                failed.append(shlex.join(words))
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python_and_imports_what_there_is(page):
    for language, content in fenced(page):
        if language != "python":
            continue
        lines = content.splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        for node in ast.walk(ast.parse("\n".join(line[indent:] for line in lines))):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), (node.module, name.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_environment_is_activated_before_it_is_needed(page):
    """`emu-jax` lies in .venv/bin: a newcomer has no such command."""
    blocks = "\n".join(content for _, content in fenced(page))
    if first := re.search(r"^ *emu-jax ", blocks, re.MULTILINE):
        assert "source .venv/bin/activate" in blocks[: first.start()]


def test_commands_that_are_refused_are_found():
    for line in (
        "emu-jax convert RUN DST",
        "emu-jax data build ... --max-text 150",
        "emu-jax train --config configs/digits.py --workdir w --config.step=3",
        "emu-jax train --config configs/nothing.py --workdir w",
        "emu-jax trian",
        "emu-jax plan --config configs/emu_14b.py --topology v5p:4x4",
        "emu-jax eval ... --task vqa",
        "emu-jax eval ... --task vqav2 --shots 4",
        "emu-jax bench flors",
        "emu-jax data build ... --set clean.min_sides=3",
        "make everything",
        "pip install '.[all]'",
        "launch/tpu.sh train --nmae x",
        "curl x",
    ):
        with pytest.raises((AssertionError, UserError)):
            check(shlex.split(line))


def test_the_config_reference_has_every_key_with_its_type_and_default():
    """`python tools/config_reference.py > docs/config.md` renews the page."""

    def keys(page):
        rows = (re.split(r"(?<!\\) \| ", line) for line in page.splitlines())
        return [row[:3] for row in rows if row[0][:1] in "|#" and row[0][:2] != "|-"]

    wanted = keys(runpy.run_path(str(ROOT / "tools/config_reference.py"))["page"]())
    assert len(wanted) > 100
    assert keys((ROOT / "docs/config.md").read_text()) == wanted


def test_docstrings_begin_with_a_verb_or_a_name():
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    wrong = []
    for path in (p for folder in SOURCES for p in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, documented) and OPENINGS.match(ast.get_docstring(node) or ""):
                wrong.append(f"{path.relative_to(ROOT)}:{node.body[0].lineno}")
    assert not wrong, "\n".join(wrong)


def anchor_of(heading):
    """Returns the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Relative links name files that exist, and their anchors are headings of the target."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            broken.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.*)", FENCE.sub("", target.read_text()), re.MULTILINE)
            if anchor not in map(anchor_of, headings):
                broken.append(link)
    assert not broken
