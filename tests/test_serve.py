"""The web page's server: what it refuses, how it waits, and that answers are not mixed up."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import logging
import re
import socket
import threading
import time
import types
import zlib

import numpy as np
import pytest
from PIL import Image
from test_sources import video

pytest.importorskip("starlette")

from emu_jax.config import EmuConfig
from emu_jax.errors import UserError
from emu_jax.generate.image import Stopped
from emu_jax.generate.settings import RENAMED, GenerationConfig
from emu_jax.serve import app as serving
from emu_jax.serve import middleware
from emu_jax.serve.app import chat as chat_with
from emu_jax.serve.app import make_app, make_server
from emu_jax.serve.connections import listen
from emu_jax.serve.requests import Limits, Refused, parse_chat, parse_draw
from emu_jax.serve.worker import Worker

LIMITS = Limits(
    body_bytes=200_000,
    body_seconds=0.5,
    parts=5,
    text_characters=50,
    images=3,
    pixels=10_000,
    waiting=3,
    seconds=2.0,
)


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"waiting": 0}, "--waiting and --seconds must be positive"),
        ({"seconds": 0.0}, "--waiting and --seconds must be positive"),
        ({"per_minute": -1}, "--per-minute and --drain must not be negative"),
        ({"drain_seconds": -0.5}, "--per-minute and --drain must not be negative"),
    ],
)
def test_limits_that_mean_nothing(limits, message):
    with pytest.raises(UserError, match=message):
        Limits(**limits)


class FakeTokenizer:
    instruct, family = False, "emu"
    spelled = ("[IMG]", "<|im_end|>")  # the latter as of a byte-level BPE


class FakeEmu:
    """Says what it was shown, a word at a time; `hold` keeps it from answering."""

    tokenizer, paints, cfg = FakeTokenizer(), True, EmuConfig()
    defaults = GenerationConfig()

    def __init__(self):
        self.hold = threading.Event()
        self.hold.set()
        self.started = threading.Event()
        self.asked, self.given_up, self.drawn = [], [], []

    def stream(self, prompt, max_images, **settings):
        self.started.set()
        self.hold.wait()
        for part in prompt:
            if part == "fail":
                raise RuntimeError("inside")
            if part == "mistake":
                raise UserError("too long: shorten it")
            if isinstance(part, list):
                part = f"{len(part)} frames"
            yield part if isinstance(part, str) else f"image {part.size}"
        yield f"{settings}"

    def generate_image(self, prompts, seed=0, stop=None, **settings):
        (prompt,) = prompts
        self.asked.append(seed)
        self.drawn.append(settings)
        self.started.set()
        while not self.hold.wait(0.01):
            if stop is not None and stop():
                self.given_up.append(seed)
                raise Stopped
        return [Image.new("RGB", (4, 4), (seed, len(prompt), 0))]


class Client:
    """Speaks ASGI to the application: no socket, no server."""

    def __init__(self, app):
        self.app = app

    async def __call__(
        self,
        path,
        body=None,
        *,
        raw=None,
        headers=(),
        method="POST",
        stall=False,
        leave=None,
        client="127.0.0.1",
    ):
        """`leave`: an event after which the client is gone."""
        content = raw if raw is not None else json.dumps(body).encode()
        given = {"host": "localhost", "content-type": "application/json", **dict(headers)}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(k.encode(), v.encode()) for k, v in given.items()],
            "client": (client, 1),
            "server": ("localhost", 80),
        }
        sent, out = [], []

        async def receive():
            if not sent:
                sent.append(1)
                return {"type": "http.request", "body": content, "more_body": stall}
            if leave is not None:
                await leave.wait()
                return {"type": "http.disconnect"}
            await asyncio.sleep(60)

        async def send(message):
            out.append(message)

        await self.app(scope, receive, send)
        body = b"".join(m.get("body", b"") for m in out)
        return out[0]["status"], body.decode(), dict(out[0]["headers"])


@pytest.fixture
def emu():
    return FakeEmu()


def ask(emu, *requests, limits=LIMITS, hosts=serving.Hosts()):  # noqa: B008
    """Answers to requests (path, body, keywords), asked one after the other."""

    async def run():
        client = Client(make_app(emu, limits, hosts))
        return [await client(path, body, **more) for path, body, more in requests]

    return asyncio.run(run())


def png(size=(8, 6), format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(file, format)
    return base64.b64encode(file.getvalue()).decode()


def chat(*parts, **settings):
    return {"messages": [{"role": "user", "parts": list(parts)}], "settings": settings}


def lines(body):
    return [json.loads(line) for line in body.splitlines()]


def test_an_answer_comes_in_lines(emu):
    (status, body, headers), (_, drawn, _), (_, about, _), (page_status, page, _) = ask(
        emu,
        ("/api/chat", chat({"picture": png()}, {"text": "what?"}, max_new_tokens=7, seed=3), {}),
        ("/api/draw", {"parts": [{"text": "seven"}], "settings": {"seed": 9}}, {}),
        ("/api/about", None, {"method": "GET"}),
        ("/", None, {"method": "GET"}),
    )
    assert status == 200 and lines(body) == [
        {"text": "image (8, 6)"},
        {"text": "what?"},
        {"text": "{'max_new_tokens': 7, 'seed': 3}"},
        {"done": True},
    ]
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    image, done = lines(drawn)
    content = base64.b64decode(image["picture"].removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(image)[0, 0], [9, 1, 0])
    assert done == {"done": True}
    assert json.loads(about) == {"paints": True, "instruct": False}
    assert page_status == 200 and "page.js" in page


def bomb(side=60_000):
    """A PNG of a few kilobytes that would be gigabytes of pixels."""

    def chunk(kind, content):
        end = zlib.crc32(kind + content).to_bytes(4)
        return len(content).to_bytes(4) + kind + content + end

    header = chunk(b"IHDR", side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0]))
    pixels = chunk(b"IDAT", zlib.compress(bytes(3_000_000), 9))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")).decode()


HOSTILE = {
    "not JSON": ({"raw": b"{"}, 400, "not JSON"),
    "deep JSON": ({"raw": b"[" * 100_000}, 400, "not JSON"),
    "not UTF-8": ({"raw": b'{"messages": "\xff"}'}, 400, "not JSON"),
    "a list": ([], 400, "must be a JSON object"),
    "no messages": ({}, 400, "messages must be a non-empty list"),
    "an unknown key": ({"messages": [], "path": "/etc/passwd"}, 400, "unknown key 'path'"),
    "no parts": (chat(), 400, "parts must be a list"),
    "a number for text": (chat({"text": 5}), 400, "a text must be a string"),
    "two in one": (chat({"text": "a", "picture": "b"}), 400, "one of text, picture"),
    "a path": (chat({"path": "../../etc/passwd"}), 400, "unknown key 'path'"),
    "a path for an image": (chat({"picture": "/etc/passwd"}), 400, "base64"),
    "stray characters": (chat({"picture": "*" + png()}), 400, "base64"),
    "an image that is none": (chat({"picture": "aGVsbG8="}), 400, "damaged"),
    "a strange format": (chat({"picture": png(format="PPM")}), 400, "not one of PNG"),
    "a token of this tokenizer": (chat({"text": "a <|im_end|>"}), 400, "must not spell"),
    "a bomb": (chat({"picture": bomb()}), 413, "more than 10000 pixels"),
    "too many pixels": (chat({"picture": png((101, 100))}), 413, "101x100 pixels"),
    "too many pixels together": (
        chat({"picture": png((80, 80))}, {"picture": png((80, 50))}),
        413,
        "10000 in all",
    ),
    "too many images": (chat(*[{"picture": png()}] * 4), 413, "more than 3 images"),
    "too many parts": (chat(*[{"text": "a"}] * 6), 413, "more than 5 parts"),
    "too much text": (chat({"text": "a" * 51}), 413, "more than 50 characters"),
    "half a character": (chat({"text": "\ud800"}), 400, "surrogate"),
    "no video": (chat({"video": "aGVsbG8="}), 400, "a video cannot be read"),
    "a list of videos": (
        chat({"video": base64.b64encode(b"ffconcat version 1.0\nfile x.mp4").decode()}),
        400,
        "a video cannot be read",
    ),
    "an unknown setting": (chat({"text": "a"}, top_k=1), 400, "unknown key 'top_k'"),
    "a fraction": (chat({"text": "a"}, seed=1.5), 400, "settings.seed must be"),
    "not a number": (chat({"text": "a"}, seed=True), 400, "settings.seed must be"),
    "a number without end": (
        {"raw": json.dumps(chat({"text": "a"}, seed=7)).replace("7", "9" * 4000).encode()},
        400,
        "settings.seed must be",
    ),
    "no number at all": (
        {"raw": json.dumps(chat({"text": "a"}, seed=7)).replace("7", "NaN").encode()},
        400,
        "settings.seed must be",
    ),
    "the wrong speaker": (
        {"messages": [{"role": "assistant", "parts": [{"text": "a"}]}]},
        400,
        "must be 'user'",
    ),
    "an oversize body": ({"raw": b" " * 200_001}, 413, "larger than 200000 bytes"),
    "a length without end": (
        {"raw": b"{}", "headers": {"content-length": "9" * 5000}},
        413,
        "larger than",
    ),
    "a length in small raised digits": (
        {"raw": b"{}", "headers": {"content-length": "\xb2"}},
        400,
        "",
    ),
    "a false length": (
        {"raw": b"{}", "headers": {"content-length": "999999999"}},
        413,
        "larger than",
    ),
    "a form": ({"raw": b"a=1", "headers": {"content-type": "text/plain"}}, 415, "application/json"),
    "a slow body": ({"raw": b"{", "stall": True}, 408, "in time"),
    "another host": ({"raw": b"{}", "headers": {"host": "evil.example"}}, 400, "Invalid host"),
}


def test_hostile_requests_are_refused_and_the_server_goes_on(emu, tmp_path, monkeypatch):
    (tmp_path / "x.mp4").write_bytes(video(3))  # that a list of videos could name
    monkeypatch.chdir(tmp_path)

    def request(value):
        more = value if isinstance(value, dict) and "raw" in value else {}
        return ("/api/chat", value, more)

    fine = ("/api/chat", chat({"text": "hello"}), {})
    asked = [r for value, _, _ in HOSTILE.values() for r in (request(value), fine)]
    answers = ask(emu, *asked)
    for name, refused, after in zip(HOSTILE, answers[::2], answers[1::2], strict=True):
        _, status, message = HOSTILE[name]
        assert refused[0] == status and message in refused[1], (name, refused)
        assert after[0] == 200 and lines(after[1])[0] == {"text": "hello"}, name


SPECIAL = [
    "[PAD]",
    "[IMG]",
    "[/IMG]",
    "<image>",
    "[USER]",
    "[ASSISTANT]",
    "<s>",
    "</s>",
    "<unk>",
]


@pytest.mark.parametrize("token", SPECIAL)
def test_no_text_spells_a_special_token(token):
    with pytest.raises(Refused, match=f"must not spell {re.escape(token)}$") as refused:
        parse_chat(json.dumps(chat({"text": f"a {token} b"})).encode(), LIMITS)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "name, least, most, outside",
    [
        ("max_new_tokens", 1, 256, (0, 257)),
        ("seed", 0, 2**31 - 1, (-1, 2**31)),
        ("num_inference_steps", 1, 100, (0, 101)),
        ("guidance_scale", 0.0, 30.0, (-0.1, 30.1, float("nan"), float("inf"))),
        ("steps", 1, 100, (0, 101)),
        ("guidance", 0.0, 30.0, (-0.1, 30.1, float("nan"), float("inf"))),
    ],
)
def test_a_setting_is_taken_up_to_its_limits(name, least, most, outside):
    def parse(value):
        settings = {name: value}
        if name == "max_new_tokens":
            return parse_chat(json.dumps(chat({"text": "a"}, **settings)).encode(), Limits())
        return parse_draw(
            json.dumps({"parts": [{"text": "a"}], "settings": settings}).encode(), Limits()
        )

    for value in (least, most):
        assert parse(value).settings == {RENAMED.get(name, name): value}
    for value in outside:
        with pytest.raises(Refused, match=f"settings.{name} must be from {least} to {most}"):
            parse(value)


def test_the_largest_request_that_fits():
    """All limits of a request at once; the hostile requests go past each by one."""
    image, words = {"picture": png((60, 55))}, {"text": "a" * 25}
    request = json.dumps(chat(words, image, image, image, words)).encode()
    asked = parse_chat(request, dataclasses.replace(LIMITS, pixels=3 * 60 * 55))
    assert len(asked.messages[0].parts) == 5


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_of_each_format_is_read(format):
    asked = parse_draw(json.dumps({"parts": [{"picture": png(format=format)}]}).encode(), LIMITS)
    (image,) = asked.messages[0].parts
    assert image.size == (8, 6)
    assert np.abs(np.asarray(image.convert("RGB"), int) - [10, 20, 30]).max() < 12


def test_limits_hold_for_all_parts_together():
    """Also over the turns of a chat."""
    said = [{"role": role, "parts": [{"text": "a" * 20}]} for role in ("user", "assistant", "user")]
    with pytest.raises(Refused, match="more than 50 characters") as refused:
        parse_chat(json.dumps({"messages": said}).encode(), LIMITS)
    assert refused.value.status == 413
    with pytest.raises(Refused, match="the last message must be the user's"):
        parse_chat(json.dumps({"messages": said[:2]}).encode(), LIMITS)


def test_a_tuned_model_is_asked_in_its_format_and_may_draw(emu):
    said = [
        {"role": role, "parts": [{"text": text}]}
        for role, text in (("user", "one?"), ("assistant", "two"), ("user", "three?"))
    ]
    asked = parse_chat(json.dumps({"messages": said, "settings": {"seed": 7}}).encode(), LIMITS)
    emu.stream = lambda prompt, max_images, **settings: (prompt, max_images, settings)
    emu.defaults = GenerationConfig(system="Be brief.")
    assert chat_with(emu, asked) == (["one?", "two", "three?"], 0, {"seed": 7})
    emu.tokenizer = types.SimpleNamespace(instruct=True)
    assert chat_with(emu, asked) == (
        [
            "Be brief. [USER]: ",
            "one?",
            " [ASSISTANT]:",
            "two",
            "</s>",
            "[USER]: ",
            "three?",
            " [ASSISTANT]:",
        ],
        1,
        # The prompt spells the message, so the call must not ask for one again.
        {"seed": 7, "system": None, "grounding": False},
    )


def test_paths_lead_nowhere(emu):
    paths = ["/../app.py", "/page/../../cli.py", "/%2e%2e/app.py", "//etc/passwd", "/app.py"]
    answers = ask(emu, *[(path, None, {"method": "GET"}) for path in paths])
    assert [status for status, _, _ in answers] == [404] * len(paths)
    ((status, _, _),) = ask(emu, ("/api/chat", None, {"method": "GET"}))
    assert status == 405


def test_failures_are_told_without_their_insides(emu, caplog):
    (bad, good) = ask(
        emu, ("/api/chat", chat({"text": "fail"}), {}), ("/api/chat", chat({"text": "mistake"}), {})
    )
    assert bad[0] == 500 and "inside" not in bad[1]
    assert good[0] == 400 and "shorten it" in good[1]
    assert "inside" in caplog.text


def test_a_prompt_is_prepared_while_another_request_runs(emu):
    """An invalid one is refused at once. The model's thread prepares none: its batch would wait."""
    threads, answer = [], emu.stream

    def stream(prompt, **settings):
        threads.append(threading.current_thread().name)
        if prompt == ["mistake"]:
            raise UserError("too long: shorten it")
        return answer(prompt, **settings)

    async def run():
        client = Client(make_app(emu, LIMITS))
        running = asyncio.create_task(client("/api/chat", chat({"text": "a"})))
        while not emu.started.is_set():
            await asyncio.sleep(0.001)
        refused = await client("/api/chat", chat({"text": "mistake"}))
        emu.hold.set()
        return refused, await running

    emu.stream = stream
    emu.hold.clear()
    refused, answered = asyncio.run(run())
    assert refused[0] == 400 and "shorten it" in refused[1] and answered[0] == 200
    assert len(threads) == 2 and "emu-jax-serve" not in threads


