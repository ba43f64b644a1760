"""`emu-jax bench`: runs the benchmarks in benchmarks/ and updates the tables of
docs/performance.md.

A benchmark is a Python file in benchmarks/. Its docstring explains what it measures and how.

    run(key=default, ...) -> dict    measures; returns figures as plain JSON types. A generator
                                     yields them after each part, each time with the earlier ones
    table(figures) -> str            optional: the figures as Markdown
    plot(figures, path)              optional: the figures as a PNG

Progress goes to the `emu_jax` logger. The parts of a comparison take turns (`take_turns`), and
ratios are taken within a turn (`ratio`). Other load on the machine then affects all parts alike.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import logging
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from emu_jax import markdown
from emu_jax.errors import UserError, suggest
from emu_jax.storage import shipped, write_text

log = logging.getLogger("emu_jax")

Figures = dict[str, Any]
OUT = Path("runs/bench")  # default folder of plots
CAUSE_LENGTH = 300  # characters of an error's message that a record keeps
NOT_MEASURED = "Not measured."


class Missing(UserError):
    """Raised when a benchmark cannot run here, because a library or device is missing. If all
    benchmarks were requested, it is skipped and its message logged."""


def benchmarks() -> dict[str, Path]:
    """Maps the names of benchmarks to files, sorted by name.

    Raises:
        UserError: the folder is missing.
    """
    return {p.stem: p for p in sorted(shipped("benchmarks").glob("*.py"))}


def about(path: Path) -> str:
    """Returns the first line of a benchmark's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def load_benchmark(name: str) -> ModuleType:
    """Loads a benchmark as a module, also for use by another benchmark.

    Raises:
        UserError: there is no such benchmark.
    """
    known = benchmarks()
    if name not in known:
        raise UserError(f"no benchmark {name!r}{suggest(name, known)}")
    spec = importlib.util.spec_from_file_location(f"emu_jax_benchmark_{name}", known[name])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(
    names: Sequence[str] = (),
    settings: Sequence[str] = (),
    *,
    out: Path = OUT,
    write: Path | None = None,
    label: str = "",
) -> Figures:
    """Runs the named benchmarks, or all. Returns figures by benchmark, and `machine`.

    A failing benchmark does not stop the others: `passed` is then False, and `failed` lists it.

    Args:
        settings: `NAME.KEY=VALUE`, arguments of the benchmarks' `run`.
        out: directory for plots.
        write: a Markdown file. The table of each benchmark is updated there as soon as it is
            done (`Page`).
        label: distinguishes records of the same hardware with other settings.

    Raises:
        UserError: there is no such benchmark or setting, `write` has no place for a benchmark, or
            a named benchmark cannot run here. A benchmark that runs alone raises its own error.
    """
    # JAX preallocates three quarters of a GPU by default, which leaves too little for the
    # libraries it is compared with.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from emu_jax.train.distributed import initialize_distributed

    initialize_distributed()
    modules = {name: load_benchmark(name) for name in names or benchmarks()}
    chosen = _settings(settings, modules)
    page = Page(write) if write else None
    if page:
        page.check(modules)
    results: Figures = {}
    failed = []
    for name, module in modules.items():
        log.info("bench %s: %s", name, about(Path(module.__file__ or "")))
        try:
            for figures in _updates(module.run(**chosen[name])):
                results[name] = figures
                if page and not jax.process_index():  # only the first host writes
                    words = [setting for setting in settings if setting.startswith(f"{name}.")]
                    command = " ".join(["emu-jax bench", name, *(f"--set {w}" for w in words)])
                    record = {"command": command, "machine": machine(), "figures": figures}
                    page.update(name, record, label)
        except Missing as error:
            if names:
                raise
            log.info("bench %s: left out: %s", name, error)
            continue
        except Exception as error:
            if len(modules) == 1:
                raise
            trace = not isinstance(error, UserError)
            log.error("bench %s: failed: %s", name, error, exc_info=trace)
            failed.append(name)
            continue
        if hasattr(module, "plot") and not page and not jax.process_index():
            out.mkdir(parents=True, exist_ok=True)
            module.plot(results[name], out / f"{name}.png")
            log.info("bench %s: %s", name, out / f"{name}.png")
    results["machine"] = machine()
    if failed:
        log.error("bench: failed, as said above: %s", ", ".join(failed))
        results |= {"passed": False, "failed": failed}
    return results


def _updates(measured: Figures | Iterator[Figures]) -> Iterator[Figures]:
    """Yields the figures that a benchmark's `run` returned, or those after each of its parts."""
    if isinstance(measured, dict):
        yield measured
    else:
        yield from measured


