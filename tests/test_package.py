"""The wheel and the source distribution: their files, and a run outside a clone."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import emu_jax

ROOT = Path(__file__).parent.parent
FIRST_STAGE = "parents/digits_clip/metrics.jsonl"  # of a demo


def tracked(*folders):
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {Path(name) for name in listed.stdout.splitlines()}


def test_the_version_is_everywhere_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == emu_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", emu_jax.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    first, newest = re.findall(r"^## (.+)$", changelog, re.MULTILINE)[:2]
    assert first == "Unreleased"
    assert newest == f"{citation['version']} ({citation['date-released']})"
    license = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert citation["license"] == license


def test_the_image_copies_what_the_wheel_needs():
    """Hatchling stops if a folder that the wheel includes is not there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "launch/Dockerfile").read_text(), re.MULTILINE)
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for name in {"emu_jax", *included, *" ".join(copied).split()}:
        assert name in " ".join(copied).split() and f"!{name}" in allowed, name


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(wheel, source distribution), built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.mark.slow
def test_the_distributions_hold_the_package_its_configs_and_benchmarks(distributions):
    wheel, source = distributions
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    shipped = {Path("emu_jax") / name for name in tracked("configs", "benchmarks")}
    package = tracked("emu_jax")
    assert shipped | package <= names
    extra = {name for name in names - shipped - package if ".dist-info" not in str(name)}
    assert not extra
    with tarfile.open(source) as archive:
        unpacked = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert package | tracked("configs", "benchmarks", "launch", "docs") <= unpacked
    assert Path("CITATION.cff") in unpacked


@pytest.mark.slow
def test_the_wheel_runs_from_an_empty_folder(distributions, tmp_path):
    """In a fresh environment that sees this one's libraries but not the clone."""
    environment, workdir = tmp_path / "env", tmp_path / "empty"
    workdir.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    zipfile.ZipFile(distributions[0]).extractall(site)
    # Files that install a package in place (.pth) have no effect in folders that are added so.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    emu = [python, "-m", "emu_jax.cli"]

    def run(*arguments):
        done = subprocess.run(
            [*emu, *arguments], cwd=workdir, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.check_output(
        [python, "-c", "import emu_jax; print(emu_jax.__file__)"], cwd=workdir, env=variables
    )
    assert str(environment).encode() in where
    train = ("train", "--config", "configs/digits_clip.py", "--workdir", "run", "--dry-run")
    assert json.loads(run(*train, "--json").splitlines()[-1])["problems"] == []
    assert "startup" in run("bench", "--list")

    demo = subprocess.Popen(
        [*emu, "demo", "--workdir", "demo"],
        cwd=workdir,
        env=variables,
        stderr=subprocess.PIPE,
        text=True,
    )
    rows, deadline = workdir / "demo" / FIRST_STAGE, time.monotonic() + 300
    while not (rows.is_file() and rows.read_text()):
        assert demo.poll() is None, demo.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=120)
    assert demo.returncode == 130, errors
    assert sorted(p.name for p in workdir.iterdir()) == ["demo"]  # the dry run wrote nothing
