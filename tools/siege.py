"""Measures what attackers cost a server's clients: `python tools/siege.py [--checkpoint DIR]`.

Starts `emu-jax serve --host 0.0.0.0` on the checkpoint, with default settings. Eight clients chat
and generate images for `--seconds`, each sending its next request after the last answer. The first
run has no other clients. In the second run attackers hold silent connections, send bodies a byte at
a time, request new settings each time, and abandon requests for images. Prints a JSON object with
the clients' latencies and the server's memory. Exits with 1 if the p95 latency more than doubled,
the memory grew by more than a tenth, or a client got an error.

All connections use the loopback address. It is exempt from the limit on requests per address, so
that limit does not protect the server here.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WORDS = "zero one two three four five six seven eight nine".split()
CLIENTS = 8
VARYING = 3  # concurrent requests with new settings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--idle", type=int, default=500, help="silent connections")
    parser.add_argument("--bodies", type=int, default=100, help="slow bodies")
    parser.add_argument("--settings", type=int, default=100, help="distinct settings")
    parser.add_argument("--cancelled", type=int, default=50, help="abandoned drawings")
    args = parser.parse_args()
    report = siege(
        args.checkpoint, args.seconds, args.idle, args.bodies, args.settings, args.cancelled
    )
    print(json.dumps(report, indent=1))
    return 0 if report["passed"] else 1


def siege(
    checkpoint: Path, seconds: float, idle: int, bodies: int, settings: int, cancelled: int
) -> dict[str, Any]:
    """Runs the server in peace and under attack, and returns the report."""
    run(checkpoint, 1.0, None)  # fills the compilation cache, if JAX_COMPILATION_CACHE_DIR is set
    peace = run(checkpoint, seconds, None)
    attack = Attack(seconds, idle, bodies, settings, cancelled)
    war = run(checkpoint, seconds, attack)
    return judge(peace, war | attack.report())


def judge(peace: dict[str, Any], war: dict[str, Any]) -> dict[str, Any]:
    """Returns the report on two runs. It fails if one of them answered too few requests."""
    larger = war["rss_anon_mib"] / peace["rss_anon_mib"]
    errors = peace["errors"] + war["errors"]
    report = {"peace": peace, "attacked": war, "memory_ratio": round(larger, 3)}
    for name, ran in (("in peace", peace), ("under attack", war)):
        if ran["p95_s"] is None:
            problem = f"{ran['requests']} requests were answered {name}, 2 are needed"
            return report | {"p95_ratio": None, "problem": problem, "passed": False}
    slower = war["p95_s"] / peace["p95_s"]
    passed = slower <= 2 and larger <= 1.1 and not errors
    return report | {"p95_ratio": round(slower, 3), "passed": passed}


def latency_figures(latencies: list[float]) -> dict[str, float | None]:
    """Returns quantiles of the latencies in seconds, or None for fewer than two requests."""
    if len(latencies) < 2:
        return dict.fromkeys(("p50_s", "p95_s", "max_s"))
    return {
        "p50_s": round(statistics.median(latencies), 3),
        "p95_s": round(statistics.quantiles(latencies, n=20)[-1], 3),
        "max_s": round(max(latencies), 3),
    }


def run(checkpoint: Path, seconds: float, attack: Attack | None) -> dict[str, Any]:
    """Starts a server, runs the clients and the attack, stops the server, and returns figures."""
    command = [sys.executable, "-m", "emu_jax.cli", "serve", "--host", "0.0.0.0", "--port", "0"]
    server = subprocess.Popen(
        [*command, "--checkpoint", str(checkpoint)], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        port = None
        for line in server.stderr:
            if found := re.search(r"serves .* at http://.*:(\d+)", line):
                port = int(found[1])
                break
        if port is None:
            raise RuntimeError("the server ended before it served")
        threading.Thread(target=server.stderr.read, daemon=True).start()
        for number in range(2 * CLIENTS):  # compiles the clients' programs
            ask(port, *request(number // 2, number))
        latencies: list[float] = []
        errors: list[str] = []
        until = time.monotonic() + seconds
        clients = [
            threading.Thread(target=work, args=(port, n, until, latencies, errors))
            for n in range(CLIENTS)
        ]
        if attack is not None:
            attack.start(port)
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        if attack is not None:
            attack.stop()
        memory = rss_anon(server.pid)
        started = time.monotonic()
        server.terminate()
        server.wait(60)
        return {
            "requests": len(latencies),
            "errors": errors[:5],
            **latency_figures(latencies),
            "rss_anon_mib": round(memory, 1),
            "shutdown_s": round(time.monotonic() - started, 2),
        }
    finally:
        server.kill()
        server.wait()


def request(client: int, number: int) -> tuple[str, dict[str, Any]]:
    """Returns (path, body) of a chat request or a request for an image, specific to a client."""
    part = {"text": f"the digit {WORDS[client]}"}
    if number % 2:
        chat = {"max_new_tokens": 8, "seed": client}
        return "/api/chat", {"messages": [{"role": "user", "parts": [part]}], "settings": chat}
    return "/api/draw", {"parts": [part], "settings": {"seed": client, "steps": 20}}


def ask(port: int, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def work(port: int, client: int, until: float, latencies: list[float], errors: list[str]) -> None:
    """Sends one client's requests until the time `until`, one after another."""
    number = 0
    while time.monotonic() < until:
        started = time.monotonic()
        try:
            status, content = ask(port, *request(client, number))
        except OSError as error:
            errors.append(repr(error))
            continue
        latencies.append(time.monotonic() - started)
        if status != 200 or b'"done": true' not in content:
            errors.append(f"{status} {content[:80]!r}")
        number += 1


