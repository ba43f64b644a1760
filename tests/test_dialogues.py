"""Dialogues of every layout: each message and image stands in its place, or is counted."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from test_sources import TINY, make_image, shade, sketched, source, video

from emu_jax.data import Batches, DataConfig, Document, Image, Text
from emu_jax.data.documents import Damaged, write_documents
from emu_jax.data.sources import SourceConfig, entries
from emu_jax.data.sources.video import frame_indices
from emu_jax.errors import UserError

USER, ASSISTANT = "[USER]:", "[ASSISTANT]:"


def says(who: object, value: object) -> dict:
    return {"from": who, "value": value}


def role(who: str, content: object) -> dict:
    return {"role": who, "content": content}


def talk(*values: object, **more: object) -> dict:
    """Turns of a human and an assistant in turn."""
    whos = ("human", "gpt")
    return {"conversations": [says(whos[n % 2], v) for n, v in enumerate(values)]} | more


@pytest.fixture
def read(tmp_path):
    """Reads one entry: (what is read, what is learned), without the turns' own words."""
    for name, n in (("a.png", 40), ("b.png", 80)):
        (tmp_path / name).write_bytes(make_image(n, "PNG"))
    (tmp_path / "v.mp4").write_bytes(video(20))

    def document(entry: dict) -> Document:
        (tmp_path / "d.json").write_text(json.dumps([entry]))
        dialogues = source("dialogues", tmp_path / "d.json", frames=2)
        read, sketch = dialogues[0], dialogues.sketch(0)
        assert sketched(read) == sketched(sketch) and read.unused == sketch.unused
        return read

    return document


def parts(document: Document) -> list[str | int | tuple]:
    """Texts and shades; in a tuple what is learned. The system message is left out."""
    found = []
    for part in document.parts:
        value = part.text if isinstance(part, Text) else shade(part.data)
        if isinstance(part, Text) and part.special and part.text.endswith(USER):
            value = USER
        found.append((value,) if part.scored else value)
    return found


def one(*asked: str | int, answer: tuple = ("yes",)) -> list:
    return [USER, *asked, ASSISTANT, *((part,) for part in answer)]


@pytest.mark.parametrize(
    ("entry", "want"),
    [
        # An image in an answer stands there and is learned.
        (talk("draw", "<image>", image="a.png"), one("draw", answer=(40,))),
        (
            talk("<image> now red", "Here: <image> enjoy", image=["a.png", "b.png"]),
            one(40, "now red", answer=("Here:", 80, "enjoy")),
        ),
        ({"image": "a.png", "instruction": "draw", "output": "<image>"}, one("draw", answer=(40,))),
        # Without media a tag is a word; with an image <video> is one.
        (
            talk("Why does <video> not play, <image> does?", "yes"),
            one("Why does <video> not play, <image> does?"),
        ),
        (talk("<image> of a <video> tag", "yes", image="a.png"), one(40, "of a <video> tag")),
        (talk("see", "use <image>"), one("see", answer=("use <image>",))),
        # `images`, with tags and without.
        (talk("<image> or <image>?", "yes", images=["a.png", "b.png"]), one(40, "or", 80, "?")),
        (talk("which?", "yes", images=["a.png", "b.png"]), one(40, 80, "which?")),
        (talk("which?", "yes", images=[], image=""), one("which?")),
        # A video where either tag stands, beside an image, or before the question.
        (talk("look: <video>", "yes", video="v.mp4"), one("look:", 40, 140)),
        (talk("<image>\nlook", "yes", video="v.mp4"), one(40, 140, "look")),
        (
            talk("<video> has <image>?", "yes", videos=["v.mp4"], images="b.png"),
            one(40, 140, "has", 80, "?"),
        ),
        # OpenAI's layout.
        (
            {
                "messages": [
                    role("system", "Be brief."),
                    role(
                        "user",
                        [
                            {"type": "image_url", "image_url": {"url": "a.png"}},
                            {"type": "text", "text": "what?"},
                            {"type": "image"},
                        ],
                    ),
                    role("assistant", [{"type": "text", "text": "yes"}]),
                ],
                "images": ["b.png"],
            },
            ["Be brief.", *one(40, "what?", 80)],
        ),
        (
            {
                "messages": [
                    role(
                        "user",
                        [
                            {
                                "type": "image_url",
                                "image_url": {
                                    "url": "data:image/png;base64,"
                                    + base64.b64encode(make_image(120, "PNG")).decode()
                                },
                            }
                        ],
                    ),
                    role("assistant", "yes"),
                ]
            },
            one(120),
        ),
        # Joined: messages in a row, lists of texts, nested lists, a number; also a history.
        (
            {
                "conversations": [
                    says("Human", "one"),
                    says("USER", "and"),
                    says("gpt", "yes"),
                    says("bing", "no"),
                ]
            },
            one("one\nand", answer=("yes\nno",)),
        ),
        (
            {"conversations": [[says("human", ["a", "b"])], [says("gpt", 5)]]},
            one("ab", answer=("5",)),
        ),
        (
            {"instruction": "x", "history": [["h", "i"]], "output": "yes", "system": "S"},
            ["S", *one("h", answer=("i",)), ("</s>",), *one("x")],
        ),
    ],
)
def test_media_stand_where_the_entry_says(read, entry, want):
    document = read(entry)
    assert parts(document) == want and not document.unused
    said = {p.text for p in document.parts if isinstance(p, Text) and p.special}
    assert not any("\n" in text for text in said)  # nothing of the entry's


