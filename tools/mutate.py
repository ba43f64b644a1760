"""Plants known bugs one by one and checks that the tests notice each.

`tools/mutants.toml` lists the bugs. Each is one textual change (`old` -> `new` in `file`) with
the tests that should fail. The change is applied to a temporary copy of the project, never to
the checkout, and the tests run in that copy. Each of `--jobs` has a copy of its own.

    python tools/mutate.py                                    all
    python tools/mutate.py NAME ... [--jobs 2]                some
    python tools/mutate.py --write docs/notes/mutations.md    all, into the table there

With names, `--write` replaces these rows of the table and leaves the others as they are.

A bug is `caught` when one of its tests fails, `survived` when all pass. It is an `error` when
`old` does not occur exactly once, when the changed file is not valid Python, or when one of its
tests fails or is missing without the change. Exit status: 0 if every bug was caught or has an
explanation for surviving (`survives` in the list), 1 if one survived unexplained or ran out of
time, 2 on an error.
"""

import argparse
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from emu_jax import markdown

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "mutants.toml"
HEAD = ("Bug", "File", "What goes wrong", "Result")
REGION = "mutants"  # region of the page, between two HTML comments
ROW = re.compile(r"^\| `([^`]+)` \|.*$", re.MULTILINE)
# A line of pytest's summary: the outcome and the test.
OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR) (tests/\S+?\.py(?:::.*?)?)(?: - .*)?$", re.MULTILINE)


class MutationError(Exception):
    """Raised for a bug that cannot be planted or whose tests cannot be relied on."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One planted bug.

    `nth` (from 1) chooses an occurrence of `old` where there are several; `tests` are pytest
    node ids (a file or `file::test`); `why` says what the bug does to a user; `survives`
    explains why no test can reasonably notice it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    why: str
    nth: int | None = None
    survives: str = ""

    def apply(self, text: str) -> str:
        """Returns the file's text with the bug in it; raises MutationError if it does not fit."""
        count = text.count(self.old)
        if count == 0:
            raise MutationError(f"`old` does not occur in {self.file}")
        if self.nth is None and count > 1:
            raise MutationError(
                f"`old` occurs {count} times in {self.file}: lengthen it or set nth"
            )
        if (self.nth or 1) > count:
            raise MutationError(f"`old` occurs {count} times in {self.file}, nth is {self.nth}")
        start = -1
        for _ in range(self.nth or 1):
            start = text.index(self.old, start + 1)
        changed = text[:start] + self.new + text[start + len(self.old) :]
        if self.file.endswith(".py"):
            try:
                compile(changed, self.file, "exec")
            except SyntaxError as error:
                raise MutationError(
                    f"the changed {self.file} is not valid Python: {error}"
                ) from None
        return changed


def read_mutants(path: Path = LIST) -> list[Mutant]:
    mutants = [Mutant(**entry) for entry in tomllib.loads(path.read_text())["mutant"]]
    names = [mutant.name for mutant in mutants]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise MutationError(f"names used twice in {path}: {sorted(twice)}")
    return mutants


