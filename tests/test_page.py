"""The served page in a real browser, and the server under load. Both use a digits demo where one
is at runs/demo (or EMU_JAX_DEMO names one), and a model at random elsewhere: then what is said
and drawn is not judged."""

import base64
import concurrent.futures
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from PIL import Image

from emu_jax.config import digits as digits_model
from emu_jax.config import save_json
from emu_jax.data import digits
from emu_jax.demo.demo import GENERATION, Judge
from emu_jax.models.emu import EmuModel
from emu_jax.sharding import AbstractModel, make_mesh, nest
from emu_jax.tokenizer import Tokenizer

pytest.importorskip("starlette")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
DEMO = Path(os.environ.get("EMU_JAX_DEMO", ROOT / "runs" / "demo"))
CHROMIUM = shutil.which("chromium")
TRAINED = (DEMO / "config.json").is_file()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, copy_digits):
    if TRAINED:
        return DEMO
    folder = tmp_path_factory.mktemp("random")
    copy_digits(folder / "data")
    model = digits_model()
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = nest(AbstractModel(lambda: EmuModel(model, rngs=nnx.Rngs(0)), mesh).init())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "0" / "params").absolute(), params)
    save_json(model, folder / "config.json")
    save_json(GENERATION["emu"], folder / "generation.json")
    Tokenizer.load(folder / "data" / "tokenizer").save(folder / "tokenizer")
    return folder


@contextlib.contextmanager
def serving(checkpoint):
    """(address, process) of a server on a free port of the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "emu_jax.cli",
        "serve",
        "--checkpoint",
        checkpoint,
        "--port",
        port,
        "--seconds",
        300,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    process = subprocess.Popen([*map(str, command)], env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/about"):
                break
            time.sleep(0.5)
        else:
            raise AssertionError("the server did not start")
        yield address, process
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(checkpoint):
    with serving(checkpoint) as served:
        yield served


def image_of(index):
    """(PNG, label) of a held-out digit."""
    images, labels = digits.digit_images("heldout")
    return digits.encode_png(images[index]), int(labels[index])


def post(address, path, body):
    """(status, parts of the answer)."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, [json.loads(line) for line in answer]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture
def problems():
    """Errors on the page's console."""
    return []


@pytest.fixture
def page(server, problems):
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                "--disable-sync",
                "--disable-component-update",
                "--no-first-run",
            ],
        )
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(server[0])
        yield page
        browser.close()
        assert not problems


def test_a_digit_is_uploaded_and_its_caption_streamed(page, tmp_path):
    right, streamed = 0, 0
    for index in range(6):
        content, label = image_of(index)
        (tmp_path / "digit.png").write_bytes(content)
        page.set_input_files("#chat-file", tmp_path / "digit.png")
        page.wait_for_selector("#chat-parts img")
        # Each piece of the answer replaces the text before it: notes them all.
        page.evaluate(
            """() => {
              window.seen = [];
              new MutationObserver((records) => {
                for (const record of records)
                  if (record.target.closest?.(".assistant"))
                    window.seen.push(...[...record.addedNodes].map((n) => n.textContent));
              }).observe(document.getElementById("said"), { subtree: true, childList: true });
            }"""
        )
        page.click("#chat-form button[type=submit]")
        done = page.wait_for_selector("#said .assistant:last-child[data-done=true]")
        said = done.inner_text()
        assert said and page.inner_text("#problem") == ""
        assert page.query_selector("#said .user img")
        seen = page.evaluate("window.seen")
        assert seen[-1].strip() == said.strip()
        assert all(said.startswith(text.strip()) for text in seen)
        streamed += len(seen) > 1
        right += digits.parse_digit(said) == label
        page.click("#chat-clear")
    assert streamed, "every caption came at once"
    assert not TRAINED or right >= 5


def test_a_digit_is_asked_for_and_drawn(page):
    page.click("#draw-tab")
    assert page.is_visible("#draw") and not page.is_visible("#chat")
    drawn = []
    for word in ("seven", "three"):
        page.fill("#draw-text", f"the digit {word}")
        before = page.get_attribute("#drawn img", "src") if drawn else None
        page.click("#draw-form button[type=submit]")
        page.wait_for_function(
            "before => { const i = document.querySelector('#drawn img');"
            " return i && i.src !== before && i.complete && i.naturalWidth }",
            arg=before,
        )
        assert page.is_visible("#drawn img") and page.inner_text("#problem") == ""
        source = page.get_attribute("#drawn img", "src")
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        drawn.append(np.asarray(Image.open(io.BytesIO(content))))
    assert drawn[0].shape == (32, 32, 3) and drawn[0].std() > 0
    if TRAINED:
        assert Judge("train", 32)(np.stack(drawn)).tolist() == [7, 3]


def test_a_refusal_is_shown(page, problems, tmp_path):
    (tmp_path / "note.png").write_text("no image")
    page.set_input_files("#chat-file", tmp_path / "note.png")
    page.fill("#chat-text", "what is this?")
    page.click("#chat-form button[type=submit]")
    page.wait_for_selector("#problem:not(:empty)")
    assert "an image is damaged" in page.inner_text("#problem")
    assert len(problems) == 1 and "400" in problems.pop()  # the browser's own note of it


def whole(answer):
    """An answer with its text as one part. How it is cut while it streams depends on the load."""
    if not isinstance(answer, list):
        return answer
    text = "".join(part.get("text", "") for part in answer)
    return [text, *(part for part in answer if "text" not in part)]


def test_eight_clients_for_a_minute(server):
    """No error, no mix-up, and memory that does not grow."""
    address, process = server
    images = [image_of(index)[0] for index in range(8)]

    def chat(n):
        part = {"picture": base64.b64encode(images[n]).decode()}
        body = {"messages": [{"role": "user", "parts": [part]}], "settings": {"max_new_tokens": 8}}
        return "/api/chat", body

    def draw(n):
        return "/api/draw", {
            "parts": [{"text": f"the digit {digits.WORDS[n]}"}],
            "settings": {"seed": n, "steps": 4},
        }

    alone = {}
    for n in range(8):
        for request in (chat(n), draw(n)):
            status, answer = post(address, *request)
            alone[request[0], n] = whole(answer)
            assert status == 200
    drawn = {json.dumps(answer) for (path, _), answer in alone.items() if path == "/api/draw"}
    assert len(drawn) == 8, "the answers cannot be told apart"

    def resident():
        text = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) / 1024

    end, halves = time.monotonic() + 60, [0.0, 0.0]

    def client(n):
        count = 0
        while time.monotonic() < end:
            path, body = (chat if count % 2 else draw)(n)
            status, answer = post(address, path, body)
            assert status == 200 and whole(answer) == alone[path, n], (n, count, answer)
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        counts = [pool.submit(client, n) for n in range(8)]
        # The least of some moments: an answer in hand takes memory and gives it back.
        time.sleep(15)
        halves[0] = min(resident() for _ in range(50) if not time.sleep(0.1))
        time.sleep(25)
        halves[1] = min(resident() for _ in range(50) if not time.sleep(0.1))
        counts = [count.result() for count in counts]
    assert min(counts) >= 2, counts
    growth = halves[1] - halves[0]
    print(f"{sum(counts)} answers, {halves[0]:.0f} MiB after 20 s, {growth:+.1f} at the end")
    assert growth < 0.02 * halves[0], halves