def run_benchmark_in_subprocess(
    name: str, settings: Sequence[str], seconds: float, *, preload: Sequence[str] = ()
) -> Figures:
    """Runs one benchmark in a process of its own, so that it leaves no memory behind and can be
    stopped. Returns its figures.

    Args:
        seconds: after which it is stopped.
        preload: modules that all such processes import, if they are installed. On a CPU they are
            imported once, and the processes forked.

    Raises:
        RuntimeError: it failed or was stopped. The message is one line.
    """
    from emu_jax.models.backend import on_cpu

    # CUDA does not survive a fork, and a library may initialize it when it is imported.
    if on_cpu():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
    else:
        context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    level = log.getEffectiveLevel()
    process = context.Process(target=_send_figures, args=(sender, name, list(settings), level))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"stopped after {seconds:.0f} s")
        figures, cause = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if cause:
        raise RuntimeError(cause)
    return figures


def _send_figures(sender: Connection, name: str, settings: list[str], level: int) -> None:
    """Sends (figures, "") or ({}, cause of the failure in one line)."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    log.setLevel(level)
    try:
        sender.send((run([name], settings)[name], ""))
    except Exception as error:
        log.error("bench %s: failed", name, exc_info=not isinstance(error, UserError))
        sender.send(({}, " ".join(f"{type(error).__name__}: {error}".split())[:CAUSE_LENGTH]))


def _settings(settings: Sequence[str], modules: Mapping[str, ModuleType]) -> dict[str, Figures]:
    """Parses the arguments of each benchmark's `run` to the types of their defaults."""
    chosen: dict[str, Figures] = {name: {} for name in modules}
    for setting in settings:
        where, equals, value = setting.partition("=")
        name, _, key = where.partition(".")
        if name not in modules or not equals:
            raise UserError(
                f"--set {setting}: write NAME.KEY=VALUE, NAME one of {', '.join(modules)}"
            )
        known = inspect.signature(modules[name].run).parameters
        if key not in known:
            raise UserError(f"--set {setting}: {name} has no setting {key!r}{suggest(key, known)}")
        kind = type(known[key].default)
        try:
            chosen[name][key] = kind(value)
        except ValueError:
            raise UserError(f"--set {setting}: {value!r} is not of type {kind.__name__}") from None
    return chosen


