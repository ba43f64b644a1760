"""Ten thousand documents of several formats, three in a hundred of them damaged in every way."""

import base64
import collections
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from test_sources import lines, make_image, tar, video

from emu_jax.config import TokenIds, digits
from emu_jax.data import Batches, DataConfig, Document, Image, Text
from emu_jax.data.batches import RowBuilder
from emu_jax.data.mixture import open_groups
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer
from emu_jax.train.config import GroupConfig, OptimizerConfig, TrainConfig
from emu_jax.train.loop import train
from emu_jax.train.telemetry.metrics import read_metrics

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES = {"tars": 6000, "pages": 2000, "records": 1500, "videos": 500}
FORMATS = {"tars": "webdataset", "pages": "pages", "records": "records", "videos": "videos"}


def blank(width: int, height: int) -> bytes:
    """A image of which a few kilobytes make so many pixels."""
    file = io.BytesIO()
    PIL.Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


CUT = make_image(40)[:-200]
BOMB, STRIP = blank(30_000, 30_000), blank(1_000_000, 1)


def damage(rng: np.random.Generator, count: int, ways: list[str]) -> dict[int, str]:
    """Three in a hundred of `count` documents, each way in turn."""
    chosen = rng.choice(count, round(0.03 * count), replace=False).tolist()
    return {n: ways[k % len(ways)] for k, n in enumerate(chosen)}


def words(n: int) -> str:
    return " ".join(WORDS[int(digit)] for digit in str(n))


def make_tars(folder: Path, rng: np.random.Generator) -> dict[str, str]:
    """{where: reason} of what is damaged, as of the others."""
    ways = [
        "unreadable image",
        "no image",
        "corrupt tar member",
        "incomplete sample",
        "invalid UTF-8",
        "image too large",
        "image too narrow",
        "malformed JSON",
    ]
    damaged, per_tar = damage(rng, SIZES["tars"], ways), 2000
    found = {}
    for first in range(0, SIZES["tars"], per_tar):
        files = {}
        for n in range(first, first + per_tar):
            way = damaged.get(n)
            form, suffix = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")][n % 3]
            content = {
                "unreadable image": CUT,
                "no image": b"<html>404</html>",
                "image too large": BOMB,
                "image too narrow": STRIP,
            }.get(way or "", None) or make_image(10 * (n % 25), form)
            if way != "incomplete sample":
                files[f"{n:05}.{suffix}"] = content
            if way == "malformed JSON":
                files[f"{n:05}.json"] = b'{"caption": "cut'
            elif way == "invalid UTF-8":
                files[f"{n:05}.txt"] = b"caf\xe9"
            else:
                files[f"{n:05}.txt"] = words(n).encode()
        path = tar(folder / f"{first}.tar", files)
        content = bytearray(path.read_bytes())
        for n in range(first, first + per_tar):
            if damaged.get(n) == "corrupt tar member":
                header = content.index(f"{n:05}.txt".encode())
                content[header : header + 512] = rng.bytes(512)
            if n in damaged:
                reason = damaged[n].replace("no image", "unreadable image")
                found[f"{path} sample {n - first}"] = reason
        path.write_bytes(content)
    return found


def make_pages(folder: Path, rng: np.random.Generator) -> dict[str, str]:
    ways = ["unreadable image", "malformed JSON", "invalid UTF-8", "malformed entry"]
    damaged = damage(rng, SIZES["pages"], ways)
    path, entries = folder / "pages.jsonl", []
    for n in range(SIZES["pages"]):
        way = damaged.get(n)
        content = CUT if way == "unreadable image" else make_image(10 * (n % 25))
        entry = {
            "text_list": [words(n), words(n + 1)],
            "image_info": [
                {
                    "image_name": "x",
                    "matched_text_index": 9 if way == "malformed entry" else 1,
                    "matched_sim": 0.5,
                    "image_base64": base64.b64encode(content).decode(),
                }
            ],
        }
        line = json.dumps(entry).encode()
        if way == "malformed JSON":
            line = line[:-30]
        entries.append(line.replace(b'"', b"\xff", 1) if way == "invalid UTF-8" else line)
    path.write_bytes(b"\n".join(entries))
    return {f"{path} entry {n}": reason for n, reason in damaged.items()}


def make_records(folder: Path, rng: np.random.Generator) -> dict[str, str]:
    ways = ["unreadable image", "not a document", "image too large"]
    damaged = damage(rng, SIZES["records"], ways)
    path = folder / "records.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for n in range(SIZES["records"]):
        way = damaged.get(n)
        content = {"unreadable image": CUT, "image too large": BOMB}.get(way or "")
        document = Document((Image(content or make_image(10 * (n % 25))), Text(words(n))))
        writer.write(b"garbage" if way == "not a document" else document.to_bytes())
    writer.close()
    return {f"{path} record {n}": reason for n, reason in damaged.items()}