def test_too_many_wait_and_none_too_long(emu):
    emu.hold.clear()

    async def run():
        client = Client(make_app(emu, LIMITS))
        waiting = [asyncio.create_task(client("/api/chat", chat({"text": "a"}))) for _ in range(3)]
        await asyncio.to_thread(emu.started.wait)
        await asyncio.sleep(0.2)
        status, body, headers = await client("/api/chat", chat({"text": "b"}))
        assert status == 429 and "3 requests are waiting" in body and headers[b"retry-after"]
        # There is no place for its images either: they are not even looked at.
        status, _, _ = await client("/api/chat", chat({"picture": "no picture"}))
        assert status == 429
        late = await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert {status for status, _, _ in late} == {504}
        emu.hold.set()
        await asyncio.sleep(0.2)
        status, body, _ = await client("/api/chat", chat({"text": "c"}))
        assert status == 200 and lines(body)[0] == {"text": "c"}

    asyncio.run(run())


def test_a_late_answer_never_ends_as_done():
    def answer():
        time.sleep(0.1)
        yield "late"

    async def run():
        worker = Worker(1, 0.05)
        ticket = worker.reserve()
        worker.submit(ticket, answer)
        await asyncio.to_thread(worker.close)
        ticket.deadline += 60  # who asked sees all that the worker said
        with pytest.raises(Refused) as refused:
            assert [part async for part in ticket.parts()]
        assert refused.value.status == 504

    asyncio.run(run())


