"""The list of planted bugs fits the code, and the tool that plants them tells right from wrong."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
    module = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_bug_fits_its_file_and_names_tests_that_exist(mutate):
    wrong, names = [], {}
    for mutant in mutate.read_mutants():
        try:
            mutant.apply((ROOT / mutant.file).read_text())
        except (mutate.MutationError, OSError) as error:
            wrong.append(f"{mutant.name}: {error}")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            if file not in names:
                tree = ast.parse((ROOT / file).read_text()) if (ROOT / file).exists() else None
                found = ast.walk(tree) if tree else ()
                names[file] = {node.name for node in found if isinstance(node, ast.FunctionDef)}
            if not names[file] or (name and name.split("[")[0] not in names[file]):
                wrong.append(f"{mutant.name}: there is no {test}")
        if not mutant.tests:
            wrong.append(f"{mutant.name}: names no test")
    assert not wrong, "\n".join(wrong)


def test_the_page_tells_of_no_other_bugs_and_explains_each_survivor(mutate):
    page = (ROOT / "docs" / "notes" / "mutations.md").read_text()
    rows = {match[1]: match[0] for match in mutate.ROW.finditer(page)}
    mutants = {mutant.name: mutant for mutant in mutate.read_mutants()}
    assert rows.keys() <= mutants.keys()
    for name, row in rows.items():
        assert "| caught by `" in row or (mutants[name].survives and mutants[name].survives in row)


def test_a_bug_is_applied_once_or_refused(mutate):
    def apply(text, **changes):
        values = {"name": "n", "file": "f.py", "old": "a = 1", "new": "a = 2", "tests": []}
        return mutate.Mutant(**(values | {"why": ""} | changes)).apply(text)

    assert apply("a = 1\nb = 1\n") == "a = 2\nb = 1\n"
    assert apply("a = 1\na = 1\n", nth=2) == "a = 1\na = 2\n"
    with pytest.raises(mutate.MutationError, match="does not occur in f.py"):
        apply("b = 1\n")
    with pytest.raises(mutate.MutationError, match="occurs 2 times"):
        apply("a = 1\na = 1\n")
    with pytest.raises(mutate.MutationError, match="nth is 3"):
        apply("a = 1\na = 1\n", nth=3)
    with pytest.raises(mutate.MutationError, match="not valid Python"):
        apply("a = 1\n", new="a = (")


@pytest.mark.parametrize(
    "old, tests, survives, result, status",
    [
        ("a = 1", ["tests/t.py::notices"], "", "caught", 0),
        ("a = 1", ["tests/t.py::fine", "tests/t.py::notices"], "", "caught", 0),
        ("a = 1", ["tests/t.py::fine"], "", "survived", 1),
        ("a = 1", ["tests/t.py::fine"], "It computes the same.", "explained", 0),
        ("a = 1", ["tests/t.py::hangs"], "", "timeout", 1),
        # These say nothing about the bug.
        ("b = 1", ["tests/t.py::notices"], "", "error", 2),
        ("a = 1", ["tests/t.py::fails"], "", "error", 2),
        ("a = 1", ["tests/t.py::skipped"], "", "error", 2),
        ("a = 1", ["tests/t.py::missing"], "", "error", 2),
    ],
)
def test_what_is_told_of_a_bug(
    mutate, tmp_path, monkeypatch, capsys, old, tests, survives, result, status
):
    (tmp_path / "emu_jax").mkdir()
    (tmp_path / "emu_jax" / "__init__.py").write_text("a = 1\n")
    (tmp_path / ".gitignore").write_text("runs/\n")

    def run_tests(copy, tests, timeout, *options):
        assert copy != tmp_path  # never the checkout
        planted = (copy / "emu_jax" / "__init__.py").read_text() == "a = 2\n"
        if planted and "tests/t.py::hangs" in tests:
            return None
        if "tests/t.py::missing" in tests:
            return {"pytest": "ERROR: exit status 4"}
        failing = {"tests/t.py::fails"} | ({"tests/t.py::notices"} if planted else set())
        ran = [test + "[1]" for test in tests if not test.endswith("skipped")]
        return {test: "FAILED" if test[:-3] in failing else "PASSED" for test in ran}

    mutant = mutate.Mutant("bug", "emu_jax/__init__.py", old, "a = 2", tests, "", None, survives)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "read_mutants", lambda: [mutant])
    monkeypatch.setattr(mutate, "run_tests", run_tests)
    assert mutate.main([]) == status
    assert capsys.readouterr().out.splitlines()[-1] == f"1 {result}"


def test_a_table_keeps_the_rows_of_bugs_that_were_not_planted(mutate, tmp_path):
    mutants = [
        mutate.Mutant(name, "emu_jax/f.py", "a", "b", [], "Goes wrong.")
        for name in ("first", "second", "third")
    ]
    page = tmp_path / "mutations.md"

    def write(mutants, **results):
        chosen = {mutant.name: mutant for mutant in mutants}
        rows = {n: mutate.table_row(chosen[n], *result) for n, result in results.items()}
        mutate.write_table(page, mutants, rows)

    write(mutants, first=("caught", "tests/test_a.py::test_b[1]"), second=("survived", ""))
    page.write_text(page.read_text().replace("# Planted bugs\n", "# Planted bugs\n\nMore.\n"))
    write(mutants[:2], second=("caught", "tests/test_a.py::test_c"))
    assert page.read_text() == (
        "# Planted bugs\n\nMore.\n\n<!-- mutants -->\n"
        "| Bug | File | What goes wrong | Result |\n| --- | --- | --- | --- |\n"
        "| `first` | `f.py` | Goes wrong. | caught by `test_a.py::test_b` |\n"
        "| `second` | `f.py` | Goes wrong. | caught by `test_a.py::test_c` |\n<!-- /mutants -->\n"
    )
