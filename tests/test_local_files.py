"""Atomic writes of local files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from emu_jax.storage import temporary_path, write_text, writing


@pytest.fixture(params=[0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("shared", [True, False])
def test_a_failed_write_changes_nothing(tmp_path: Path, shared: bool):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(ValueError, match="half"), writing(target, shared=shared) as temporary:
        temporary.write_text("new")
        raise ValueError("half")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    write_text(target, "new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_processes_that_share_a_file_have_their_own_temporary(tmp_path: Path):
    target = tmp_path / "a.txt"
    with writing(target, shared=True) as first, writing(target, shared=True) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second and not target.exists()
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]


def test_a_directory_replaces_what_a_killed_process_left(tmp_path: Path):
    target = tmp_path / "folder"
    left = temporary_path(target)
    left.mkdir()
    (left / "old").write_text("")
    with writing(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


def test_files_are_as_readable_as_the_user_asked(tmp_path: Path, umask: int):
    target = tmp_path / "a.txt"
    with writing(target, shared=True) as temporary:
        temporary.write_text("text")
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask
