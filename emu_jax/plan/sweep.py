"""Compares settings on topologies, stores every report, and plots how the best setting scales.

OUT/sweep.json   every report; an interrupted sweep resumes from it
OUT/sweep.md     the table
OUT/scaling.png  predicted tokens per second and MFU by number of chips
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from emu_jax import markdown
from emu_jax.config import to_dict
from emu_jax.errors import UserError
from emu_jax.hardware import Topology
from emu_jax.plan import hlo
from emu_jax.plan.plan import (
    SAFE,
    CompiledReport,
    CompilerCrash,
    Report,
    compiler_flags,
    devices_of,
    plan_in_subprocess,
)
from emu_jax.storage import write_text, writing
from emu_jax.train.config import MeshConfig, TrainConfig
from emu_jax.train.device_memory import abstract_batch, memory_by_kind
from emu_jax.train.flops import jaxpr_flops
from emu_jax.train.step import Trainer, mesh_for

log = logging.getLogger(__name__)

# From most memory to least, and so from least recomputation to most.
POLICIES = ("dots", "minimal", "full")
MESHES = ("widest", "half")  # see `_meshes`
ROWS_PER_CHIP = (16, 12, 8, 6, 4, 3, 2, 1)
# {torus axes: (shape in chips, number of slices) of each point of a scaling curve}
LADDERS: dict[int, tuple[tuple[str, int], ...]] = {
    2: (("4x4", 1), ("8x8", 1), ("16x16", 1), ("16x16", 2)),
    3: (("4x4x4", 1), ("4x4x8", 1), ("8x8x8", 1)),
}
CURVES = ("weak", "strong")
REGION = "sweep"  # region of a page, between two HTML comments
HEAD = (
    "topology",
    "chips",
    "data x fsdp x tensor",
    "remat",
    "rows/chip",
    "HBM, GiB",
    "step, s",
    "tokens/s",
    "MFU, no overlap",
    "MFU, as scheduled",
    "MFU, overlap",
)
# Assumed fraction of a device's memory that temporaries take, until a first compile.
TEMPORARIES = 0.2


@dataclasses.dataclass(frozen=True)
class SettingGroup:
    """Settings that differ only in rows per chip, with costs estimated by tracing one of them."""

    policy: str
    fsdp: int
    fixed_bytes: float  # bytes per device, independent of the rows: parameters and optimizer
    bytes_per_row: float  # bytes per device for each row of a chip: activations and batch
    products: float  # seconds of matmuls per row of a chip
    network: float  # seconds of collectives per part of a batch, independent of the rows

    def setting(self, cfg: TrainConfig, topology: Topology, rows: int) -> TrainConfig:
        return _setting(cfg, topology, self.policy, self.fsdp, rows)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting of a sweep, and its report.

    Attributes:
        key: identifies the setting, the topology, the compiler and the rules of counting.
        curve: the scaling curve that it is a point of, or "".
        report: None if the compiler crashed.
    """

    key: str
    curve: str
    report: Report | None

    @property
    def fitting(self) -> CompiledReport | None:
        """The report, if the program fits."""
        report = self.report
        return report if isinstance(report, CompiledReport) and report.fits else None

    def to_json(self) -> dict[str, Any]:
        assert self.report is not None  # crashes are not stored
        return self.report.to_json() | {"key": self.key, "curve": self.curve}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Trial:
        return cls(values["key"], values["curve"], Report.from_json(values))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        trials: {topology: its best trial}.
        reports: number of trials.
        out: the folder with its files.
    """

    trials: dict[str, Trial]
    reports: int
    out: str

    @property
    def best(self) -> dict[str, CompiledReport]:
        """The report of the best setting for each topology."""
        fitting = {name: trial.fitting for name, trial in self.trials.items()}
        return {name: report for name, report in fitting.items() if report is not None}

    def to_json(self) -> dict[str, Any]:
        best = {name: trial.to_json() for name, trial in self.trials.items()}
        return {"best": best, "reports": self.reports, "out": self.out}


def _setting(
    cfg: TrainConfig, topology: Topology, policy: str, fsdp: int, rows: int
) -> TrainConfig:
    """Returns a setting with `rows` rows per chip at a time.

    A config that accumulates gradients keeps its batch, so it has more parts if they are smaller.
    """
    whole = cfg.data.batch_size if cfg.accumulate > 1 else 0
    parts = max(1, whole // (rows * topology.chips))
    return dataclasses.replace(
        cfg,
        accumulate=parts,
        data=dataclasses.replace(cfg.data, batch_size=rows * topology.chips * parts),
        mesh=MeshConfig(fsdp=fsdp, tensor=1),
        remat=dataclasses.replace(cfg.remat, llama=policy),
    )


def family(cfg: TrainConfig, topology: Topology, policy: str, fsdp: int) -> SettingGroup:
    """Estimates the costs of a family by tracing a step at the fewest rows, without compiling."""
    chip = topology.chip
    rows = chip.devices
    cfg = _setting(cfg, topology, policy, fsdp, rows)
    mesh = mesh_for(cfg, devices_of(topology))
    with jax.set_mesh(mesh):
        trainer = Trainer(cfg, mesh)
        batch = abstract_batch(trainer)
        kinds = memory_by_kind(trainer, batch)
        flops = jaxpr_flops(trainer.step.trace(trainer.state_shapes, batch).jaxpr.jaxpr)
    # Float32 parameters are gathered in bfloat16 for both passes, and their gradients reduced.
    gathered = 3 * kinds["parameters"] * fsdp / 2 * chip.devices
    return SettingGroup(
        policy,
        fsdp,
        fixed_bytes=kinds["parameters"] + kinds["optimizer"],
        bytes_per_row=kinds["activations"] / rows + kinds["batch"] / rows / cfg.accumulate,
        products=flops / cfg.data.batch_size / chip.flops,
        network=gathered / (sum(topology.links_per_axis()) * chip.link_bandwidth),
    )


def sweep(
    pairs: Iterable[tuple[TrainConfig, Topology]],
    out: Path,
    *,
    scaling: Sequence[str] = CURVES,
    policies: Sequence[str] = POLICIES,
    meshes: Sequence[str] = MESHES,
    rows: Sequence[int] = ROWS_PER_CHIP,
    flags: Path | None = None,
) -> Sweep:
    """Finds the best setting for each topology, and compiles the points of its scaling curves.

    Compiling takes most of the time, so settings that are sure to lose are skipped (`_Search`).
    All policies are tried on the first mesh. Only the best one is tried on the others, unless none
    has fit so far.

    Args:
        policies, meshes: those to try, of `POLICIES` and of `MESHES`.
        rows: numbers of rows per chip to try.
        flags: the script with the compiler's flags (`compiler_flags`).

    Raises:
        UserError: no setting fits a topology, a config splits rows over `mesh.context`, or the
            script fails.
    """
    pairs = list(pairs)
    if any(cfg.mesh.context > 1 for cfg, _ in pairs):
        raise UserError("a sweep tries meshes without context: set mesh.context to 1, or plan one")
    out.mkdir(parents=True, exist_ok=True)
    trials = _Trials(out / "sweep.json", flags)
    best: dict[str, Trial] = {}
    for cfg, topology in pairs:
        first, *others = _meshes(cfg, topology, meshes)
        search = _Search(cfg, topology, trials, rows)
        search.families([family(cfg, topology, policy, first) for policy in policies])
        for fsdp in others:
            left = [search.best.family.policy] if search.best else policies
            search.families([family(cfg, topology, policy, fsdp) for policy in left])
        if search.best is None:
            raise UserError(f"no setting fits {topology}: take more chips, or a smaller model")
        best[_name(topology)] = search.best.trial
        _scale(trials, cfg, topology, search.best, scaling)
        _publish(trials.used, out)
    return Sweep(best, len(trials.used), str(out))


def _publish(trials: list[Trial], out: Path) -> None:
    """Writes the table and the plot of the trials so far."""
    write_text(out / "sweep.md", trials_table(trials))
    curves = [trial for trial in trials if trial.curve]
    if curves:
        plot_scaling(curves, out / "scaling.png")


def _meshes(cfg: TrainConfig, topology: Topology, names: Sequence[str] = MESHES) -> list[int]:
    """Returns the FSDP sizes to try: the widest that divides the model, and half of it.

    The more promising one comes first. That is the smaller one if the larger spans a whole slice,
    because XLA then turns all-gathers into all-reduces.
    """
    wide = dataclasses.replace(cfg.data, batch_size=topology.chips * topology.chip.devices)
    free = dataclasses.replace(cfg, data=wide, mesh=MeshConfig(tensor=1))
    devices = devices_of(topology)
    widest = mesh_for(free, devices).shape["fsdp"]
    ways = [widest] if "widest" in names or widest % 2 else []
    ways += [widest // 2] if "half" in names and widest % 2 == 0 else []
    return ways[::-1] if widest * topology.slices == len(devices) else ways


class _Best(NamedTuple):
    """The best trial of a topology so far, its report, and its family."""

    trial: Trial
    report: CompiledReport
    family: SettingGroup


class _Search:
    """Search for the best setting of one topology with few compiles.

    Numbers of rows that would not fit are skipped, judged by the memory that is known without
    compiling and by the temporaries of the last compile. The family with the least promised time
    goes first. A family that promises no less time than the best report is skipped. Promised times
    include matmuls and collectives alone, scaled by how long they took in the last compile that
    fit.
    """

    def __init__(
        self, cfg: TrainConfig, topology: Topology, trials: _Trials, rows: Sequence[int]
    ) -> None:
        self.cfg, self.topology, self.trials = cfg, topology, trials
        self.rows = [n for n in sorted(rows, reverse=True) if n % topology.chip.devices == 0]
        self.best: _Best | None = None
        self.last: Report | None = None  # to estimate temporaries from
        self.pace = {"compute": 1.0, "ici": 1.0}  # ratio of compiled to promised seconds
        self.limit = topology.chip.hbm_bytes / topology.chip.devices

    def families(self, families: Iterable[SettingGroup]) -> None:
        waiting = sorted(families, key=self.promise)
        while waiting:
            candidate = waiting.pop(0)
            if self.best and self.promise(candidate) >= seconds_per_row(self.best.report):
                log.info("%s: left out, it promises no less time", self.name(candidate))
            else:
                self.family(candidate)
                waiting.sort(key=self.promise)

    def family(self, candidate: SettingGroup) -> None:
        """Compiles the numbers of rows that may fit, the largest first, until one fits."""
        for rows in self.rows:
            if not self.may_fit(candidate, rows):
                continue
            trial = self.trials.plan(
                candidate.setting(self.cfg, self.topology, rows), self.topology
            )
            self.last = trial.report or self.last
            if report := trial.fitting:
                for kind, promised in (
                    ("compute", candidate.products * rows),
                    ("ici", candidate.network),
                ):
                    if promised:
                        self.pace[kind] = report.seconds[kind] / promised / report.accumulate
                seconds = seconds_per_row(report)
                if self.best is None or seconds < seconds_per_row(self.best.report):
                    self.best = _Best(trial, report, candidate)
                return

    def promise(self, candidate: SettingGroup) -> float:
        """Returns the promised seconds per row on a chip, like `seconds_per_row` without HBM."""
        rows = next((rows for rows in self.rows if self.may_fit(candidate, rows)), 0)
        if not rows:
            return math.inf
        products = candidate.products * rows * self.pace["compute"]
        network = candidate.network * self.pace["ici"]
        return (max(products, network) + products + network) / 2 / rows

    def may_fit(self, candidate: SettingGroup, rows: int) -> bool:
        """Returns whether a number of rows may fit.

        Guesses that half of the temporaries grow with the rows, and takes off a tenth: a wasted
        compile is better than a setting that is wrongly skipped.
        """
        temporaries = TEMPORARIES * self.limit
        if self.last:
            there = self.last.hbm_by_kind["temporaries"]
            temporaries = 0.9 * there * (1 + rows / _rows_at_a_time(self.last)) / 2
        return candidate.fixed_bytes + candidate.bytes_per_row * rows + temporaries <= self.limit

    def name(self, candidate: SettingGroup) -> str:
        return f"{_name(self.topology)}, fsdp {candidate.fsdp}, {candidate.policy}"


def _scale(
    trials: _Trials, cfg: TrainConfig, topology: Topology, best: _Best, curves: Sequence[str]
) -> None:
    """Compiles the best setting on all `LADDERS` sizes that may hold it.

    Weak scaling keeps its rows per chip, strong scaling its total rows.
    """
    report, chosen = best.report, best.family
    for shape, slices in LADDERS[topology.chip.torus_axes]:
        other = Topology.parse(f"{topology.chip_name}:{shape}", slices)
        at_a_time = report.rows // report.accumulate
        for curve, rows in (
            ("weak", at_a_time // topology.chips * other.chips),
            ("strong", at_a_time),
        ):
            per_chip, rest = divmod(rows, other.chips)
            if curve not in curves or rest or per_chip % topology.chip.devices:
                continue  # not asked for, or rows that do not divide evenly
            devices = other.chips // slices * topology.chip.devices
            candidate = family(cfg, other, chosen.policy, min(chosen.fsdp, devices))
            needed = candidate.fixed_bytes + candidate.bytes_per_row * per_chip
            if curve == "weak":
                needed += 0.9 * report.hbm_by_kind["temporaries"]
            if needed <= topology.chip.hbm_bytes / topology.chip.devices:
                trials.plan(candidate.setting(cfg, other, per_chip), other, curve)


def _rows_at_a_time(report: Report) -> float:
    """Returns the rows per chip in each part of a batch."""
    return report.rows_per_chip / report.accumulate


def seconds_per_row(report: CompiledReport) -> float:
    """Returns the midpoint of the two bounds, per row on one chip."""
    return (report.step_seconds_overlap + report.step_seconds_serial) / 2 / report.rows_per_chip


class _Trials:
    """Trials stored on disk, each compiled only once."""

    def __init__(self, path: Path, flags: Path | None = None) -> None:
        self.path, self.flags = path, flags
        self.trials: list[Trial] = []
        self.used: list[Trial] = []  # by this sweep
        if path.exists():
            try:
                self.trials = [Trial.from_json(values) for values in json.loads(path.read_text())]
            except (ValueError, LookupError, TypeError, UserError) as error:
                raise UserError(
                    f"{path} is not the file of a sweep ({error}): remove it to start again"
                ) from None

    def plan(self, cfg: TrainConfig, topology: Topology, curve: str = "") -> Trial:
        trial = self._plan(cfg, topology, curve)
        self.used.append(trial)
        return trial

    def _plan(self, cfg: TrainConfig, topology: Topology, curve: str) -> Trial:
        flags = compiler_flags(self.flags, topology)
        key = _key(cfg, topology, flags)
        same = [trial for trial in self.trials if trial.key == key]
        for trial in same:
            if trial.curve == curve:
                return trial
        started = time.monotonic()
        try:
            report = same[0].report if same else plan_in_subprocess(cfg, topology, flags=flags)
        except CompilerCrash as crash:
            log.warning("%s: %s", _name(topology), crash)
            report = None
        trial = Trial(key, curve, report)
        self.trials.append(trial)
        # The host may have caused a crash, so a resumed sweep tries again.
        whole = [trial.to_json() for trial in self.trials if trial.report is not None]
        write_text(self.path, json.dumps(whole))
        verdict = "the compiler crashed" if report is None else "does not fit"
        if fitting := trial.fitting:
            verdict = f"MFU {fitting.mfu_serial:.3f} to {fitting.mfu_overlap:.3f}"
        log.info(
            "%s, fsdp %d, %s, %d rows a chip: %s (%.0f s)",
            _name(topology),
            cfg.mesh.fsdp,
            cfg.remat.llama,
            cfg.data.batch_size / topology.chips / cfg.accumulate,
            verdict,
            time.monotonic() - started,
        )
        return trial


def _key(cfg: TrainConfig, topology: Topology, flags: str) -> str:
    setting = to_dict(dataclasses.replace(cfg, tuned={}))
    compiler = [jax.__version__, version("libtpu"), flags, SAFE]
    values = [setting, str(topology), topology.slices, *compiler, hlo.RULES_VERSION]
    return json.dumps(values, sort_keys=True)


def _name(topology: Topology) -> str:
    return str(topology) + (f" x{topology.slices}" if topology.slices > 1 else "")


def trials_table(trials: list[Trial]) -> str:
    """Formats one row for each setting that fits, the best first for each topology."""
    order = lambda r: (r.topology, r.slices, seconds_per_row(r))  # noqa: E731
    reports = [trial.fitting for trial in trials if not trial.curve]
    chosen = sorted((report for report in reports if report is not None), key=order)
    return markdown.table(HEAD, map(_row, chosen)) + "\n"


def _row(report: CompiledReport) -> list[str]:
    r = report
    return [
        f"{r.topology} x{r.slices}" if r.slices > 1 else r.topology,
        f"{r.chips}",
        " x ".join(map(str, r.mesh.values())),
        r.remat["llama"],
        f"{_rows_at_a_time(r):g}",
        f"{r.hbm_bytes / 2**30:.1f} of {r.hbm_limit_bytes / 2**30:.0f}",
        f"{r.step_seconds_overlap:.2f} to {r.step_seconds_serial:.2f}",
        f"{r.tokens_per_second:,.0f} to {r.tokens_per_second_overlap:,.0f}",
        f"{r.mfu_serial:.3f}",
        "-" if r.mfu_scheduled is None else f"{r.mfu_scheduled:.3f}",
        f"{r.mfu_overlap:.3f}",
    ]


# Title, and the fields of the report with the serial and the overlapped bound.
PANELS = (
    ("tokens per second", "tokens_per_second", "tokens_per_second_overlap"),
    ("model FLOPs utilisation", "mfu_serial", "mfu_overlap"),
)


def plot_scaling(trials: list[Trial], path: Path) -> None:
    """Plots tokens per second and MFU by number of chips.

    Each chip type and curve is a band between the two bounds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    groups: dict[tuple[str, str], list[CompiledReport]] = {}
    for trial in trials:
        if report := trial.fitting:
            chip = report.topology.split(":")[0]
            groups.setdefault((chip, trial.curve), []).append(report)
    colours = {chip: f"C{n}" for n, chip in enumerate(sorted({chip for chip, _ in groups}))}
    for (chip, curve), points in sorted(groups.items()):
        points.sort(key=lambda r: (r.chips, r.slices))
        chips = [r.chips for r in points]
        style = {"color": colours[chip], "linestyle": "-" if curve == "weak" else "--"}
        for panel, (_, *bounds) in zip(panels, PANELS, strict=True):
            low, high = ([getattr(r, bound) for r in points] for bound in bounds)
            panel.fill_between(chips, low, high, color=colours[chip], alpha=0.12, linewidth=0)
            panel.plot(chips, low, marker="o", markersize=4, label=f"{chip}, {curve}", **style)
            panel.plot(chips, high, linewidth=0.8, **style)
    for panel, (title, *_) in zip(panels, PANELS, strict=True):
        panel.set(xscale="log", xlabel="chips", title=title)
        panel.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(0, 1)
    panels[0].legend(fontsize=8)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def check_page(page: Path, name: str = "") -> str:
    """Returns the region of a page that the table of the config `name` belongs to.

    That is `sweep NAME` if the page has it, and else `sweep`.

    Raises:
        UserError: the page cannot be read, or has no region for the table.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise UserError(f"{page}: {error.strerror}") from None
    for region in (f"{REGION} {name}", REGION):
        if markdown.has_region(text, region):
            return region
    lines = " and ".join(markdown.region_markers(REGION))
    raise UserError(f"{page}: no lines {lines}: add them where the table should stand")


def put_on_page(out: Path, page: Path, name: str = "") -> None:
    """Writes the table of the config `name` into its region of a page (`check_page`), and copies
    the plot beside the page: `scaling.png`, or `scaling-NAME.png` for a region of its own.

    Raises:
        UserError: the page cannot be read, or has no region for the table.
    """
    region = check_page(page, name)
    rows = (out / "sweep.md").read_text()
    write_text(page, markdown.replace_region(page.read_text(), region, rows))
    plot = out / "scaling.png"
    if plot.exists():
        suffix = region.removeprefix(REGION).replace(" ", "-")
        with writing(page.with_name(f"{plot.stem}{suffix}.png")) as temporary:
            shutil.copyfile(plot, temporary)
