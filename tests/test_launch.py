"""launch/local.sh with a stand-in for emu-jax: what it starts, and that it leaves none behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch" / "local.sh"


@pytest.fixture
def launch(tmp_path):
    """Starts local.sh with a bash body in emu-jax's place; it runs in tmp_path."""

    def start(body: str, *arguments: str) -> subprocess.Popen:
        fake = tmp_path / "emu-jax"
        fake.write_text(f'#!/usr/bin/env bash\ncd "{tmp_path}"\n{body}\n')
        fake.chmod(0o755)
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=os.environ | {"EMU_JAX": str(fake), "GRACE": "3"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.02)
    return path.read_text()


def test_starts_every_process_with_its_number(launch, tmp_path):
    body = 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $*" > "out.$JAX_PROCESS_ID"'
    process = launch(body, "3", "--config", "a b.py", "--config.steps=2")
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
    said = {(tmp_path / f"out.{i}").read_text() for i in range(3)}
    assert len(said) == 1  # one coordinator for all
    address, count, *arguments = said.pop().split()
    assert address.startswith("localhost:") and int(address.split(":")[1]) > 0
    assert count == "3"
    assert arguments == ["train", "--config", "a", "b.py", "--config.steps=2"]


def test_one_failure_ends_the_others(launch, tmp_path):
    # The others wait for a peer that is gone, and do not end when asked.
    body = """
    if [[ $JAX_PROCESS_ID == 1 ]]; then
      until [[ -s pid.0 && -s pid.2 ]]; do sleep 0.02; done
      exit 7
    fi
    trap '' TERM
    echo $$ > "pid.$JAX_PROCESS_ID"
    for i in {1..600}; do sleep 0.1; done
    """
    process = launch(body, "3", "--config", "x.py")
    process.communicate(timeout=30)
    assert process.returncode == 7
    pids = [int((tmp_path / f"pid.{i}").read_text()) for i in (0, 2)]
    deadline = time.monotonic() + 5
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, pids))


def test_interrupt_asks_each_process_once_to_save(launch, tmp_path):
    body = """
    trap 'echo saved >> "saved.$JAX_PROCESS_ID"; exit 130' TERM
    trap 'echo interrupted >> "saved.$JAX_PROCESS_ID"' INT
    echo $$ > "pid.$JAX_PROCESS_ID"
    for i in {1..600}; do sleep 0.1; done
    """
    process = launch(body, "2", "--config", "x.py")
    for i in range(2):
        wait_for(tmp_path / f"pid.{i}")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert [(tmp_path / f"saved.{i}").read_text() for i in range(2)] == ["saved\n", "saved\n"]


@pytest.mark.parametrize("arguments", [(), ("2",), ("0", "--config"), ("two", "--config", "x.py")])
def test_usage(launch, arguments):
    process = launch("echo ran", *arguments)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("usage: ")