@pytest.mark.parametrize(
    "host, names, known, unknown",
    [
        ("127.0.0.1", [], [], ["10.0.0.7", "machine", "[fe80::1]"]),
        ("127.0.0.2", [], ["127.0.0.2:80"], ["127.0.0.3"]),
        ("LOCALHOST", ["Model.lan"], ["model.lan:7860", "MODEL.LAN."], ["machine"]),
        (
            "0.0.0.0",
            [],
            [
                "machine",
                "MACHINE:7860",
                "machine.local",
                "machine.lan",
                "10.0.0.7:80",
                "[fe80::1]:80",
            ],
            ["model.lan"],
        ),
        ("0.0.0.0", ["model.lan"], ["model.lan", "10.0.0.7"], ["machine", "evil.model.lan"]),
    ],
)
def test_a_server_answers_to_its_names_alone(host, names, known, unknown, monkeypatch, emu):
    """However it is reached: a page whose name leads here must not reach the model."""
    monkeypatch.setattr(serving.socket, "gethostname", lambda: "Machine")
    monkeypatch.setattr(serving.socket, "getfqdn", lambda: "machine.lan")
    sockets = listen(host, 0)
    try:
        hosts = serving.allowed_hosts(host, sockets, names)
    finally:
        for opened in sockets:
            opened.close()
    known = [host, "localhost", "localhost:80", "127.0.0.1:7860", "[::1]:80", "[::1]", *known]
    unknown = [
        "evil.example",
        "evil.example:80",
        "",
        ":80",
        "localhost:evil",
        "1.2.3.4.evil",
        *unknown,
    ]
    assert [name for name in known if not hosts.allow(name)] == []
    assert [name for name in unknown if hosts.allow(name)] == []