class Attack:
    """All attacks at once, spread over the time that the clients run."""

    def __init__(self, seconds: float, idle: int, bodies: int, settings: int, cancelled: int):
        self._seconds, self._idle, self._bodies = seconds, idle, bodies
        self._settings, self._cancelled = settings, cancelled
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.counts = dict.fromkeys(("idle", "bodies", "settings", "cancelled"), 0)

    def report(self) -> dict[str, int]:
        """Returns the count of each attack."""
        return {f"attackers_{name}": count for name, count in self.counts.items()}

    def start(self, port: int) -> None:
        self._port = port
        for attack in (self._hold, self._drip, self._vary, self._abandon):
            self._threads.append(threading.Thread(target=attack))
            self._threads[-1].start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _connect(self) -> socket.socket | None:
        try:
            return socket.create_connection(("127.0.0.1", self._port), timeout=5)
        except OSError:
            return None

    def _hold(self) -> None:
        """Holds silent connections, and replaces those that the server closes."""
        held: list[socket.socket] = []
        while not self._over.wait(0.2):
            held = [one for one in held if not closed(one)]
            while len(held) < self._idle and (made := self._connect()) is not None:
                held.append(made)
                self.counts["idle"] = max(self.counts["idle"], len(held))
        for one in held:
            one.close()

    def _drip(self) -> None:
        """Sends bodies a byte at a time."""
        header = (
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 30000000\r\n\r\n" + b" " * 10_000
        )
        held: list[socket.socket] = []
        while not self._over.wait(0.2):
            alive = []
            for one in held:
                try:
                    one.sendall(b" ")
                    alive.append(one)
                except OSError:
                    one.close()
            held = alive
            while len(held) < self._bodies and (made := self._connect()) is not None:
                made.sendall(header)
                held.append(made)
                self.counts["bodies"] = max(self.counts["bodies"], len(held))
        for one in held:
            one.close()

    def _vary(self) -> None:
        """Sends requests with different settings each, `VARYING` at a time."""
        numbers = iter(range(self._settings))
        lock = threading.Lock()
        pause = VARYING * self._seconds / (self._settings + 1)

        def vary() -> None:
            while not self._over.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                started = time.monotonic()
                with contextlib.suppress(OSError):
                    ask(self._port, *self._unusual(number))
                    with lock:
                        self.counts["settings"] += 1
                self._over.wait(pause - (time.monotonic() - started))

        threads = [threading.Thread(target=vary) for _ in range(VARYING)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @staticmethod
    def _unusual(number: int) -> tuple[str, dict[str, Any]]:
        part = {"text": "seven " * (1 + number % 5)}
        if number % 2:
            settings = {"max_new_tokens": 1 + number, "seed": number}
            messages = [{"role": "user", "parts": [part]}]
            return "/api/chat", {"messages": messages, "settings": settings}
        settings = {"num_inference_steps": 1 + number // 2, "guidance_scale": 1.5 + number / 10}
        return "/api/draw", {"parts": [part], "settings": settings}

    def _abandon(self) -> None:
        """Sends requests for images, and disconnects without waiting for the answers."""
        pause = self._seconds / (self._cancelled + 1)
        content = json.dumps(
            {"parts": [{"text": "nine"}], "settings": {"num_inference_steps": 100}}
        ).encode()
        for _ in range(self._cancelled):
            if self._over.wait(pause):
                return
            if (made := self._connect()) is None:
                continue
            made.sendall(
                b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
            )
            time.sleep(0.05)
            made.close()
            self.counts["cancelled"] += 1


def closed(connection: socket.socket) -> bool:
    """Returns whether the server has closed a connection."""
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def rss_anon(pid: int) -> float:
    """Returns the anonymous memory of a process in MiB, the minimum of 20 samples."""
    path = Path(f"/proc/{pid}/status")
    found = []
    for _ in range(20):
        match = re.search(r"RssAnon:\s+(\d+) kB", path.read_text())
        assert match is not None
        found.append(int(match[1]) / 1024)
        time.sleep(0.05)
    return min(found)


if __name__ == "__main__":
    sys.exit(main())