def copy_project(target: Path) -> None:
    """Copies the checkout without what git ignores."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".git", *ignored))


def imported_from(copy: Path) -> Path:
    """Returns the file from which the tests of a copy would import emu_jax."""
    command = [sys.executable, "-c", "import emu_jax; print(emu_jax.__file__)"]
    done = subprocess.run(
        command,
        cwd=copy.parent,
        env=environment(copy),
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip())


@contextmanager
def borrowed(idle: SimpleQueue[Path]) -> Iterator[Path]:
    """Yields a copy that no other job uses."""
    copy = idle.get()
    try:
        yield copy
    finally:
        idle.put(copy)


def environment(copy: Path) -> dict[str, str]:
    """Returns the environment of the tests: `make test`'s, importing from the copy."""
    return {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        **os.environ,
        "PYTHONPATH": str(copy),
        # Two changes within a second leave a .pyc that looks current.
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_tests(copy: Path, tests: list[str], timeout: float, *options: str) -> dict[str, str] | None:
    """Returns the outcome of each test that ran (skipped ones are left out), None on a timeout."""
    command = [sys.executable, "-m", "pytest", "-q", "-rpfE", "--tb=no", "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, *options, *tests],
            cwd=copy,
            env=environment(copy),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also kill processes that the tests started and left behind.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        output.seek(0)
        text = output.read()
    outcomes = {test: outcome for outcome, test in OUTCOME.findall(text)}
    if status != 0 and not {"FAILED", "ERROR"} & set(outcomes.values()):
        # A crash of the interpreter, or a test that does not exist.
        outcomes["pytest"] = f"ERROR: exit status {status}: {text.strip()[-300:]}"
    return outcomes


def selects(selection: str, test: str) -> bool:
    return test == selection or test.startswith((selection + "::", selection + "["))


def check_unchanged(copy: Path, tests: list[str], timeout: float) -> dict[str, str]:
    """Returns what is wrong with each test that cannot be relied on in the unchanged copy."""
    outcomes = run_tests(copy, tests, timeout)
    if outcomes is None:
        return dict.fromkeys(tests, f"ran for more than {timeout:.0f} s without the change")
    if "pytest" in outcomes and len(tests) > 1:
        # One missing test keeps all others from running.
        return {
            test: wrong
            for one in tests
            for test, wrong in check_unchanged(copy, [one], timeout).items()
        }
    wrong = {}
    for test in tests:
        ran = {name: outcome for name, outcome in outcomes.items() if selects(test, name)}
        failed = [name for name, outcome in ran.items() if outcome != "PASSED"]
        if "pytest" in outcomes:
            wrong[test] = outcomes["pytest"]
        elif failed:
            wrong[test] = f"fails without the change: {', '.join(failed)}"
        elif not ran:
            wrong[test] = "was skipped: it says nothing here"
    return wrong


def run_mutant(copy: Path, mutant: Mutant, timeout: float) -> tuple[str, str]:
    """Returns (caught, survived or timeout; the tests that failed) and restores the file."""
    path = copy / mutant.file
    original = path.read_text()
    path.write_text(mutant.apply(original))
    try:
        outcomes = run_tests(copy, mutant.tests, timeout, "-x")
    finally:
        path.write_text(original)
    if outcomes is None:
        return "timeout", f"no result in {timeout:.0f} s"
    failed = [test for test, outcome in outcomes.items() if outcome != "PASSED"]
    return ("caught", ", ".join(failed)) if failed else ("survived", "")


def table_row(mutant: Mutant, result: str, detail: str) -> str:
    if result == "caught":
        tests = dict.fromkeys(re.sub(r"\[.*?\]$", "", test) for test in detail.split(", "))
        said = "caught by " + ", ".join(f"`{test.removeprefix('tests/')}`" for test in tests)
    else:
        said = f"**{result}**: {mutant.survives or detail or 'not explained yet'}"
    file = mutant.file.removeprefix("emu_jax/")
    return markdown.row((f"`{mutant.name}`", f"`{file}`", mutant.why, said))


def write_table(path: Path, mutants: list[Mutant], rows: dict[str, str]) -> None:
    """Replaces the table of `path`. Mutants that are not in `rows` keep their rows."""
    begin, end = markdown.region_markers(REGION)
    text = path.read_text() if path.exists() else f"# Planted bugs\n\n{begin}\n{end}\n"
    old = {match[1]: match[0] for match in ROW.finditer(text)}
    lines = [rows.get(mutant.name) or old.get(mutant.name) for mutant in mutants]
    table = "\n".join([markdown.table(HEAD, []), *filter(None, lines)])
    path.write_text(markdown.replace_region(text, REGION, table))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant known bugs and run the tests.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="bugs to plant (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="bugs planted at a time (default: 1)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a bug (default: 600)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table to this page")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}: make it at least 1")
    mutants = read_mutants()
    unknown = set(options.names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no such bug in {LIST.name}: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in mutants if not options.names or mutant.name in options.names]

    results: dict[str, str] = {}
    rows: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copies = [Path(folder).resolve() / str(job) / "project" for job in range(options.jobs)]
        for copy in copies:
            copy_project(copy)
        where = imported_from(copies[0])
        if not where.is_relative_to(copies[0]):
            print(f"the tests would import {where}, not the copy in {copies[0]}", file=sys.stderr)
            return 2
        idle: SimpleQueue[Path] = SimpleQueue()
        for copy in copies:
            idle.put(copy)
        start = time.time()
        with ThreadPoolExecutor(options.jobs) as pool:
            # A whole file each, so that its fixtures are built once.
            files: dict[str, list[str]] = {}
            for test in dict.fromkeys(test for mutant in chosen for test in mutant.tests):
                files.setdefault(test.split("::")[0], []).append(test)

            def check(tests: list[str]) -> dict[str, str]:
                with borrowed(idle) as copy:
                    return check_unchanged(copy, tests, options.timeout * len(chosen))

            wrong = {t: why for bad in pool.map(check, files.values()) for t, why in bad.items()}
            print(f"{len(files)} files of tests without changes: {time.time() - start:.0f} s")

            def plant(mutant: Mutant) -> tuple[str, str, float]:
                start = time.time()
                with borrowed(idle) as copy:
                    try:
                        if bad := [f"{t} {wrong[t]}" for t in mutant.tests if t in wrong]:
                            raise MutationError("; ".join(bad))
                        result, detail = run_mutant(copy, mutant, options.timeout)
                    except (MutationError, OSError) as error:
                        result, detail = "error", str(error)
                return result, detail, time.time() - start

            planted = zip(chosen, pool.map(plant, chosen), strict=True)
            for mutant, (result, detail, seconds) in planted:
                results[mutant.name] = result
                if result == "survived" and mutant.survives:
                    results[mutant.name], detail = "explained", mutant.survives
                rows[mutant.name] = table_row(mutant, result, detail)
                print(f"{result:8} {mutant.name} ({seconds:.0f} s) {detail}", flush=True)
    if options.write:
        write_table(options.write, mutants, rows)
    counts = {result: list(results.values()).count(result) for result in set(results.values())}
    print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())))
    if "error" in counts:
        return 2
    return 1 if {"survived", "timeout"} & counts.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