def test_the_names_of_a_server_are_checked_on_every_path(emu):
    def get(path, host):
        return path, None, {"method": "GET", "headers": {"host": host}}

    hosts = serving.Hosts(frozenset({"model.lan"}), addresses=True)
    asked = [get(path, host) for path in ("/", "/api/about") for host in ("model.lan", "10.0.0.7")]
    answers = ask(emu, *asked, *(get(path, "evil") for path in ("/", "/api/about")), hosts=hosts)
    assert [status for status, *_ in answers] == [200] * 4 + [400] * 2
    assert "--allow-host" in answers[-1][1]


def test_pages_of_other_sites_are_granted_nothing(emu):
    """Browsers ask before they send JSON elsewhere; the answer names no site."""
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    plain = {"origin": "https://evil.example", "content-type": "text/plain"}
    asked, sent = ask(
        emu,
        ("/api/chat", None, {"method": "OPTIONS", "headers": origin}),
        ("/api/chat", chat({"text": "a"}), {"headers": plain}),
    )
    assert (asked[0], sent[0]) == (405, 415)
    assert not any(name.startswith(b"access-control") for _, _, h in (asked, sent) for name in h)


def test_a_body_that_is_late_already_is_not_refused_twice():
    """One whose time is over takes up room until its request runs again."""

    async def run():
        loop, bodies = asyncio.get_running_loop(), serving._Bodies(LIMITS)
        failed = []

        async def late():
            async with asyncio.timeout(None) as timeout:
                bodies._sizes |= {timeout: 10**9, asyncio.timeout(None): 1}
                timeout.reschedule(loop.time())
                loop.call_soon(make_room)  # the timeout expires first
                await asyncio.sleep(9)

        def make_room():
            try:
                bodies._make_room()
            except RuntimeError as error:
                failed.append(error)

        with pytest.raises(TimeoutError):
            await late()
        assert not failed and len(bodies._sizes) == 1

    asyncio.run(run())


