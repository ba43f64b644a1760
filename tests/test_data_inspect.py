"""`emu-jax data inspect`: the page shows the batches as they are, and its figures are theirs."""

import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from emu_jax import cli
from emu_jax.data import Batches, DataConfig, Document, Image, Text
from emu_jax.data.digits import encode_png
from emu_jax.data.documents import DocumentFiles, write_documents
from emu_jax.data.inspect import inspect
from emu_jax.data.sources import SourceConfig
from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer

ATTACK = "<script>alert('x')</script> & so on"


@pytest.fixture(scope="module")
def root(tmp_path_factory, copy_digits) -> Path:
    return copy_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def cfg(root) -> DataConfig:
    return DataConfig(
        root=str(root),
        split="validation",
        mixture={"pairs": 2.0, "pages": 1.0, "storyboards": 1.0},
        batch_size=6,
        row_tokens=64,
        row_images=8,
        n_causal=4,
        image_size=16,
        target_size=24,
        seed=3,
        block_documents=64,
    )


def shown(page: str) -> dict[str, int]:
    """Returns the marked elements of a page."""
    return {
        "targets": len(re.findall(r'<i class="(?:s )?t" title', page)),
        "others": len(re.findall(r'<i class="s?" title', page)),
        "framed": page.count('<figure class="framed"><img'),
        "images": len(re.findall(r"<figure[^>]*><img", page)),
        "documents": page.count('<div class="document"'),
        "rows": page.count("<article>"),
    }


def test_rows_are_shown_as_they_are(tmp_path, cfg):
    tokenizer = cfg.load_tokenizer()
    path = tmp_path / "page.html"
    figures = inspect(path, cfg, tokenizer, "rows", rows=5, documents=50)
    page = path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]

    alone = dataclasses.replace(cfg, batch_size=5)
    with Batches(alone, tokenizer, "rows") as batches:
        batch, documents = next(batches), batches.documents()
    words = (batch["segment_ids"] > 0) & (batch["embedding_index"] < 0)
    assert shown(page) == {
        "targets": batch["text_loss_mask"].sum(),
        "others": (words & ~batch["text_loss_mask"]).sum(),
        "framed": batch["image_scored"].sum(),
        "images": batch["image_valid"].sum(),
        "documents": len(documents),
        "rows": 5,
    }
    titles = re.findall(r"<h4>(\w+ \d+)</h4>", page)
    assert titles == [f"{name} {index}" for name, index in documents]
    # Every token in its place, under its own name.
    tokens = re.findall(r'<i class="[st ]*" title="(\d+): (\d+)"', page)
    assert tokens == [(str(n), str(batch["tokens"][row, n])) for row, n in np.argwhere(words)]

    with Batches(cfg, tokenizer, "rows") as batches:
        while batches.statistics()["documents"] < 8 * 64:
            next(batches)
        for name, value in batches.statistics().items():
            assert getattr(figures, name) == value
    assert figures.images_per_second_per_core > 0


@pytest.mark.parametrize("kind", ["captions", "images", "contexts"])
def test_the_other_kinds(tmp_path, cfg, kind):
    tokenizer, path = cfg.load_tokenizer(), tmp_path / "page.html"
    figures = inspect(path, cfg, tokenizer, kind, rows=3, documents=5)
    assert figures.kind == kind and figures.image_fill > 0
    with Batches(dataclasses.replace(cfg, batch_size=3), tokenizer, kind) as batches:
        batch = next(batches)
    counts = shown(path.read_text())
    assert (counts["rows"], counts["documents"]) == (3, 3)
    if kind == "contexts":
        assert counts["images"] == 3 + batch["image_valid"].sum()
        assert (counts["framed"], counts["targets"]) == (3, 0)
    else:
        assert (counts["images"], counts["framed"]) == (3, 0)
        words = batch["valid"].sum() if kind == "captions" else 0
        assert counts["targets"] + counts["others"] == words


def test_the_page_stands_alone_and_text_is_escaped(tmp_path):
    image = Image(encode_png(np.full((70, 70), 9, np.uint8)))
    write_documents(
        tmp_path / "train" / "pairs.array_record", [Document((image, Text(ATTACK)))] * 3
    )
    Tokenizer.train([ATTACK], 300).save(tmp_path / "tokenizer")
    cfg = DataConfig(
        root=str(tmp_path),
        mixture={"pairs": 1.0},
        row_tokens=80,
        row_images=2,
        n_causal=4,
        image_size=70,
        block_documents=4,
    )
    inspect(tmp_path / "page.html", cfg, cfg.load_tokenizer(), "rows", rows=1, documents=1)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in page
    assert all(src.startswith("data:image/") for src in re.findall(r'src="([^"]*)', page))
    assert "data:image/jpeg" in page  # a large image
    spans = re.findall(r'<i class="(?:s )?t?" title="[^"]*">([^<]*)</i>', page)
    assert ATTACK in html.unescape("".join(spans))
    for word in ("prefers-color-scheme: dark", "color-scheme: light dark"):
        assert word in page