def test_a_source_has_a_system_message_of_its_own(read, tmp_path):
    read(talk("<image>", "yes", image="a.png"))
    for entry, want in [
        (talk("<image>", "yes", image="a.png"), "Be kind. [USER]:"),
        (talk("so?", "yes"), "Be kind. [USER]:"),
        ({"instruction": "x", "output": "yes", "system": "S"}, "[USER]:"),
    ]:
        (tmp_path / "d.json").write_text(json.dumps([entry]))
        document = source("dialogues", tmp_path / "d.json", frames=2, system="Be kind.")[0]
        texts = [p.text for p in document.parts if isinstance(p, Text)]
        assert want in texts, texts


def test_the_system_message_speaks_of_what_is_shown(read):
    messages = [
        read(entry).parts[0].text.partition(".")[0]
        for entry in (
            talk("draw", "<image>", image="a.png"),
            talk("what?", "y", image="a.png"),
            talk("what?", "y", video="v.mp4"),
            talk("what?", "y"),
        )
    ]
    assert messages[0] == messages[3] == USER
    assert "presented with an image:" in messages[1] and "a video" in messages[2]


def test_every_message_that_is_not_used_is_counted(read):
    document = read(
        {
            "conversations": [
                says("gpt", "hello"),
                says("system", "S"),
                says("human", None),
                says("human", "one"),
                says("gpt", " "),
                says("human", "two"),
                says("gpt", "yes"),
                says("system", "late"),
                says("human", "<image> three"),
                says("gpt", ""),
                says("human", "four"),
            ],
            "image": "a.png",
            "tools": ["t"],
        }
    )
    assert parts(document) == ["S", *one("two")]
    assert document.unused == (
        ("tools", ""),
        ("answer without a question", "hello"),
        ("empty message", "user"),
        ("empty message", "assistant"),
        ("question without an answer", "one"),
        ("system message after the first turn", "late"),
        ("empty message", "assistant"),
        ("question without an answer", " three"),
        ("image of an unused message", "a.png"),
        ("question without an answer", "four"),
    )


@pytest.mark.parametrize(
    "entry",
    [
        talk(),
        talk("x"),
        talk("x", None),
        talk("x", {"a": 1}),
        talk("x", True),
        {"conversations": [says("alien", "x"), *talk("x", "y")["conversations"]]},
        {"conversations": [says(None, "x")]},
        {"conversations": ["x"]},
        {"conversations": None},
        {"messages": [{"role": "user"}]},
        {"q": "x"},
        {"instruction": 5, "output": "x"},
        talk("<image>", "x", images=["a.png", "b.png"]),
        talk("<image><image>", "x", image="a.png"),
        talk("x", "x", image={"path": "a.png"}),
        talk("x", "x", image=[["a.png"]]),
        {"messages": [role("user", [{"type": "image"}]), role("assistant", "x")]},
        {"messages": [role("user", [{"type": "sound"}]), role("assistant", "x")]},
        talk("x", "y", video="v.mp4", start=2, end=1),
        talk("x", "y", video="v.mp4", start="soon"),
        talk("x", "y", videos=["v.mp4", "v.mp4"], start=1),
        talk("x", "y", video="v.mp4", end=-1),
        talk("x", "y", video="v.mp4", end=float("nan")),
        talk("x", "y", video="v.mp4", end=10**400),
    ],
)
def test_malformed_entries(read, entry):
    with pytest.raises(Damaged) as error:
        read(entry)
    assert error.value.reason == "malformed entry" and "\n" not in str(error.value)