def test_a_request_may_be_addressed_in_ipv6(emu):
    headers = {"host": "[::1]:8000"}
    ((status, _, _),) = ask(emu, ("/api/about", None, {"method": "GET", "headers": headers}))
    assert status == 200


def test_frames_of_a_video_count_together(emu):
    def video(side):
        av = pytest.importorskip("av")
        file = io.BytesIO()
        with av.open(file, "w", "mp4") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width = stream.height = side
            frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return chat({"video": base64.b64encode(file.getvalue()).decode()})

    limits = dataclasses.replace(LIMITS, images=8)
    asked = [("/api/chat", video(side), {}) for side in (32, 64)]
    fits, larger = ask(emu, *asked, limits=limits)
    assert fits[0] == 200 and lines(fits[1])[0] == {"text": "8 frames"}
    assert larger[0] == 413 and "64x64 pixels in 8 frames: at most 10000 in all" in larger[1]
    ((status, body, _),) = ask(emu, asked[0])
    assert status == 413 and "more than 3 images" in body


def test_answers_are_not_mixed_up(emu):
    async def run():
        client = Client(make_app(emu, Limits()))

        async def one(n):
            for turn in range(20):
                text = f"client {n} turn {turn}"
                _, body, _ = await client("/api/chat", chat({"text": text}, seed=n))
                assert [part.get("text") for part in lines(body)[:2]] == [text, f"{{'seed': {n}}}"]

        started = time.monotonic()
        await asyncio.gather(*(one(n) for n in range(8)))
        assert time.monotonic() - started < 60

    asyncio.run(run())