def test_damage_is_shown_where_it_lies(tmp_path):
    good = encode_png(np.full((9, 9), 9, np.uint8))
    pairs = [Document((Image(good[: -n or None]), Text("word"))) for n in (0, 20) * 20]
    pairs[0] = Document((Image(good), Text("word"), Text(" ")))
    path = tmp_path / "pairs.array_record"
    write_documents(path, pairs)
    Tokenizer.train(["word"], 300).save(tmp_path / "tokenizer")
    cfg = DataConfig(
        root=str(tmp_path),
        sources=(SourceConfig("some", paths=(str(path),), batch_size=4),),
        row_tokens=80,
        row_images=4,
        n_causal=4,
        image_size=9,
        block_documents=20,
    )
    out = tmp_path / "page.html"
    figures = inspect(out, cfg, cfg.load_tokenizer(), "rows", rows=3, documents=40)
    page = out.read_text()
    used = {"documents": 40, "images": 40, "texts": 40}
    counted = {"used": used, "unused": {"empty text": 1}}
    assert figures.to_json()["sources"] == {
        "some": counted | {"examples": {"empty text": [f"{path} record 0"]}}
    }
    assert (
        "<h2>Sources</h2><h3>some</h3><p>40 documents, 40 texts, 40 images; unused: 1 empty text"
        f"</p><ul><li>empty text: {path} record 0</li></ul>" in page
    )
    damaged = figures.damaged["unreadable image"]
    assert 0.3 * figures.read < damaged < 0.7 * figures.read
    assert f"<p>{damaged} of {figures.read} documents could not be read.</p>" in page
    assert f"<li>{path} record 1: unreadable image</li>" in page
    rows = page.partition("<h2>Lengths")[0]
    padding = rows.count("damaged: left as padding")
    assert 0 < padding < rows.count('<div class="document"') == padding + rows.count("<figure")


@pytest.mark.parametrize("kind", ["rows", "captions", "contexts"])
def test_few_images_are_opened_whatever_the_batch_size(tmp_path, cfg, kind, monkeypatch):
    """The fill of rows follows from token lengths alone, and is that of the batches."""
    opened = []
    read = DocumentFiles.read
    monkeypatch.setattr(
        DocumentFiles,
        "read",
        lambda self, *args, **more: opened.append(1) or read(self, *args, **more),
    )
    tokenizer, path = cfg.load_tokenizer(), tmp_path / "page.html"
    fills, counts = [], []
    for size in (1, 2, 6):
        few = dataclasses.replace(cfg, batch_size=size, prefetch=0)
        opened.clear()
        figures = inspect(path, few, tokenizer, kind, rows=1, documents=9)
        counts.append(len(opened))
        fills.append((figures.token_fill, figures.image_fill))
    assert max(counts) < 40  # of 512 documents that are packed
    with Batches(few, tokenizer, kind) as batches:
        while batches.statistics()["documents"] < 8 * cfg.block_documents:
            next(batches)
        statistics = batches.statistics()
        assert fills[-1] == (statistics["token_fill"], statistics["image_fill"])


def test_nothing_to_see(tmp_path, cfg):
    for rows, documents in ((0, 5), (5, 0)):
        with pytest.raises(UserError, match="at least one row"):
            inspect(
                tmp_path / "x.html",
                cfg,
                cfg.load_tokenizer(),
                "rows",
                rows=rows,
                documents=documents,
            )


CONFIG = """
from emu_jax.config import digits
from emu_jax.train.config import TrainConfig, config_dict, digits_data

def get_config():
    return config_dict(TrainConfig(model=digits(), data=digits_data(root={root!r})))
"""


def test_command(tmp_path, root, capsys):
    config = tmp_path / "small.py"
    config.write_text(CONFIG.format(root=str(root)))
    out = tmp_path / "page.html"
    command = ["data", "inspect", "--config", str(config), "--out", str(out), "--documents", "20"]
    assert cli.main([*command, "--config.data.row_tokens=48", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["page"] == str(out) and 0.5 < figures["token_fill"] <= 1
    assert "of 48 tokens" in out.read_text()
    assert cli.main(command) == 0
    assert "token fill: 0." in capsys.readouterr().out


def test_packing_of_a_mixture_like_the_papers(tmp_path):
    """Captions, pages, videos and storyboards, in the proportions of the paper's batches."""
    rng = np.random.default_rng(0)
    image = Image(encode_png(np.zeros((2, 2), np.uint8)))

    def words(count: float) -> Text:
        return Text(" ".join(["word"] * max(1, int(count))))  # a token each

    def pair() -> Document:
        return Document((image, words(min(77, rng.lognormal(2.6, 0.6)))))

    def page() -> Document:
        count = rng.integers(1, 6)
        lengths = rng.lognormal(6.3, 0.6) * rng.dirichlet(np.ones(count + 1))
        images = [part for length in lengths[1:] for part in (image, words(length))]
        return Document((words(lengths[0]), *images))

    def video() -> Document:
        return Document((*[image] * 8, words(rng.integers(6, 40))))

    def storyboard() -> Document:
        return Document(tuple(p for _ in range(8) for p in (image, words(rng.integers(5, 40)))))

    kinds = {
        "captions": (pair, 256.0),
        "pages": (page, 64.0),
        "videos": (video, 16.0),
        "storyboards": (storyboard, 16.0),
    }
    sources = []
    for name, (make, weight) in kinds.items():
        path = tmp_path / f"{name}.array_record"
        write_documents(path, [make() for _ in range(400)])
        sources.append(
            SourceConfig(
                name,
                paths=(str(path),),
                weight=weight,
                paired=name == "captions",
                window_tokens=1024 if name == "pages" else 0,
            )
        )
    Tokenizer.train(["word word"], 300).save(tmp_path / "tokenizer")
    cfg = DataConfig(root=str(tmp_path), sources=tuple(sources), row_images=23, image_size=2)
    out = tmp_path / "page.html"
    figures = inspect(out, cfg, cfg.load_tokenizer(), "rows", rows=1, documents=1)
    assert figures.token_fill >= 0.95
    assert figures.image_fill >= 0.85
    assert f"<b>{100 * figures.token_fill:.1f}%</b>" in out.read_text()
