"""The scripts in launch/: what --dry-run prints (tests/golden/launch), and what they do when
stand-ins answer for emu-jax, gcloud, kubectl and SLURM."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "local.sh"
GOLDEN = Path(__file__).parent / "golden" / "launch"
# Settings of whoever runs the tests are not to reach the scripts.
SETTINGS = ("DEVICES", "EMU_JAX", "EXTRA_FLAGS", "GRACE", "POLL", "PORT", "RESTARTS")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in SETTINGS}
TRAIN = ("--", "--config", "configs/digits.py", "--workdir", "runs/a b")


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C reaches the scripts where the tests run in the background, too: there SIGINT is
    ignored, which bash cannot undo. What is caught here has its default meaning there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def processes():
    """Processes that are ended with the test, and what they started with them."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


# launch/local.sh


@pytest.fixture
def launch(tmp_path, processes):
    """Starts local.sh with a bash body in emu-jax's place; it runs in tmp_path."""

    def start(body: str, *arguments: str) -> subprocess.Popen:
        fake = tmp_path / "emu-jax"
        fake.write_text(f'#!/usr/bin/env bash\ncd "{tmp_path}"\n{body}\n')
        fake.chmod(0o755)
        process = subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env=ENVIRONMENT | {"EMU_JAX": str(fake), "GRACE": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

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
    assert err.startswith("usage: launch/local.sh ")


# All of them


@pytest.mark.parametrize("golden", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_dry_run(golden):
    """The first line of a golden file is the command, the others what it prints. No script needs
    the programs that it would run."""
    command, expected = golden.read_text().removeprefix("$ ").split("\n", 1)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PORT": "12345", "EMU_JAX": "emu-jax"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected


def test_every_script_has_a_golden_file():
    shown = {path.stem.split("_")[0] for path in GOLDEN.glob("*.txt")}
    assert shown == {path.stem for path in ROOT.glob("launch/*.sh")} - {"lib"}


TPU = ("tpu.sh", "train", "--name=emu", "--zone=z")
GKE = ("gke.sh", "yaml", "--name=emu")
V6E = (*GKE, "--topology=v6e:4x4", "--image=i")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("tpu.sh",), "needs --name"),
        ((*TPU, "--image=i", *TRAIN), "train needs --topology"),
        ((*TPU, "--topology=v5p:4x4x8", *TRAIN), "train needs --image"),
        ((*TPU, "--topology=v5p:4x4x8", "--image=i"), "needs the arguments of emu-jax train"),
        ((*TPU, "--topology=v5p:4x4x8", "--image=i", "--"), "needs the arguments of emu-jax train"),
        ((*TPU, "--topology", "--image=i", *TRAIN), "--topology needs a value"),
        ((*TPU, "--topology=v5p:4x4", *TRAIN), "a v5p has 3 axes, as in v5p:4x4x8"),
        ((*TPU, "--topology=v5e:4x4x8", *TRAIN), "a v5e has 2 axes, as in v5e:16x16"),
        ((*TPU, "--topology=v5e", *TRAIN), "a v5e has 2 axes"),
        (
            (*TPU, "--topology=v7:2x2", *TRAIN),
            "the generation is one of v4, v5e, v5p, v6e and tpu7x",
        ),
        ((*TPU, "--topology=v5e:1x1", *TRAIN), "must be a multiple of 4"),
        ((*TPU, "--topology=tpu7x:2x2x1", *TRAIN), "use launch/gke.sh"),
        ((*TPU, "--topology=v6e:4x4", "--slices=0", *TRAIN), "invalid --slices '0'"),
        ((*TPU, "--tpology=v6e:4x4", *TRAIN), "unknown option --tpology=v6e:4x4"),
        (("tpu.sh", "train", "again"), "unexpected argument 'again'"),
        (("tpu.sh", "resume", "--name=emu", "--zone=z"), ""),
        ((*GKE, *TRAIN), "yaml needs --topology"),
        ((*V6E, "--bucket=gs://b", *TRAIN), "invalid --bucket 'gs://b'"),
        ((*V6E, "--bucket=my-bucket:x", *TRAIN), "give my-bucket or my-bucket:/mount/point"),
        ((*V6E, "--bucket=my-bucket:", *TRAIN), "invalid --bucket 'my-bucket:'"),
        ((*V6E, "--", "--workdir", "http://b/x"), "invalid --workdir 'http://b/x': give gs://B"),
        ((*V6E, "--", "--workdir=gs:/b/x"), "invalid --workdir 'gs:/b/x'"),
        ((*V6E, "--", "--workdir=gs://b"), "invalid --workdir 'gs://b'"),
        (("gke.sh", "yaml", "--name=My_Run"), "invalid --name 'My_Run'"),
        (("gke.sh", "pool", "--name=emu", "--topology=v6e:4x4"), "pool needs --cluster"),
        (("gke.sh", "run", "--name=emu", "--topology=v6e:4x4"), "run needs --image"),
        (("xpk.sh", "run", "--name=emu", "--cluster=c"), "run needs --zone"),
        (("slurm.sh", "run", "--name=emu", *TRAIN), "run needs --nodes"),
        (("slurm.sh", "run", "--name=emu", "--nodes=1", *TRAIN), "run needs --image or --venv"),
        (("slurm.sh", "run", "--name=e", "--nodes=x", "--venv=v", *TRAIN), "invalid --nodes 'x'"),
        (("flags.sh",), ""),
        (("flags.sh", "v5p", "many"), ""),
    ],
)
def test_mistakes_end_with_the_usage_line(arguments, reason):
    done = subprocess.run(
        [ROOT / "launch" / arguments[0], *arguments[1:]],
        env=ENVIRONMENT | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert f"usage: launch/{arguments[0]} " in done.stderr


@pytest.fixture
def stand_ins(tmp_path, processes):
    """Runs a script with programs of ours on its PATH, each a bash body. What they are called
    with is in `called`, a line a call."""

    class StandIns:
        called = tmp_path / "called"

        def start(self, bodies: dict[str, str], *arguments: str, **environment: str):
            for name, body in bodies.items():
                path = tmp_path / "bin" / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$CALLED"\n{body}\n')
                path.chmod(0o755)
            process = subprocess.Popen(
                arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=ENVIRONMENT
                | environment
                | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLED": str(self.called)},
            )
            processes.append(process)
            return process

        def run(self, *arguments, **environment) -> subprocess.CompletedProcess:
            process = self.start(*arguments, **environment)
            out, err = process.communicate(timeout=60)
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)

        def calls(self) -> list[str]:
            return self.called.read_text().splitlines() if self.called.exists() else []

    return StandIns()