def test_messages_nested_too_deeply(tmp_path, monkeypatch):
    """A JSON reader may allow more levels than Python."""
    (tmp_path / "d.json").write_text("[{}]")
    value: object = "x"
    for _ in range(5000):
        value = [value]
    monkeypatch.setattr(entries.Entries, "__getitem__", lambda *_: talk(value, "y"))
    with pytest.raises(Damaged, match="entry 0: malformed entry .maximum recursion depth"):
        source("dialogues", tmp_path / "d.json").sketch(0)


def test_a_malformed_entry_says_what_is_wrong(read):
    for entry, why in (
        ({"q": "x"}, "no 'a'"),
        (talk("x"), "no question with an answer"),
        (talk("<image><image>", "x", image="a.png"), "2 places for 1 images"),
        ({"messages": [role("tool", "x")]}, "unknown speaker 'tool'"),
    ):
        with pytest.raises(Damaged, match=f"entry 0: malformed entry \\({why}\\)$"):
            read(entry)


def test_videos_by_id_and_clips_of_them(read):
    def times(entry: dict) -> list[float]:
        return [p.time or 0.0 for p in read(entry).parts if isinstance(p, Image)]

    asked = {"q": "what?", "a": "yes", "video_id": "v"}
    assert parts(read(asked)) == one(40, 140, "what?")
    clip = {"start": 0.5, "end": 1.1}
    quiz = {"video": "v.mp4", "QA": [{"i": "", "q": "what?", "a": "yes"}], **clip}
    want = (5 + frame_indices(6, 2)) / 10
    assert 0.5 <= want.min() and want.max() < 1.1
    for entry in (quiz, asked | clip, asked | {"start": "0.5", "end": 1.1}):
        np.testing.assert_allclose(times(entry), want, atol=1e-3)
    assert max(times(asked | {"end": 0.4})) < 0.4 and min(times(asked | {"start": 1.5})) >= 1.5
    assert max(times({**quiz, "start": None})) > 0.5
    with pytest.raises(Damaged, match="missing file.*w$|missing file.*w[)]"):
        read(asked | {"video_id": "w"})
    with pytest.raises(Damaged, match="video without frames"):
        read(asked | {"start": 7, "end": 8})
    image = {"image": "a.png", "q": "x", "a": "y", "start": "intro"}  # of no video
    assert parts(read(image)) == one(40, "x", answer=("y",))


def test_dialogues_need_their_tokens(tmp_path):
    """In a listing, or in records that were built from one; in training and in packing."""
    (tmp_path / "d.json").write_text(json.dumps([talk("hi", "hello")] * 4))
    spoken = source("dialogues", tmp_path / "d.json")[0]
    write_documents(tmp_path / "d.array_record", [spoken] * 4)

    def first(form: str, path: Path, instruct: bool) -> list[str]:
        cfg = DataConfig(
            sources=(SourceConfig("d", form, (str(path),)),),
            tokenizer=str(TINY / "tokenizer"),
            batch_size=1,
            row_tokens=64,
            prefetch=0,
            image_size=32,
            instruct=instruct,
            block_documents=2,
        )
        tokenizer = cfg.load_tokenizer()
        with Batches(cfg, tokenizer, "rows") as batches:
            return [tokenizer.piece(int(n)) for n in next(batches)["tokens"][0][:3]]

    for form, name in (("dialogues", "d.json"), ("records", "d.array_record")):
        with pytest.raises(UserError, match="set data.instruct=True"):
            first(form, tmp_path / name, instruct=False)
        assert first(form, tmp_path / name, instruct=True)[1] == "[USER]"
