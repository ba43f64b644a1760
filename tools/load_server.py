"""Measures a server under load: `python tools/load_server.py --checkpoint runs/demo`.

Starts `emu-jax serve`, or takes the one at `--address`. First one client of the `openai` library
sends each request alone, which gives the expected answers and the throughput of one request at a
time. Then `--clients` clients send the same requests for `--seconds`, each the next one after the
last answer. Prints a JSON object, in which `processor_ms` is the processor time of a request. Exits
with 1 if a request failed, if an answer differed from the one given alone, or if the memory grew by
more than a tenth.

Requests describe images and continue texts, greedy and sampled, whole and streamed. Of `--images`
in a hundred, the answer is an image.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from PIL import Image
from siege import rss_anon

from emu_jax.data.digits import WORDS, digit_images

PROMPTS = 32  # distinct requests of each kind
WARM_SECONDS = 5.0  # of the load before memory and answers are counted
GROWTH = 1.1  # of the memory that is allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo"))
    parser.add_argument("--address", help="of a running server, such as http://127.0.0.1:7860")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--images", type=int, default=0, help="generated images per 100 requests")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.address:
            address, pid = args.address, None
        else:
            address, pid = stack.enter_context(serving(args.checkpoint, args.slots))
        report = load(address, pid, args)
    print(json.dumps(report, indent=1))
    return 0 if report["passed"] else 1


@contextlib.contextmanager
def serving(checkpoint: Path, slots: int) -> Iterator[tuple[str, int]]:
    """Starts a server. Yields its address and its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "emu_jax.cli", "serve", "--checkpoint", checkpoint]
    command += ["--port", port, "--slots", slots, "--waiting", 256, "--seconds", 600]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            # Status 503, an OSError, until the programs are compiled.
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            time.sleep(0.5)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(60)


class ProcessorTime:
    """Measures the processor time of the clients and of the server, on Linux.

    Args:
        pid: the server's process; None if it is not known.
    """

    def __init__(self, pid: int | None) -> None:
        self._pid, self._before = pid, self._now(pid)

    def each(self, requests: int) -> dict[str, float]:
        """Returns milliseconds for each of so many requests since the start."""
        spent = zip(("clients", "server"), self._now(self._pid), self._before, strict=False)
        return {name: round(1e3 * (now - then) / requests, 2) for name, now, then in spent}

    @staticmethod
    def _now(pid: int | None) -> list[float]:
        if pid is None:
            return [time.process_time()]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # in user and in system mode
        return [time.process_time(), ticks / os.sysconf("SC_CLK_TCK")]


def requests(images: int, tokens: int) -> list[dict[str, Any]]:
    """Returns the distinct requests, each with its kind."""
    pixels, _ = digit_images("heldout")
    made: list[dict[str, Any]] = []
    for n in range(PROMPTS):
        file = io.BytesIO()
        Image.fromarray(pixels[n]).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        image = {"type": "image_url", "image_url": {"url": url}}
        sampled = {"temperature": 1.5, "top_p": 1.0, "seed": n}
        made += [
            {"kind": "chat", "content": [image], "stream": bool(n % 2)},
            {"kind": "chat", "content": "the digit " * (1 + n % 7), **sampled},
            {"kind": "chat", "content": [image, {"type": "text", "text": "and"}], **sampled},
        ]
        if images:
            made.append({"kind": "image", "prompt": f"the digit {WORDS[n % 10]}", "seed": n})
    for request in made:
        if request["kind"] == "chat":
            request["max_tokens"] = tokens
    return made


def answer(client: openai.OpenAI, model: str, request: dict[str, Any]) -> str:
    """Sends a request and returns its answer: a text, or an image in base64."""
    request = dict(request)
    if request.pop("kind") == "image":
        seed = request.pop("seed")
        drawn = client.images.generate(model=model, extra_body={"seed": seed}, **request)
        return drawn.data[0].b64_json
    messages = [{"role": "user", "content": request.pop("content")}]
    answered = client.chat.completions.create(model=model, messages=messages, **request)
    if not request.get("stream"):
        return answered.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answered)