def take_turns(
    parts: Mapping[str, Callable[[], float | None]],
    turns: int = 5,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Times each part once per turn, in reverse order on every second turn. Returns seconds.

    Args:
        parts: functions that do their work and wait for its end. If one returns a number, its
            time is divided by it.
        clock: returns seconds; `time.process_time` excludes other processes on the core.
        warm: run each part once, untimed, right before timing it. This compiles it and leaves
            caches and memory as the part itself leaves them, not as the previous part did. Without
            it, the parts follow one another more closely.

    Raises:
        UserError: `turns` is less than 1.
    """
    if turns < 1:
        raise UserError(f"turns cannot be {turns}: at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(turns):
        progress = []
        for name in list(parts)[:: 1 if turn % 2 == 0 else -1]:
            if warm:
                parts[name]()
            began = clock()
            done = parts[name]()
            taken = clock() - began
            seconds[name].append(taken / (1 if done is None else float(done)))
            progress.append(f"{name} {taken:.3g} s")
        log.info("turn %d of %d: %s", turn + 1, turns, ", ".join(progress))
    return seconds


def median(values: Sequence[float]) -> dict[str, float]:
    """Returns the median and half the interquartile range (`spread`), to four digits."""
    if len(values) < 2:
        return {"median": _digits(values[0]), "spread": 0.0}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": _digits(middle), "spread": _digits((high - low) / 2)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Returns the `median` of the ratios within each turn. Seconds of B over seconds of A is the
    speed-up of A over B."""
    return median([a / b for a, b in zip(over, under, strict=True)])


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def figures_table(figures: Figures) -> str:
    """Formats the result of `run`, one figure per line."""
    rows = list(_rows(figures))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats a Markdown table of figures."""
    return markdown.table(head, [[shown(cell) for cell in row] for row in rows])


def shown(value: object) -> str:
    """Formats one figure: `1.23 ± 0.04`, `12,300`, or `-` if not measured."""
    if value is None:
        return "-"
    if isinstance(value, dict) and value.keys() == {"median", "spread"}:
        spread = value["spread"]
        return f"{shown(value['median'])} ± {float(f'{spread:.2g}'):,g}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return str(value) if isinstance(value, int) else f"{value:.3g}"
    return str(value)


def _rows(values: Figures, above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", f"{value:.4g}" if isinstance(value, float) else str(value)


class Page:
    """A Markdown file with generated tables between `<!-- bench NAME -->` and `<!-- /bench -->`.

    The figures are stored beside it (`performance.json` for `performance.md`), by benchmark and
    hardware, each with its command and machine. Plots are stored there too
    (`performance-NAME-HARDWARE.png`). A new measurement replaces the one of the same hardware.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.records_path = path, path.with_suffix(".json")

    def check(self, names: Iterable[str]) -> None:
        """Checks that the file can take the tables of the named benchmarks.

        Raises:
            UserError: the file is missing or has no place for a benchmark, or the stored figures
                are not valid JSON.
        """
        try:
            text, _ = self.path.read_text(), self.records()
        except (OSError, ValueError) as error:
            raise UserError(f"--write {self.path}: {error}") from None
        for name in names:
            if not markdown.has_region(text, f"bench {name}"):
                lines = " and ".join(markdown.region_markers(f"bench {name}"))
                raise UserError(
                    f"{self.path} has no place for the table of {name}: add the lines {lines} "
                    "where it should stand"
                )

    def records(self) -> dict[str, dict[str, Figures]]:
        """Returns the stored records, by benchmark and hardware."""
        return json.loads(self.records_path.read_text()) if self.records_path.exists() else {}

    def update(self, name: str, record: Figures, label: str = "") -> None:
        """Stores the record of one benchmark and rewrites only its tables and its plot. A record
        with a label stands beside the one without."""
        hardware = _hardware(record["machine"]) + (f": {label}" if label else "")
        records = self.records()
        records[name] = dict(sorted((records.get(name, {}) | {hardware: record}).items()))
        write_text(self.records_path, json.dumps(dict(sorted(records.items())), indent=1) + "\n")
        module = load_benchmark(name)
        if hasattr(module, "plot"):
            module.plot(record["figures"], self._plot(name, hardware))
        write_text(self.path, self.rendered(self.path.read_text(), {name: records[name]}))

    def rendered(self, text: str, records: Mapping[str, Mapping[str, Figures]]) -> str:
        """Returns `text` with the tables of `records` filled in."""
        for name, by_hardware in records.items():
            tables = "\n\n".join(self._section(name, *item) for item in by_hardware.items())
            text = markdown.replace_region(text, f"bench {name}", tables or NOT_MEASURED)
        return text

    def _section(self, name: str, hardware: str, record: Figures) -> str:
        module, figures = load_benchmark(name), record["figures"]
        lines = [f"**{hardware}**", ""]
        if hasattr(module, "table"):
            lines += [module.table(figures)]
        else:
            lines += [markdown_table(("Figure", "Value"), list(_rows(figures)))]
        if hasattr(module, "plot"):
            lines += ["", f"![{name}]({self._plot(name, hardware).name})"]
        rest = {key: value for key, value in record["machine"].items() if key not in HARDWARE}
        where = ", ".join(f"{key} {value}" for key, value in rest.items())
        return "\n".join([*lines, "", f"(`{record['command']}`; {where})"])

    def _plot(self, name: str, hardware: str) -> Path:
        words = "-".join(re.findall(r"[a-z0-9_]+", hardware.lower()))
        return self.path.with_name(f"{self.path.stem}-{name}-{words}.png")


# Keys of `machine()` that identify the hardware.
HARDWARE = ("cores", "processor", "devices")


def _hardware(machine: Figures) -> str:
    accelerators = [machine["devices"]] if "devices" in machine else []
    return ", ".join([*accelerators, f"{machine['cores']} cores", machine["processor"]])


# Libraries and variables that may affect the figures; recorded if present.
LIBRARIES = ("jax", "numpy", "pillow", "torch", "transformers", "diffusers")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES")


def machine() -> Figures:
    """Returns cores, processor, devices, library versions, and compiler and memory settings."""
    import jax

    devices = jax.devices()
    known = {}
    for name in LIBRARIES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    accelerators = (
        {}
        if devices[0].platform == "cpu"
        else {"devices": f"{len(devices)} x {devices[0].device_kind}{hosts}"}
    )
    return {
        "cores": cores(),
        "processor": _processor(),
        **accelerators,
        "python": platform.python_version(),
        **known,
        **{name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """Returns the processor's model and widest vector extension, as reported by Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = (re.search(r"^flags\s*: (.+)$", text, re.MULTILINE) or [""])[0].split()
    wide = next((f for f in ("amx_tile", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return " ".join(filter(None, [model[1] if model else platform.machine(), wide]))
