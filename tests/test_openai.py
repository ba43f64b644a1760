"""The OpenAI-compatible endpoints, with OpenAI's client, and what guards them."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import threading
import time
import types
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("openai")

import openai
from test_serve import LIMITS as SHORT_LIMITS
from test_serve import Client, FakeEmu, Served, chat, lines, png, served  # noqa: F401

from emu_jax.config import emu2_gen
from emu_jax.errors import UserError
from emu_jax.generate.engine import Engine, Usage
from emu_jax.generate.settings import GenerationConfig
from emu_jax.serve import app as serving
from emu_jax.serve import middleware
from emu_jax.serve import worker as workers
from emu_jax.serve.app import make_app
from emu_jax.serve.openai import Trimmer
from emu_jax.serve.requests import ImageSizes, Refused
from emu_jax.serve.worker import Worker

PATIENT = {"seconds": 60.0, "body_seconds": 60.0}  # nothing here may depend on the machine's speed
LIMITS = dataclasses.replace(SHORT_LIMITS, **PATIENT)


class Talker(FakeEmu):
    """Says `answer` a piece at a time, then what it was asked with."""

    defaults = GenerationConfig(max_new_tokens=9)
    answer = (" one", " two", " three ")

    def stream(self, prompt, max_images, **settings):
        self.asked.append((prompt, max_images, settings))
        if prompt[0] == "fail":
            yield "a"
            raise RuntimeError("inside")
        yield from self.answer
        yield Usage(5, settings.get("max_new_tokens", 3), False)


@pytest.fixture
def emu():
    return Talker()


@pytest.fixture
def client(emu, served):  # noqa: F811
    server = served(emu, **PATIENT)
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    ) as made:
        made.server = server
        yield made


def user(*content):
    return [{"role": "user", "content": list(content) if len(content) > 1 else content[0]}]


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_completion_whole_and_streamed(client, emu):
    image = image_part(f"data:image/png;base64,{png()}")
    said = user({"type": "text", "text": "what is this?"}, image)
    whole = client.chat.completions.create(
        model="emu", messages=said, max_tokens=3, temperature=0.5, top_p=0.9, seed=4
    )
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == ("one two three", "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 3)
    (prompt, max_images, settings) = emu.asked.pop()
    assert prompt[0] == "what is this?" and prompt[1].size == (8, 6) and max_images == 0
    sampled = {"temperature": 0.5, "top_p": 0.9, "do_sample": True}
    assert settings == {"max_new_tokens": 3, "seed": 4, **sampled}

    events = list(
        client.chat.completions.create(
            model="emu",
            messages=said,
            stream=True,
            stop=["thr", "zzz"],
            temperature=0,
            stream_options={"include_usage": True},
        )
    )
    texts = [e.choices[0].delta.content for e in events if e.choices]
    assert texts == ["", "one", " two", None] and len({e.id for e in events}) == 1
    assert events[-2].choices[0].finish_reason == "stop" and events[-1].usage.prompt_tokens == 0
    # The usage follows the stop text, behind which nothing is asked for.
    assert emu.asked.pop()[2] == {"do_sample": False}


def test_an_image_is_generated(client, emu):
    drawn = client.images.generate(
        prompt="seven", response_format="b64_json", size="512x512", extra_body={"seed": 7}
    )
    with Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json))) as image:
        np.testing.assert_array_equal(np.asarray(image)[0, 0], [7, 1, 0])
    emu.paints = False
    with pytest.raises(openai.BadRequestError, match="no decoder"):
        client.images.generate(prompt="seven")


REFUSED = {
    "a model that is not here": ({"model": "gpt"}, openai.NotFoundError, "no model 'gpt'"),
    "a remote image": (
        {"messages": user(image_part("http://169.254.169.254/"), {"type": "text", "text": "a"})},
        openai.BadRequestError,
        "no other URL is fetched",
    ),
    "a file": (
        {"messages": user(image_part("file:///etc/passwd"), {"type": "text", "text": "a"})},
        openai.BadRequestError,
        "give a data URL",
    ),
    "two answers": ({"n": 2}, openai.BadRequestError, "n must be 1"),
    "a penalty": ({"presence_penalty": 1.0}, openai.BadRequestError, "presence_penalty must be"),
    "too hot": ({"temperature": 2.5}, openai.BadRequestError, "temperature must be from 0.0 to"),
    "too long": ({"max_tokens": 257}, openai.BadRequestError, "max_tokens must be from 1"),
    "a special token": ({"messages": user("a </s>")}, openai.BadRequestError, "must not spell"),
    "too much text": (
        {"messages": user("a" * 51)},
        openai.APIStatusError,
        "more than 50 characters",
    ),
    "no user": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        openai.BadRequestError,
        "role must be 'user'",
    ),
    "a system message": (
        {"messages": [{"role": "system", "content": "a"}, *user("b")]},
        openai.BadRequestError,
        "needs an instruction-tuned model",
    ),
    "an empty stop": ({"stop": [""]}, openai.BadRequestError, "stop must be a text"),
    "tools": ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools must be"),
}


def test_refusals_have_openais_shape(client, emu):
    for name, (change, error, message) in REFUSED.items():
        asked = {"model": "emu", "messages": user("hello")} | change
        with pytest.raises(error, match=message) as refused:
            client.chat.completions.create(**asked)
        assert set(refused.value.body) == {"message", "type", "param", "code"}, name
    assert emu.asked == []
    for change, message in (({"size": "64x64"}, "size must be 512x512"), ({"n": 3}, "n must be")):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.generate(prompt="seven", **change)
    with pytest.raises(openai.APIError, match="internal error") as failed:
        list(client.chat.completions.create(model="emu", messages=user("fail"), stream=True))
    assert "inside" not in str(failed.value)
    assert client.chat.completions.create(model="emu", messages=user("hello")).choices


def test_models_health_and_metrics(client, emu):
    assert [model.id for model in client.models.list()] == ["emu"]
    client.chat.completions.create(model="emu", messages=user("a"), max_tokens=4)

    def get(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{client.server.port}{path}") as answer:
            return answer.headers, answer.read().decode()

    assert json.loads(get("/health")[1]) == {"status": "ok"}
    headers, text = get("/metrics")
    assert headers["content-type"].startswith("text/plain") and headers["x-request-id"]
    assert 'emu_jax_requests_total{path="/v1/chat/completions",status="200"} 1' in text
    assert 'request_seconds_bucket{path="/v1/chat/completions",le="+Inf"} 1' in text
    assert "emu_jax_generated_tokens_total 4" in text and "emu_jax_requests_running 0" in text
    client.server.worker.stop()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get("/health")


def requests(app, *asked):
    """Statuses, bodies and headers of requests (path, body, keywords) to an application."""

    async def run():
        client = Client(app)
        return [await client(path, body, **more) for path, body, more in asked]

    return asyncio.run(run())


def with_key(key, **more):
    return {"headers": {"authorization": f"Bearer {key}", **more}}


def test_with_keys_only_their_holders_are_answered(emu):
    async def run():
        client = Client(make_app(emu, LIMITS, keys=["right", "other"]))
        asked = chat({"text": "a"})
        for path in ("/", "/api/about", "/health"):
            assert (await client(path, method="GET"))[0] == 200
        for path in ("/metrics", "/v1/models", "/v1/nothing"):
            assert (await client(path, method="GET"))[0] == 401
        for more in ({}, with_key("wrong"), with_key(""), {"headers": {"authorization": "right"}}):
            status, body, headers = await client("/api/chat", asked, **more)
            assert status == 401 and "Authorization" in body
            assert headers[b"www-authenticate"] == b"Bearer"
        status, body, _ = await client("/v1/chat/completions", {}, **with_key("wrong"))
        assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
        assert emu.asked == []
        for key in ("right", "other"):
            assert (await client("/api/chat", asked, **with_key(key)))[0] == 200

    asyncio.run(run())


def test_a_client_asks_so_often_in_a_minute(emu):
    """By key, or else by address; on the loopback without a key there is no limit."""
    limits = LIMITS.__class__(per_minute=2)

    async def run():
        client = Client(make_app(emu, limits, keys=["a", "b"]))

        async def status(**more):
            return (await client("/api/chat", chat({"text": "a"}), **more))[0]

        assert [await status(**with_key("a")) for _ in range(3)] == [200, 200, 429]
        assert await status(**with_key("b")) == 200
        client = Client(make_app(emu, limits))
        assert [await status(client="192.0.2.1") for _ in range(3)] == [200, 200, 429]
        assert [await status() for _ in range(3)] == [200] * 3

    asyncio.run(run())


def test_an_address_may_not_guess_keys(emu, monkeypatch):
    """After a few wrong keys even the right one is refused, to that address alone."""
    monkeypatch.setattr(middleware, "WRONG_KEYS", 2)

    async def run():
        client, body = Client(make_app(emu, LIMITS, keys=["right"])), chat({"text": "a"})

        async def status(address, key):
            return (await client("/api/chat", body, client=address, **with_key(key)))[0]

        async def statuses(address, *keys):
            return [await status(address, key) for key in keys]

        assert await statuses("192.0.2.1", "a", "right", "b", "right") == [401, 200, 401, 429]
        assert (await client("/", method="GET", client="192.0.2.1"))[0] == 200
        assert await statuses("192.0.2.2", "right") == [200]
        assert await statuses("127.0.0.1", "a", "b", "c", "right") == [401, 401, 401, 200]

    asyncio.run(run())


def test_a_request_has_a_name(emu):
    async def run():
        client, names = Client(make_app(emu, LIMITS)), []
        for given in ("mine-1", "two words", "x" * 65, None):
            headers = {} if given is None else {"x-request-id": given}
            _, _, answer = await client("/api/about", method="GET", headers=headers)
            names.append(answer[b"x-request-id"].decode())
        return names

    names = asyncio.run(run())
    assert names[0] == "mine-1" and len(set(names)) == 4
    assert all(name.startswith("req-") for name in names[1:])


@pytest.mark.parametrize(
    "stops, pieces, text",
    [
        ((), [" a", " b ", "c "], ["a", " b", " c", ""]),
        (("stop",), ["a st", "op b", "c"], ["a", "", "", ""]),
        (("stop",), ["a st", "ay"], ["a", " stay", ""]),
        (("xy", "y"), ["axxy"], ["ax", ""]),
        (("aab",), ["aaa", "b!"], ["a", "", ""]),
    ],
)
def test_a_text_ends_before_a_stop_text(stops, pieces, text):
    trimmer = Trimmer(stops)
    assert [*map(trimmer.push, pieces), trimmer.end()] == text


def test_answers_share_the_steps_of_a_batch():
    """Two wait for the same step, and a third, which came too many, for one of them to end."""
    steps, closed = [], []

    def answer(name, length):
        try:
            for n in range(length):
                seen = len(steps)
                yield f"{name}{n}"
                while len(steps) == seen:
                    yield None
        finally:
            closed.append(name)

    def step():
        steps.append(sorted(ticket.client for ticket in worker._running))
        if len(steps) == 7:
            raise RuntimeError("out of memory")

    async def run():
        nonlocal worker
        hold = threading.Event()
        worker = Worker(9, 60, concurrent=2, step=step)
        first = worker.reserve("first")
        worker.submit(first, lambda: iter(hold.wait() and [] or []))
        while not worker.running:
            await asyncio.sleep(0.01)
        tickets = [worker.reserve(name) for name in "abc"]
        for ticket, length in zip(tickets, (4, 2, 9), strict=True):
            worker.submit(ticket, lambda t=ticket, n=length: answer(t.client, n))
        assert [worker.place(ticket) for ticket in tickets] == [1, 2, 3]
        hold.set()
        said = []
        for ticket in tickets[:2]:
            said.append([part async for part in ticket.parts()])
        with pytest.raises(Exception, match="internal error"):
            said.append([part async for part in tickets[2].parts()])
        worker.close()
        return said

    worker = None
    said = asyncio.run(run())
    assert said == [["a0", "a1", "a2", "a3"], ["b0", "b1"]]
    assert steps[:3] == [["a", "b"], ["a", "b"], ["a", "c"]] and sorted(closed) == ["a", "b", "c"]


def test_a_step_waits_for_requests_that_are_likely_to_arrive():
    """For half as many as lately were in progress together. One that is alone does not wait."""
    steps = []

    def answer():
        seen = len(steps)
        while len(steps) == seen:
            yield None
        yield "a"

    def step():
        steps.append(worker.running)

    async def ask():
        ticket = worker.reserve()
        worker.submit(ticket, answer)
        assert [part async for part in ticket.parts()] == ["a"]

    async def run():
        nonlocal worker
        worker = Worker(9, 60, concurrent=9, step=step, gather_seconds=60)
        await ask()
        assert steps == [1]
        worker._others = 5.0
        first = asyncio.create_task(ask())
        await asyncio.sleep(0.1)
        assert steps == [1] and worker.running == 1
        await asyncio.gather(first, ask())
        worker.close()

    worker = None
    asyncio.run(run())
    assert steps == [1, 2]


class Motor(Talker, Engine):
    """An engine without a model, whose searches wait for `hold`."""

    slots = image_slots = 1
    active = (0, 0)

    def __init__(self):
        super().__init__()
        self.log = []

    def warm_up(self):
        return [self.hold.wait, lambda: 1 / 0, lambda: self.log.append("warm")]

    def step(self):
        time.sleep(0.001)

    def search(self, prompt, **settings):
        self.log.append(prompt[0])
        while not self.hold.is_set():
            yield None
        yield prompt[0]


def test_requests_wait_for_the_warm_up(caplog, monkeypatch):
    """A step that fails is logged. The others are run, and requests are answered, even if the
    progress cannot be shown. A page that asks for progress is told."""

    def unseen(steps, *args):
        yield from steps
        raise BrokenPipeError

    monkeypatch.setattr(serving, "track", unseen)
    monkeypatch.setattr(serving, "PLACE_SECONDS", 0.01)
    engine = Motor()
    engine.hold.clear()

    async def run():
        app, told = make_app(engine, LIMITS, warm_up=True), asyncio.Event()
        wait_seconds = app.state.worker.wait_seconds

        def told_seconds(place):
            told.set()
            return wait_seconds(place)

        monkeypatch.setattr(app.state.worker, "wait_seconds", told_seconds)
        client = Client(app)

        async def health():
            status, body, _ = await client("/health", method="GET")
            return status, json.loads(body)["status"]

        assert await health() == (503, "warming up")
        asked = chat({"text": "a"}) | {"progress": True}
        answer = asyncio.create_task(client("/api/chat", asked))
        await told.wait()
        assert app.state.worker.queued and not engine.started.is_set()
        engine.hold.set()
        status, body, _ = await answer
        assert status == 200 and engine.log == ["warm"]
        assert lines(body)[0] == {"waiting": 1, "seconds": None, "warming_up": True}
        assert await health() == (200, "ok")

    asyncio.run(run())
    assert "a step of the warm-up failed" in caplog.text and "ZeroDivisionError" in caplog.text
    assert "the warm-up ended early" in caplog.text


def test_the_warm_up_takes_no_time_of_requests(monkeypatch):
    """Their time to be answered begins at its end, and so does what counts as a wait."""
    now, seconds = [0.0], 0.01
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(workers, "time", clock)

    async def said(ticket):
        return [part async for part in ticket.parts()]

    async def run():
        hold = threading.Event()
        worker = Worker(9, seconds, warm_up=[hold.wait])
        tickets = [worker.reserve() for _ in range(3)]
        for ticket in tickets[:2]:
            worker.submit(ticket, lambda: iter("a"))
        answers = [asyncio.create_task(said(ticket)) for ticket in tickets]
        await asyncio.sleep(10 * seconds)
        assert not any(answer.done() for answer in answers)
        now[0] = 100.0
        hold.set()
        while worker.status != "ok":
            await asyncio.sleep(0.01)
        worker.submit(tickets[2], lambda: iter("a"))  # was still being parsed
        assert await asyncio.gather(*answers) == [["a"]] * 3
        assert [ticket.deadline for ticket in tickets] == [100 + seconds] * 3
        worker.close()
        return worker.wait_seconds(1)

    assert asyncio.run(run()) == 0


def test_a_server_that_stops_does_not_finish_its_warm_up():
    hold, done = threading.Event(), []
    worker = Worker(9, 60, warm_up=[hold.wait, lambda: done.append(1)])
    worker.stop()
    assert worker.status == "shutting down"
    hold.set()
    worker.close()
    assert done == []


def test_a_search_that_waits_lets_others_pass(caplog):
    """One runs at a time, in order; a text starts although more wait than may run at once."""
    engine = Motor()
    engine.hold.clear()

    async def run():
        app = make_app(engine, dataclasses.replace(LIMITS, waiting=9))
        client, worker = Client(app), app.state.worker

        def search(name):
            return asyncio.create_task(client("/api/chat", chat({"text": name}, num_beams=2)))

        searches = []
        for number in range(engine.concurrent):
            searches.append(search(f"{number}"))
            while worker.running + worker.queued <= number:
                await asyncio.sleep(0.01)
        assert (await client("/api/chat", chat({"text": "a"})))[0] == 200
        assert (worker.running, worker.queued) == (1, engine.concurrent - 1)
        places = [ticket.place for ticket in worker._line]
        assert places == [*range(1, engine.concurrent)] and engine.log == ["0"]
        engine.hold.set()
        answers = [lines(body)[0]["text"] for _, body, _ in await asyncio.gather(*searches)]
        assert answers == engine.log == [f"{number}" for number in range(engine.concurrent)]

    asyncio.run(run())


def test_texts_that_wait_let_a_search_and_an_image_pass():
    engine = Motor()
    assert engine.concurrent == 5 and engine.kinds == {"text": 2, "image": 2, "search": 1}

    async def run():
        worker = Worker(9, 60, engine.concurrent, engine.step, engine.kinds)
        hold = threading.Event()

        def held():
            while not hold.is_set():
                yield None

        tickets = [worker.reserve() for _ in range(5)]
        for ticket in tickets[:4]:
            worker.submit(ticket, held, "text")
        worker.submit(tickets[4], lambda: iter("a"), "search")
        assert [part async for part in tickets[4].parts()] == ["a"]
        assert (worker.running, worker.queued) == (2, 2)
        hold.set()
        for ticket in tickets[:4]:
            assert [part async for part in ticket.parts()] == []
        worker.close()

    asyncio.run(run())


def test_a_wait_is_estimated_from_the_waits_of_others(monkeypatch):
    """Per place in the queue; a request that starts at once tells nothing."""
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(workers, "time", clock)

    async def run():
        hold, worker = threading.Event(), Worker(9, 60)

        def submit(answer):
            ticket = worker.reserve()
            worker.submit(ticket, answer)
            return ticket

        first = submit(lambda: iter(hold.wait() and []))
        while not worker.running:
            await asyncio.sleep(0.01)
        others = [submit(lambda: iter([])) for _ in range(2)]
        assert [ticket.place for ticket in (first, *others)] == [0, 1, 2]
        assert worker.wait_seconds(1) is None
        now[0] = 4.0
        hold.set()
        for ticket in (first, *others):
            assert [part async for part in ticket.parts()] == []
        while worker.running:
            await asyncio.sleep(0.01)
        alone = submit(lambda: iter([]))
        assert [part async for part in alone.parts()] == [] and alone.place == 0
        worker.close()
        return worker.wait_seconds(2)

    assert asyncio.run(run()) == pytest.approx(2 * (4 + workers.MEAN_WEIGHT * (2 - 4)))


def test_a_page_that_waits_is_told_its_place(emu, monkeypatch):
    monkeypatch.setattr(serving, "PLACE_SECONDS", 0.01)
    emu.hold.clear()

    async def run():
        app, told = make_app(emu, LIMITS), asyncio.Event()
        place = app.state.worker.place

        def told_place(ticket):
            told.set()
            return place(ticket)

        monkeypatch.setattr(app.state.worker, "place", told_place)
        client = Client(app)
        first = asyncio.create_task(
            client("/api/draw", {"parts": [{"text": "a"}], "settings": {"seed": 1}})
        )
        await asyncio.to_thread(emu.started.wait)
        asked = {"parts": [{"text": "a"}], "settings": {"seed": 2}, "progress": True}
        second = asyncio.create_task(client("/api/draw", asked))
        await told.wait()
        emu.hold.set()
        return await asyncio.gather(first, second)

    (_, first, _), (_, second, _) = asyncio.run(run())
    assert [sorted(line) for line in lines(first)] == [["picture"], ["done"]]
    waiting = lines(second)[0]
    assert (waiting["waiting"], waiting["warming_up"]) == (1, False)
    assert [sorted(line) for line in lines(second)][-2:] == [["picture"], ["done"]]


def test_a_page_that_left_before_its_answer_is_not_answered(emu):
    emu.hold.clear()

    async def run():
        app, leave = make_app(emu, LIMITS), asyncio.Event()
        leave.set()
        asked = {"parts": [{"text": "a"}], "settings": {"seed": 1}, "progress": True}
        with contextlib.suppress(IndexError):  # there may be no answer at all
            await Client(app)("/api/draw", asked, leave=leave)
        async with asyncio.timeout(30):  # `LIMITS.seconds` are more
            while app.state.worker.running or app.state.worker.queued:
                await asyncio.sleep(0.01)

    asyncio.run(run())


SDXL_SIZES = {
    "part of a latent": ("1028x1024", "cannot be 1028x1024: give multiples of 8 pixels"),
    "too small": ("1024x248", "cannot be 1024x248: give multiples of 8 pixels from 256 to 65536"),
    "a line": ("99992x8", "cannot be 99992x8"),
    "too large": ("2048x1032", "at most 2097152 pixels in all"),
    "no side": ("0x1024", "size must be WIDTHxHEIGHT"),
    "no number": ("widexhigh", "size must be WIDTHxHEIGHT"),
    "a number": (1024, "size must be WIDTHxHEIGHT"),
}


def test_sizes_of_generated_images(emu):
    """A decoder like SDXL's generates other sizes than its own; each compiles programs."""
    emu.cfg = emu2_gen()
    app = make_app(emu, dataclasses.replace(LIMITS, image_sizes=3))

    def generate(size):
        return "/v1/images/generations", {"prompt": "seven", "size": size, "seed": 1}, {}

    wide = {"parts": [{"text": "a"}], "settings": {"seed": 2, "height": 768, "width": 1344}}
    asked = [generate("1344x768"), ("/api/draw", wide, {}), generate("auto"), generate("2048x1024")]
    statuses = [status for status, _, _ in requests(app, *asked)]
    assert statuses == [200] * 4
    shapes = [{n: v for n, v in s.items() if n in ("height", "width")} for s in emu.drawn]
    assert shapes == [{"height": 768, "width": 1344}] * 2 + [{}, {"height": 1024, "width": 2048}]
    refused = [(generate(size), line) for size, line in SDXL_SIZES.values()]
    refused.append((generate("512x512"), "use one of 1344x768, 1024x1024, 2048x1024"))
    more = {"parts": [{"text": "a"}], "settings": {"height": 1024, "width": 256}}
    refused += [((f"/api/{path}", more, {}), "no more sizes") for path in ("draw", "continue")]
    for asked, line in refused:
        ((status, answer, _),) = requests(app, asked)
        assert status == 400 and line in answer, answer
    ((_, about, _),) = requests(app, ("/api/model", None, {"method": "GET"}))
    assert json.loads(about)["size_step"] == 8 and json.loads(about)["defaults"]["width"] == 1024
    # A decoder without such conditions has one size.
    emu.cfg = FakeEmu.cfg
    app = make_app(emu, LIMITS)
    for status, answer, _ in requests(app, generate("1344x768"), ("/api/draw", wide, {})):
        assert status == 400 and "size must be 512x512, the size of the model's" in answer