def test_every_answer_has_the_security_headers(emu, caplog):
    def broken(*_):
        raise RuntimeError("inside")

    asked = [
        ("/", None, {"method": "GET"}),
        ("/api/about", None, {"method": "GET"}),
        ("/api/chat", chat({"text": "a"}), {}),
        ("/nothing", None, {"method": "GET"}),
        ("/api/chat", None, {"method": "GET"}),
        ("/api/chat", chat(), {}),
        ("/api/about", None, {"method": "GET", "headers": {"host": "evil.example"}}),
    ]
    answers = ask(emu, *asked)
    assert [status for status, *_ in answers] == [200, 200, 200, 404, 405, 400, 400]

    async def fail():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(middleware, "client_of", broken)
            sent = []
            app = make_app(emu, LIMITS)

            async def send(message):
                sent.append(message)

            with contextlib.suppress(RuntimeError):  # the server logs it
                await app(
                    {
                        "type": "http",
                        "method": "POST",
                        "path": "/api/chat",
                        "headers": [(b"host", b"localhost")],
                        "query_string": b"",
                    },
                    None,
                    send,
                )
            return sent[0]["status"], sent[1]["body"].decode(), dict(sent[0]["headers"])

    answers.append(asyncio.run(fail()))
    assert answers[-1][0] == 500 and "inside" not in answers[-1][1]
    for status, _, headers in answers:
        policy = headers[b"content-security-policy"].decode()
        assert "frame-ancestors 'none'" in policy and "default-src 'self'" in policy, status
        assert headers[b"x-content-type-options"] == b"nosniff" and b"cache-control" in headers


def draw(seed):
    return {"parts": [{"text": "a"}], "settings": {"seed": seed}}