def make_videos(folder: Path, rng: np.random.Generator) -> dict[str, str]:
    ways = ["unreadable video", "video without frames", "missing file"]
    damaged = damage(rng, SIZES["videos"], ways)
    for name, content in (
        ("good.mp4", video(12)),
        ("good.webm", video(12, "webm")),
        ("empty.webm", video(0, "webm")),
        ("cut.mp4", video(12)[:700]),
    ):
        (folder / name).write_bytes(content)
    names = {
        "unreadable video": "cut.mp4",
        "video without frames": "empty.webm",
        "missing file": "absent.mp4",
    }
    path = lines(
        folder / "videos.jsonl",
        [
            {
                "video": names.get(damaged.get(n, ""), ["good.mp4", "good.webm"][n % 2]),
                "text": words(n),
            }
            for n in range(SIZES["videos"])
        ],
    )
    return {f"{path} entry {n}": reason for n, reason in damaged.items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(folder, {where: reason} of the damaged)."""
    root, damaged = tmp_path_factory.mktemp("corpus"), {}
    rng = np.random.default_rng(0)
    makers = {
        "tars": make_tars,
        "pages": make_pages,
        "records": make_records,
        "videos": make_videos,
    }
    for name, make in makers.items():
        (root / name).mkdir()
        damaged |= make(root / name, rng)
    assert len(damaged) == 300
    return root, damaged


@pytest.fixture(scope="module")
def cfg(corpus) -> TrainConfig:
    root, _ = corpus
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, 400)
    tokenizer.save(root / "tokenizer")
    # SampledDocument in proportion to their sizes, all sources end their first epoch together.
    sources = tuple(
        SourceConfig(name, FORMATS[name], _paths(root / name), weight=float(count), frames=4)
        for name, count in SIZES.items()
    )
    data = DataConfig(
        root=str(root),
        sources=sources,
        batch_size=16,
        row_tokens=512,
        row_images=40,
        n_causal=2,
        image_size=16,
        block_documents=500,
        decode_threads=2,
    )
    model = digits(tokenizer.base_size)
    model = dataclasses.replace(
        model,
        unet=None,
        vae=None,
        vision=dataclasses.replace(model.vision, image_size=16, layers=1, width=24, mlp_width=48),
        cformer=dataclasses.replace(
            model.cformer, n_causal=2, layers=1, width=24, mlp_width=48, heads=1
        ),
        llama=dataclasses.replace(
            model.llama,
            layers=1,
            width=32,
            heads=2,
            mlp_width=48,
            vocab_size=len(tokenizer),
            max_positions=512,
        ),
        tokens=TokenIds(
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.pad_id,
            tokenizer.img,
            tokenizer.img_end,
            tokenizer.image,
        ),
    )
    return TrainConfig(
        model=model,
        data=data,
        dtype="float32",
        log_every=10,
        checkpoint_every=1000,
        optimizer=OptimizerConfig(groups=(GroupConfig(".*", lr=1e-3),)),
    )


def _paths(folder: Path) -> tuple[str, ...]:
    suffixes = (".tar", ".jsonl", ".array_record")
    return tuple(sorted(str(p) for p in folder.iterdir() if p.suffix in suffixes))


@pytest.mark.slow
def test_training_passes_over_every_damaged_document(corpus, cfg, tmp_path):
    _, damaged = corpus
    tokenizer = cfg.data.load_tokenizer()
    (group,) = open_groups(cfg.data, tokenizer, RowBuilder.requires)
    blocks = sum(SIZES.values()) // cfg.data.block_documents + 1  # an epoch and a little more
    rows = sum(len(group.block(n).rows) for n in range(blocks))
    steps = -(-rows // cfg.data.batch_size)
    result = train(dataclasses.replace(cfg, steps=steps), tmp_path)
    assert result.step == steps and np.isfinite(result.metrics["loss"])

    passed: list[tuple] = []
    for line in (tmp_path / "damaged-0.jsonl").read_text().splitlines():
        passed += map(tuple, json.loads(line)["documents"])
    first = {}
    for _, _, reason, where in passed:
        assert first.setdefault(where, reason) == reason
    assert first == damaged
    counts = collections.Counter(reason for _, _, reason, _ in passed)
    assert set(counts) == set(damaged.values()) and len(counts) == 12
    (rows,) = read_metrics(tmp_path).values()
    assert rows[-1]["damaged"] == counts.total() and 300 <= counts.total() < 330


@pytest.mark.slow
def test_a_lower_rate_stops_training(cfg):
    data = dataclasses.replace(cfg.data, max_damaged_rate=0.01)
    with Batches(data, cfg.data.load_tokenizer(), "rows") as batches:
        with pytest.raises(UserError, match="documents cannot be read .*repair the data, or raise"):
            for _ in range(100):
                next(batches)
        assert 1000 <= batches.statistics()["documents"] < 2500
