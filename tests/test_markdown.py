"""Markdown that programs write."""

import pytest

from emu_jax import markdown


def test_table():
    assert markdown.table(("a", "b"), [("1", "x|y")]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"


def test_only_the_lines_between_the_comments_are_replaced():
    page = (
        "After `<!-- bench b -->` and <!-- bench a -->\n"
        "<!-- bench a -->\nold\n\nold\n<!-- /bench -->\n"
        "<!-- bench ab -->\nkept\n<!-- /bench -->\n"
    )
    for _ in range(2):
        page = markdown.replace_region(page, "bench a", "new \\1\n")
        assert page == (
            "After `<!-- bench b -->` and <!-- bench a -->\n"
            "<!-- bench a -->\nnew \\1\n<!-- /bench -->\n"
            "<!-- bench ab -->\nkept\n<!-- /bench -->\n"
        )
    assert markdown.has_region(page, "bench ab") and not markdown.has_region(page, "bench b")
    with pytest.raises(ValueError, match="<!-- bench b --> and <!-- /bench -->"):
        markdown.replace_region(page, "bench b", "")