def test_what_nobody_waits_for_is_not_computed(emu):
    """A client that leaves frees its place at once; its drawing stops."""
    emu.hold.clear()

    async def run():
        client, leave = Client(make_app(emu, LIMITS)), asyncio.Event()
        gone = [
            asyncio.create_task(client("/api/draw", draw(seed), leave=leave)) for seed in (1, 2, 3)
        ]
        await asyncio.to_thread(emu.started.wait)
        await asyncio.sleep(0.2)
        assert (await client("/api/draw", draw(4)))[0] == 429
        leave.set()
        assert [status for status, *_ in await asyncio.gather(*gone)] == [499] * 3
        waiting = [asyncio.create_task(client("/api/draw", draw(seed))) for seed in (5, 6)]
        await asyncio.sleep(0.1)
        emu.hold.set()
        assert [status for status, *_ in await asyncio.gather(*waiting)] == [200, 200]

    asyncio.run(run())
    assert emu.given_up == emu.asked[:1] and sorted(emu.asked[1:]) == [5, 6]


def test_others_are_served_while_an_image_is_encoded(emu):
    started, served = threading.Event(), threading.Event()

    class Slow:
        def save(self, file, format):
            started.set()
            assert served.wait(2), "nobody was served"

    emu.generate_image = lambda *_, **__: [Slow()]

    async def run():
        client = Client(make_app(emu, LIMITS))
        drawn = asyncio.create_task(client("/api/draw", draw(1)))
        await asyncio.to_thread(started.wait, 5)
        assert (await client("/api/about", method="GET"))[0] == 200
        served.set()
        assert (await drawn)[0] == 200

    asyncio.run(run())


def test_clients_take_turns():
    done = []

    async def run():
        worker, hold = Worker(9, 60), threading.Event()
        for name in ["a1", "a2", "a3", "a4", "b1", "b2", "c1"]:
            ticket = worker.reserve(client=name[0])
            first = not done and name == "a1"

            def answer(name=name, first=first):
                if first:
                    hold.wait()
                done.append(name)
                return iter(())

            worker.submit(ticket, answer)
        await asyncio.sleep(0.05)
        hold.set()
        await asyncio.to_thread(worker.close)

    asyncio.run(run())
    assert done == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_one_client_may_not_take_all_places(emu):
    """By address; on the loopback a proxy's clients all have one."""
    emu.hold.clear()

    async def run():
        limits = dataclasses.replace(LIMITS, per_client=1, waiting=9, seconds=9)
        client = Client(make_app(emu, limits))
        far = ("192.0.2.1", "2001:db8::1", "127.0.0.1", "127.0.0.1", "::ffff:127.0.0.9")
        waiting = [asyncio.create_task(client("/api/draw", draw(1), client=c)) for c in far]
        await asyncio.to_thread(emu.started.wait)
        await asyncio.sleep(0.05)
        for address in ("192.0.2.1", "2001:db8::ffff", "::ffff:192.0.2.1"):
            status, body, headers = await client("/api/draw", draw(2), client=address)
            assert status == 429 and "1 of your requests" in body and headers[b"retry-after"]
        emu.hold.set()
        status, *_ = await client("/api/draw", draw(3), client="192.0.2.2")
        assert status == 200
        assert {status for status, *_ in await asyncio.gather(*waiting)} == {200}
        assert (await client("/api/draw", draw(4), client="192.0.2.1"))[0] == 200

    asyncio.run(run())


# --- Real sockets ----------------------------------------------------------------------------


class Served:
    """A server in a thread, and connections to it."""

    def __init__(self, emu, limits, stack):
        (listening,) = listen("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        self.worker = None
        self._stack, self._ready = stack, threading.Event()

        def run():
            async def serve():
                app = make_app(emu, limits)
                self.worker, self.server = app.state.worker, make_server(app, limits)
                self._ready.set()
                await self.server.serve([listening])

            asyncio.run(serve())

        self.thread = threading.Thread(target=run)
        self.thread.start()
        self._ready.wait()

    def connect(self, content=b""):
        made = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        self._stack.callback(made.close)
        made.sendall(content)
        return made

    def post(self, path, body):
        """(status, lines of the answer)."""
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=9)
        made.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = made.getresponse()
        content = answer.read().decode()
        made.close()
        return answer.status, content

    def stop(self):
        """Shuts down, and returns the seconds that it took."""
        started = time.monotonic()
        self.server.should_exit = True
        self.thread.join()
        return time.monotonic() - started