def test_a_size_is_used_up_once_its_answer_starts(emu):
    """A request that waits, or that the model refuses, uses up none."""
    emu.cfg = emu2_gen()
    sizes = ImageSizes(emu.cfg, emu.defaults, dataclasses.replace(LIMITS, image_sizes=2))
    wide, high = {"height": 768, "width": 1344}, {"height": 1344, "width": 768}

    def refused():
        raise UserError("too long")
        yield

    waits = sizes.counted(iter("ab"), wide)  # was parsed before the last size was used up
    with pytest.raises(UserError):
        next(sizes.counted(refused(), wide))
    sizes.check(wide)
    assert [*sizes.counted(iter("ab"), high)] == ["a", "b"]
    for each in (lambda: sizes.check(wide), lambda: next(waits)):
        with pytest.raises(Refused, match="use one of 1024x1024, 768x1344"):
            each()
    sizes.check(high)


def test_the_page_learns_what_the_model_is(emu):
    app = make_app(emu, LIMITS, name="digits", examples={"chat": [{"parts": [{"text": "a"}]}]})
    ((_, body, _),) = requests(app, ("/api/model", None, {"method": "GET"}))
    about = json.loads(body)
    assert (about["name"], about["image_size"], about["needs_key"]) == ("digits", 512, False)
    assert about["defaults"]["temperature"] == 0  # greedy
    assert about["defaults"]["max_new_tokens"] == 9 and about["limits"]["max_new_tokens"] == 256
    assert about["examples"]["chat"]
    for body, message in (
        (b'{"parts": [{"text": "a"}], "progress": 1}', "progress must be"),
        (b'{"parts": [{"text": "a"}], "settings": {"max_images": 5}}', "max_images must be"),
    ):
        ((status, refused, _),) = requests(app, ("/api/continue", None, {"raw": body}))
        assert status == 400 and message in refused


def test_time_to_finish_after_sigterm(served):  # noqa: F811
    """A running answer has `drain_seconds`, and what waits is refused."""
    emu = Talker()
    emu.hold.clear()
    server = served(emu, **PATIENT | {"drain_seconds": 4.0})  # by default, 3
    outcome = []

    def post():
        outcome.append(server.post("/api/draw", {"parts": [{"text": "a"}]}))

    asked = threading.Thread(target=post)
    asked.start()
    emu.started.wait()
    started = time.monotonic()
    server.stop()
    asked.join()
    assert 3.9 < time.monotonic() - started < 30 and outcome[0][0] == 504
