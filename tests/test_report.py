"""The report page: whole, escaped, and in need of nothing outside itself."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from emu_jax.demo.report import write_demo_report
from emu_jax.train import report as run_report
from emu_jax.train.sheets import save_sheet

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def images(self):
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        prefix = "data:image/png;base64,"
        assert all(source.startswith(prefix) for source in sources)
        data = [base64.b64decode(source.removeprefix(prefix)) for source in sources]
        return [np.asarray(Image.open(io.BytesIO(d))) for d in data]


def image(rng, shape=(5, 7, 3)):
    return rng.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def contents():
    rng = np.random.default_rng(0)
    rows = [
        {
            "stage": "emu",
            "step": s,
            "time": 0.0,
            "loss": 3 / s,
            "text_loss": 2 / s,
            "regression_loss": 1 / s,
            "embedding_variance": 0.8,
            "embedding_rank": 6.5 + s,
            "grad_norm": 1.0,
            "bad_steps": 0.0,
        }
        for s in range(1, 90)
    ]
    return {
        "title": "Emu & digits",
        "figures": {"caption_accuracy": 0.9806, "seconds": 612.34, "report": "report.html"},
        "curves": {"emu": rows, "vae": [{"step": 1, "loss": float("nan")}]},
        "captions": [(image(rng), f"digit {i}", i % 9 > 0) for i in range(90)],
        "drawings": image(rng, (10, 10, 4, 6)),
        "autoencodings": [(image(rng), image(rng), n > 0) for n in range(3)],
        "continuations": [
            ([image(rng)] * 3, Image.fromarray(image(rng)), True, "one, two, three"),
            ([image(rng)] * 2, image(rng), False, "<b>four</b>"),
        ],
        "config": {"steps": 500, "note": "</pre><script>"},
        "versions": {"jax": "0.0"},
    }


def test_page_holds_everything(tmp_path, contents):
    path = tmp_path / "report.html"
    write_demo_report(path, **contents)
    page = Page(path.read_text())
    assert "Emu & digits" in page.text
    assert "98.1%" in page.text and "0.9806" in page.text and "612.3" in page.text
    assert "80 of 90 are right" in page.text
    assert "<b>four</b>" in page.text  # as text
    assert "</pre><script>" in page.text
    assert '"jax": "0.0"' in page.text
    # Mistakes first, then the rest in order; the grid row by row; the strips.
    wrong_first = sorted(contents["captions"], key=lambda c: c[2])
    expected = [p for p, _, _ in wrong_first]
    expected += list(contents["drawings"].reshape(100, 4, 6))
    for original, painted, _ in contents["autoencodings"]:
        expected += [original, painted]
    for frames, drawn, _, _ in contents["continuations"]:
        expected += [*frames, np.asarray(drawn)]
    images = page.images()
    assert len(images) == len(expected)
    for ours, theirs in zip(images, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    classes = [v for _, name, v in page.attributes if name == "class"]
    assert classes.count("card right") == 80 and classes.count("card wrong") == 10
    assert classes.count("card pair right") == 2 and classes.count("card pair wrong") == 1
    assert classes.count("strip right") == 1 and classes.count("strip wrong") == 1
    # Three losses, variance and rank of `emu`; nothing to draw for `vae`.
    assert page.tags.count("svg") == 5
    for name in ("text loss", "regression loss", "embedding variance", "embedding rank"):
        assert name in page.text
    assert "grad norm" not in page.text and "bad steps" not in page.text
    assert "7.5 → 95.5" in page.text


def test_page_fetches_nothing(tmp_path, contents):
    path = tmp_path / "report.html"
    write_demo_report(path, **contents)
    text = path.read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("data:", "#")), (tag, name, value[:80])
        elif not name.startswith("xmlns"):
            assert "//" not in (value or ""), (tag, name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "@import" not in style and "//" not in style


def test_empty_parts_are_left_out(tmp_path):
    path = tmp_path / "report.html"
    write_demo_report(path, title="t", figures={"seconds": 1}, curves={})
    page = Page(path.read_text())
    assert page.tags.count("h2") == 1
    assert "svg" not in page.tags and "img" not in page.tags and "details" not in page.tags
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_images_must_be_bytes(tmp_path):
    with pytest.raises(TypeError, match="uint8"):
        write_demo_report(
            tmp_path / "report.html",
            title="t",
            figures={},
            curves={},
            captions=[(np.zeros((2, 2, 3)), "x", True)],
        )
    assert not list(tmp_path.iterdir())


def test_held_out_values_stand_beside_those_of_training(tmp_path):
    """In the axes of the metric of that name, over all sources; the rest has axes of its own."""
    rows = [{"stage": "s", "step": n, "time": 0.0, "loss": 1 / n} for n in range(1, 200)]
    evaluated = [
        {
            "stage": "s",
            "evaluation": "heldout",
            "step": n,
            "time": 0.0,
            "seconds": 1.0,
            "loss": 77 / n,
            "ema/loss": 88 / n,
            "pairs/loss": 99 / n,
            "ema/pairs/loss": 55.5,
            "perplexity": 3.0,
            "CIDEr": 7.5,
            "text_targets": 4.0,
        }
        for n in (100, 200)
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    lines = [json.dumps(row) for row in evaluated]
    (tmp_path / "evaluations.jsonl").write_text("\n".join([*lines, ""]))
    (tmp_path / "train.json").write_text('{"steps": 200}')
    for step in (3, *range(100, 1000, 100)):
        save_sheet(tmp_path, "captions", step, Image.new("RGB", (step, 2)))
    run_report.write_report(tmp_path, "<s>")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 3  # loss, perplexity and CIDEr
    for ends in ("training 1 → 0.00503", "heldout 0.77 → 0.385", "heldout (averaged weights) 0.88"):
        assert ends in page.text
    assert "pairs" in page.text and "55.5" in page.text and "step 200" in page.text
    assert text.count("var(--held-out)") > 4
    # The newest sheet, then some of the earlier ones, the newest first.
    assert [p.shape[1] for p in page.images()] == [900, 800, 600, 400, 200, 3]
    assert '"steps": 200' in page.text and "<s>" in page.text

    (tmp_path / "evaluations.jsonl").write_text("damaged\n\n")
    run_report.refresh_report(tmp_path, "s")
    assert (tmp_path / "report.html").read_text() == text


def test_a_long_curve_is_thinned_out():
    rows = [{"step": n, "loss": 1.0 + n % 7} for n in range(1, 20_001)]
    assert len(run_report.training_curves({"s": rows}, {})) < 150_000