def quick_answer(client: openai.OpenAI, model: str, request: dict[str, Any]) -> str:
    """Returns `answer` in less of the processor's time, which the server shares.

    The library then neither looks through the types of a request nor builds objects of its answer.
    """
    if request["kind"] == "image":
        return answer(client, model, request)
    body = {name: value for name, value in request.items() if name not in ("kind", "content")}
    body |= {"model": model, "messages": [{"role": "user", "content": request["content"]}]}
    text = client.post("/chat/completions", cast_to=str, body=body)
    if not request.get("stream"):
        return json.loads(text)["choices"][0]["message"]["content"]
    lines = (line.removeprefix("data: ") for line in text.splitlines())
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def load(address: str, pid: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the load and returns the report."""

    def connect() -> openai.OpenAI:
        base, key = f"{address}/v1", "none"
        return openai.OpenAI(base_url=base, api_key=key, max_retries=0, timeout=600)

    client = connect()
    (model,) = (each.id for each in client.models.list())
    asked = requests(args.images, args.tokens)
    chats = [n for n, request in enumerate(asked) if request["kind"] == "chat"]
    drawings = [n for n, request in enumerate(asked) if request["kind"] == "image"]

    def pick(random_: random.Random) -> int:
        images = drawings and random_.random() * 100 < args.images
        return random_.choice(drawings if images else chats)

    # Gives the expected answers.
    alone = [answer(client, model, request) for request in asked]
    order, sequence = random.Random(0), 0
    processor, started = ProcessorTime(pid), time.monotonic()
    while time.monotonic() - started < args.seconds / 3:
        n = pick(order)
        if quick_answer(client, model, asked[n]) != alone[n]:
            raise RuntimeError(f"request {n} has another answer the second time")
        sequence += 1
    one_at_a_time = sequence / (time.monotonic() - started)
    alone_ms = processor.each(sequence)

    latencies: list[float] = []
    problems: list[str] = []
    begin = time.monotonic() + WARM_SECONDS
    end = begin + args.seconds

    def work(number: int) -> None:
        client, order = connect(), random.Random(number + 1)
        while (sent := time.monotonic()) < end:
            n = pick(order)
            try:
                same = quick_answer(client, model, asked[n]) == alone[n]
            except (openai.OpenAIError, OSError) as error:
                problems.append(repr(error)[:200])
                continue
            if not same:
                problems.append(f"request {n} was answered with another text")
            if begin <= time.monotonic() < end:
                latencies.append(time.monotonic() - sent)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(args.clients)]
    for thread in threads:
        thread.start()
    time.sleep(WARM_SECONDS)
    before, processor, done = rss_anon(pid) if pid else None, ProcessorTime(pid), len(latencies)
    time.sleep(max(0.0, end - time.monotonic() - 2))
    after, together_ms = rss_anon(pid) if pid else None, processor.each(len(latencies) - done)
    for thread in threads:
        thread.join()
    together = len(latencies) / args.seconds
    grown = after / before if before and after else None
    return {
        "clients": args.clients,
        "slots": None if args.address else args.slots,
        "distinct_answers": len(set(alone)),
        "requests": len(latencies),
        "one_at_a_time_per_s": round(one_at_a_time, 2),
        "together_per_s": round(together, 2),
        "speedup": round(together / one_at_a_time, 2),
        "processor_ms_alone": alone_ms,
        "processor_ms_together": together_ms,
        "p50_s": round(statistics.median(latencies), 3),
        "p95_s": round(statistics.quantiles(latencies, n=20)[-1], 3),
        "rss_anon_mib": after,
        "memory_ratio": grown and round(grown, 3),
        "problems": problems[:10],
        "passed": not problems and (grown is None or grown < GROWTH),
    }


if __name__ == "__main__":
    sys.exit(main())