@pytest.fixture
def served():
    with contextlib.ExitStack() as stack:
        made = []

        def start(emu, **limits):
            made.append(Served(emu, dataclasses.replace(LIMITS, **limits), stack))
            return made[-1]

        yield start
        for one in made:
            one.stop()
            one.worker.close()


def closed_by_server(connection, seconds):
    """Returns whether a connection is closed within some seconds; reads what came before."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


HEADER = (
    b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


def test_silent_connections_keep_nobody_out(emu, served):
    """Beyond the limit the one that was silent longest goes."""
    server = served(emu, connections=20, header_seconds=60, body_seconds=60)
    busy = server.connect(HEADER % 9 + b"{")  # a request, if a slow one
    time.sleep(0.2)
    silent = [server.connect() for _ in range(40)]
    assert server.post("/api/chat", chat({"text": "a"}))[0] == 200
    assert all(closed_by_server(connection, 9) for connection in silent[:20])
    assert not any(closed_by_server(connection, 0.01) for connection in (*silent[-18:], busy))


def test_a_request_must_arrive_in_time(emu, served):
    """Half a header, a byte now and then, is no request; nor are bytes behind an answer."""
    server = served(emu, header_seconds=0.5, body_seconds=60)
    waits = server.connect(HEADER % 9 + b"{")  # a body has more time
    silent, slow = server.connect(), server.connect(b"GET /api/about HTTP/1.1\r\n")
    refused = server.connect(HEADER % 10**9)
    until = time.monotonic() + 9
    for connection in (slow, refused):
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < until:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() < until, "bytes keep a connection open"
    assert closed_by_server(silent, 9) and not closed_by_server(waits, 0.01)


def test_slow_bodies_are_bounded_together(emu, served):
    """Beyond the limit the one that has been arriving longest goes."""
    server = served(emu, bodies_bytes=400_000, body_seconds=9, header_seconds=9)
    slow = [server.connect(HEADER % 150_000 + b" " * 149_000) for _ in range(4)]
    fine = chat({"text": "a"})
    assert server.post("/api/chat", fine)[0] == 200
    refused = []
    for connection in slow:
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            refused.append(connection.recv(4096).split(b"\r\n")[0].decode())
    assert refused == ["HTTP/1.1 408 Request Timeout"] * 2


def test_half_sent_requests_do_not_delay_the_end(emu, served, caplog):
    """Nor silent connections, nor what waits in line; what is in hand may end."""
    server = served(emu, body_seconds=30, seconds=30)
    held = [server.connect(), server.connect(b"GET / HT"), server.connect(HEADER % 9 + b"{")]
    emu.hold.clear()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        drawn = pool.submit(server.post, "/api/draw", draw(1))
        emu.started.wait()
        waits = pool.submit(server.post, "/api/draw", draw(2))
        time.sleep(0.2)
        threading.Timer(0.5, emu.hold.set).start()
        assert 0.4 < server.stop() < 4  # not body_seconds
        assert drawn.result()[0] == 200 and '"done": true' in drawn.result()[1]
        assert waits.result()[0] == 503 and "shutting down" in waits.result()[1]
    assert emu.asked == [1] and all(closed_by_server(connection, 0.1) for connection in held)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_port_in_use_is_told_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "load", lambda *_, **__: pytest.fail("loaded"))
    (first,) = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, pytest.raises(UserError, match=f"port {port}, is in use: .* --port"):
        serving.serve(tmp_path, "127.0.0.1", port, LIMITS)
    with pytest.raises(UserError, match="--host 192.0.2.1|not an address of this machine"):
        serving.serve(tmp_path, "192.0.2.1", 0, LIMITS)
    with pytest.raises(UserError, match="--host no.such.host.invalid is not an address"):
        serving.serve(tmp_path, "no.such.host.invalid", 0, LIMITS)