# launch/tpu.sh

# Answers each look at the request, and at the container, with the next line of a file; the last
# line stays.
GCLOUD = """
next() { head -n 1 "$1"; [[ $(wc -l < "$1") -eq 1 ]] || sed -i 1d "$1"; }
case "$*" in
  *"queued-resources describe"*)
    answer=$(next states)
    case $answer in
      ABSENT) echo "ERROR: (gcloud) NOT_FOUND: no such thing" >&2; exit 1 ;;
      ERROR) echo "ERROR: (gcloud) the network is down" >&2; exit 1 ;;
      *) echo "$answer"; echo "Updates are available" >&2 ;;
    esac ;;
  *"docker inspect"*) next containers ;;
esac
"""


@pytest.fixture
def supervise(stand_ins, tmp_path):
    """`launch/tpu.sh train` while requests and containers go through these states; gives its
    exit status and what it did, a word an action."""

    def run(states: str, containers: str = "none", *, delete: bool = False, **environment):
        (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
        (tmp_path / "containers").write_text(containers.replace(",", "\n") + "\n")
        done = stand_ins.run(
            {"gcloud": GCLOUD},
            ROOT / "launch" / "tpu.sh",
            "train",
            "--name=emu",
            "--zone=z",
            "--topology=v5p:4x4x8",
            "--spot",
            "--image=i",
            *(["--delete"] if delete else []),
            *TRAIN,
            **({"POLL": "0"} | environment),
        )
        words = {" create ": "create", " delete ": "delete", "docker run": "run"}
        did = [word for call in stand_ins.calls() for text, word in words.items() if text in call]
        return done.returncode, " ".join(did), done.stderr

    return run


WAIT = "WAITING_FOR_RESOURCES PROVISIONING"


def test_trains_from_nothing_to_the_end(supervise, stand_ins):
    status, did, _ = supervise(f"ABSENT {WAIT} ACTIVE", "none,running 0,running 0,exited 0")
    assert (status, did) == (0, "create run")
    command = next(call for call in stand_ins.calls() if "docker run" in call)
    assert "--node=all --worker=all" in command
    assert "--env JAX_NUM_PROCESSES=32" in command
    assert command.endswith("i train --config configs/digits.py --workdir 'runs/a b'")


def test_asks_again_after_a_preemption(supervise):
    status, did, err = supervise(
        f"{WAIT} ACTIVE ACTIVE SUSPENDING SUSPENDED {WAIT} ACTIVE ACTIVE SUSPENDED ACTIVE",
        "none,running 0,none,running 0,none,exited 0",
    )
    assert (status, did) == (0, "run delete create run delete create run")
    assert "emu: SUSPENDED" in err and "failure" not in err


def test_takes_over_what_is_running(supervise):
    assert supervise("ACTIVE", "running 0,running 0,exited 0")[:2] == (0, "")


def test_a_host_without_an_answer_is_looked_at_again(supervise):
    assert supervise("ACTIVE", "running 0,,,running 0,exited 0")[:2] == (0, "")


def test_a_failed_look_is_no_absence(supervise):
    status, did, err = supervise("ERROR ERROR ACTIVE", "running 0,exited 0")
    assert (status, did) == (0, "")
    assert "the network is down" in err


def test_starts_again_after_a_crash(supervise):
    status, did, err = supervise("ACTIVE", "none,running 0,exited 1,running 0,exited 0")
    assert (status, did) == (0, "run run")
    assert "training: exited 1 (failure 1 of 10)" in err


def test_a_save_at_sigterm_is_no_failure(supervise):
    status, did, err = supervise("ACTIVE", "running 0,exited 130,exited 0")
    assert (status, did) == (0, "run")
    assert "failure" not in err


def test_gives_up_after_too_many_failures(supervise):
    status, did, err = supervise("ACTIVE", "none,exited 1", RESTARTS="3")
    assert (status, did) == (1, "run run run")
    assert err.endswith("training: exited 1 (failure 3 of 3)\n")


def test_gives_up_on_a_request_that_fails(supervise):
    status, did, err = supervise("FAILED", RESTARTS="3")
    assert (status, did) == (1, "delete create delete create")
    assert "the request failed (failure 3 of 3)" in err


def test_a_mistake_is_not_repeated(supervise):
    assert supervise("ACTIVE", "running 0,exited 2")[:2] == (2, "")


def test_stopped_by_hand_is_not_started_again(supervise):
    assert supervise("ACTIVE", "running 0,stopped")[:2] == (130, "")


@pytest.mark.parametrize(
    ("ends", "did"),
    [("exited 0", "delete"), ("exited 2", "delete"), ("exited 1", "delete"), ("stopped", "")],
)
def test_gives_the_slices_back_when_told_to(supervise, ends, did):
    assert supervise("ACTIVE", f"running 0,{ends}", delete=True, RESTARTS="1")[1] == did


# Unmounting fails where nothing is mounted, and removing a container where there is none.
SUDO = """
case "$*" in
  umount*) echo "umount: not mounted" >&2; exit 32 ;;
  "docker rm"*) exit 1 ;;
  "$BROKEN"*) exit 1 ;;
  tee*) cat > /dev/null ;;
esac
"""
MOUNT = [
    "umount --lazy /bucket",
    "mkdir -p /bucket",
    "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "
    "my-bucket /bucket",
]


@pytest.fixture
def on_a_host(stand_ins):
    """`launch/tpu.sh run --bucket my-bucket` where a host does what it is told: the exit status
    and what was run as root, in order. `broken` is the one of these that fails."""

    def run(*, gcsfuse: bool, broken: str = "none") -> tuple[int, list[str]]:
        told = 'for word; do [[ $word != --command=* ]] || eval "${word#--command=}"; done'
        programs = {"gcloud": told, "curl": "", "lsb_release": "echo jammy", "sudo": SUDO}
        if gcsfuse:
            programs["gcsfuse"] = ""
        done = stand_ins.run(
            programs,
            ROOT / "launch" / "tpu.sh",
            "run",
            "--name=emu",
            "--zone=z",
            "--topology=v5p:4x4x8",
            "--image=i",
            "--bucket=my-bucket",
            *TRAIN,
            BROKEN=broken,
        )
        calls = [call.removeprefix("sudo ") for call in stand_ins.calls() if call[:5] == "sudo "]
        return done.returncode, calls

    return run


def test_bucket_is_mounted_between_two_containers(on_a_host):
    status, (stop, remove, *mount, container) = on_a_host(gcsfuse=True)
    assert (status, stop, remove) == (0, "docker stop emu-jax", "docker rm emu-jax")
    assert mount == MOUNT
    assert container.startswith("docker run ") and " --volume /bucket:/bucket i train" in container


@pytest.mark.skipif(bool(shutil.which("gcsfuse")), reason="this machine has gcsfuse")
def test_hosts_without_gcsfuse_get_it(on_a_host):
    status, (_, _, *commands, container) = on_a_host(gcsfuse=False)
    assert status == 0 and container.startswith("docker run ")
    assert [command.split()[0] for command in commands[:-3]] == ["tee", "tee", "apt-get", "apt-get"]
    assert commands[-3:] == MOUNT


def test_no_training_without_the_bucket(on_a_host):
    status, commands = on_a_host(gcsfuse=True, broken="gcsfuse")
    assert status == 1
    assert commands[-1] == MOUNT[-1]


# launch/gke.sh


def job_set(*arguments: str) -> dict:
    done = subprocess.run(
        [ROOT / "launch" / "gke.sh", "yaml", "--name=emu", "--image=a.b/c:1", *arguments],
        env=ENVIRONMENT | {"GRACE": "120", "RESTARTS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("topology", "hosts", "accelerator"),
    [
        ("v4:2x2x4", 4, "tpu-v4-podslice"),
        ("v5e:16x16", 64, "tpu-v5-lite-podslice"),
        ("v5p:4x4x8", 32, "tpu-v5p-slice"),
        ("v6e:16x16", 64, "tpu-v6e-slice"),
        ("tpu7x:4x4x8", 32, "tpu7x"),
    ],
)
def test_job_set(topology, hosts, accelerator):
    spec = job_set("--topology", topology, "--slices=2", "--spot", *TRAIN)["spec"]
    assert spec["failurePolicy"] == {
        "maxRestarts": 4,
        # What evicts pods is no failure.
        "rules": [
            {
                "name": "preempted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }
    (jobs,) = spec["replicatedJobs"]
    assert jobs["replicas"] == 2
    job = jobs["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (hosts, hosts, 0)
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]}
    ]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    # No shell between the signal and training: these are the image's entry point's arguments.
    assert "command" not in container
    assert container["args"] == ["train", *TRAIN[1:]]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["JAX_NUM_PROCESSES"] == str(2 * hosts)
    assert environment["LIBTPU_INIT_ARGS"].split() == flags(topology.split(":")[0], 2)


def test_job_set_quotes_what_yaml_would_read_otherwise():
    words = ["--config.a=true", "on", "a: b # c", "back\\slash", "'single' \"double\"", "12", "{x}"]
    spec = job_set("--topology=v6e:4x4", "--", *words)["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == ["train", *words]
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]


def test_run_replaces_the_job_set(stand_ins, tmp_path):
    done = stand_ins.run(
        {"kubectl": "[[ $1 != create ]] || cat > manifest"},
        ROOT / "launch" / "gke.sh",
        "run",
        "--name=emu",
        "--topology=v5p:4x4x8",
        "--image=i",
        *TRAIN,
    )
    assert done.returncode == 0
    assert [call.split()[1] for call in stand_ins.calls()] == ["delete", "create"]
    assert yaml.safe_load((tmp_path / "manifest").read_text())["kind"] == "JobSet"


# launch/slurm.sh

# Runs what follows its own options in each of two tasks, as one node of two GPUs would.
SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 pids=()
trap 'kill -TERM "${pids[@]}"' TERM
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
worst=0
for pid in "${pids[@]}"; do
  wait $pid; status=$?
  # A signal interrupts the wait: the task is still saving.
  ! kill -0 $pid 2>/dev/null || { wait $pid; status=$?; }
  ((status <= worst)) || worst=$status
done
exit $worst
"""


@pytest.fixture
def job(stand_ins, tmp_path):
    """Starts the batch script that slurm.sh queues, with a bash body in emu-jax's place."""

    def start(body: str, **environment: str) -> subprocess.Popen:
        path = tmp_path / "venv" / "bin" / "emu-jax"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        queued = stand_ins.run(
            {"sbatch": "cat > batch"},
            ROOT / "launch" / "slurm.sh",
            "run",
            "--name=emu",
            "--nodes=1",
            "--gpus=2",
            f"--venv={tmp_path}/venv",
            *TRAIN,
        )
        assert queued.returncode == 0, queued.stderr
        return stand_ins.start(
            {"srun": SRUN, "scontrol": ""},
            "bash",
            "batch",
            **({"SLURM_JOB_ID": "123", "SLURM_NTASKS": "2"} | environment),
        )

    return start


@pytest.mark.parametrize(
    ("status", "earlier", "requeued"),
    [(0, 0, False), (2, 0, False), (130, 99, True), (1, 0, True), (1, 9, True), (1, 10, False)],
)
def test_job_queues_itself_again(job, stand_ins, status, earlier, requeued):
    process = job(f"exit {status}", SLURM_RESTART_COUNT=str(earlier))
    _, err = process.communicate(timeout=60)
    assert f"ended with status {status} (start {earlier + 1})" in err
    assert ("scontrol requeue 123" in stand_ins.calls()) == requeued
    assert process.returncode == (0 if requeued else status)


def test_job_tells_every_task_how_many_they_are(job, tmp_path):
    body = 'echo "$JAX_NUM_PROCESSES $XLA_FLAGS $*" > "$CALLED.$SLURM_PROCID"'
    process = job(body)
    process.communicate(timeout=60)
    assert process.returncode == 0
    for task in range(2):
        count, *words = (tmp_path / f"called.{task}").read_text().split()
        expected = [*flags("gpu"), "train", *" ".join(TRAIN[1:]).split()]
        assert (count, words) == ("2", expected)


def test_stopped_job_saves_and_stays_out_of_the_queue(job, stand_ins, tmp_path):
    body = """
    trap 'echo saved > "saved.$SLURM_PROCID"; exit 130' TERM
    echo $$ > "pid.$SLURM_PROCID"
    for i in {1..600}; do sleep 0.1; done
    """
    process = job(body)
    for task in range(2):
        wait_for(tmp_path / f"pid.{task}")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [(tmp_path / f"saved.{task}").read_text() for task in range(2)] == ["saved\n"] * 2
    assert not any(call.startswith("scontrol") for call in stand_ins.calls())


@pytest.mark.slow
def test_slurm_tells_jax_who_is_who(job, tmp_path):
    """Tasks that know nothing but SLURM's variables and their number meet."""
    script = tmp_path / "meet.py"
    script.write_text(
        "import jax\n"
        "from jax.experimental import multihost_utils\n"
        "from emu_jax.train.distributed import initialize_distributed\n"
        "initialize_distributed()\n"
        "met = multihost_utils.process_allgather(jax.numpy.array([jax.process_index()]))\n"
        "with open(f'met.{jax.process_index()}', 'w') as file:\n"
        "    print(jax.config.read('jax_cuda_visible_devices'), met.ravel().tolist(), file=file)\n"
    )
    body = f"export XLA_FLAGS= JAX_PLATFORMS=cpu; exec {shlex.quote(sys.executable)} meet.py"
    # JAX makes the coordinator's port of the job's number.
    process = job(
        body, PYTHONPATH=str(ROOT), SLURM_JOB_ID=str(os.getpid()), SLURM_RESTART_COUNT="10"
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    # Each takes the GPU of its number on the node.
    for task in range(2):
        assert (tmp_path / f"met.{task}").read_text() == f"{task} [0, 1]\n"


# launch/flags.sh


def flags(accelerator: str, slices: int = 1) -> list[str]:
    """Returns the flags that a script exports for the accelerator."""
    command = (
        f'source <(launch/flags.sh {accelerator} {slices}); echo "$LIBTPU_INIT_ARGS$XLA_FLAGS"'
    )
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_every_flag_has_a_reason_and_a_source():
    lines = [
        line
        for line in (ROOT / "launch" / "flags.sh").read_text().splitlines()
        if line.startswith("--")
    ]
    listed = {flag for name in ("v4", "v5e", "v5p", "v6e", "tpu7x", "gpu") for flag in flags(name)}
    assert len(lines) > 20
    assert {line.split()[0] for line in lines} == listed | set(flags("v5p", 2))
    for line in lines:
        assert re.fullmatch(r"--[a-z0-9_]+=\S+ +# .+ \[.+\]", line), line


def test_extra_flags_come_last():
    variable = subprocess.run(
        [ROOT / "launch" / "flags.sh", "v5e"],
        env=ENVIRONMENT | {"EXTRA_FLAGS": "--a=1 --b=2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert variable.endswith(" --a=1 --b=2'\n")


@pytest.mark.parametrize("extra", ["", " --xla_gpu_no_such_flag=1"])
def test_jaxlib_knows_the_gpu_flags(extra):
    """XLA on the CPU knows the GPU's flags by name; what they do takes a GPU to see."""
    environment = ENVIRONMENT | {"XLA_FLAGS": " ".join(flags("gpu")) + extra}
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (not extra)
    assert ("Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag=1" in done.stderr) == bool(extra)


def compile_for_tpu(topology: str, slices: int, flags: list[str], dump: Path):
    environment = ENVIRONMENT | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(flags),
        "XLA_FLAGS": f"--xla_dump_to={dump}",
    }
    # A cached program would not be compiled with the flags.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    script = Path(__file__).parent / "compile_for_tpu.py"
    return subprocess.run(
        [sys.executable, script, topology, str(slices)],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("topology", "slices"),
    [("v4:2x2x4", 1), ("v5e:4x4", 2), ("v5p:2x2x4", 2), ("v6e:4x4", 2), ("tpu7x:2x2x4", 1)],
)
def test_libtpu_takes_every_flag_and_needs_it(topology, slices, tmp_path):
    """A sharded training step compiles with them, and none says what is the default."""
    used = flags(topology.split(":")[0], slices)
    done = compile_for_tpu(topology, slices, used, tmp_path)
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr
    (settings,) = tmp_path.glob("*jit_step*tpu_comp_env.txt")
    changed = re.findall(r"# (\w+) in the current .* has a non-default value", settings.read_text())
    names = {flag.split("=")[0][2:] for flag in used}
    # The runtime's own flags are not the compiler's.
    assert {name for name in names if not name.startswith("megascale_")} == set(changed)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_libtpu_refuses_an_unknown_flag(tmp_path):
    done = compile_for_tpu("v5p:2x2x1", 1, ["--xla_tpu_no_such_flag=true"], tmp_path)
    assert done.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stderr
