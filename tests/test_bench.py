"""`emu-jax bench`: what it finds, runs and prints."""

import ast
import dataclasses
import itertools
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from emu_jax import bench, cli
from emu_jax.config import digits, emu_ladder
from emu_jax.data import DataConfig
from emu_jax.errors import UserError
from emu_jax.storage import shipped
from emu_jax.train.config import TrainConfig, pretraining

pytestmark = pytest.mark.optimized

FAST = '"""How fast.\n\nMore."""\ndef run(rate=2.5, name="a"): return {"rate": rate, "name": name}'
WIDE = 'def run(): return {"sides": {"left": 1, "right": "x"}}'
DRAWN = """
from emu_jax import bench
def run(): return {"seconds": bench.median([1.0, 2.0, 3.0]), "bytes": 12345}
def table(figures): return bench.markdown_table(("s", "bytes"), [figures.values()])
def plot(figures, path): path.write_text("a plot")
"""
RESULTS = ("dict", "Iterator[dict]")  # of a benchmark's run
PAGE = """# Speed
Written by hand.
<!-- bench drawn -->
old
<!-- /bench -->
Also by hand.
<!-- bench fast -->
<!-- /bench -->
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    for name, text in {"fast": FAST, "wide": WIDE}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(bench, "shipped", lambda name: tmp_path)
    return tmp_path


def test_run_all_and_one(folder):
    assert list(bench.run()) == ["fast", "wide", "machine"]
    figures = bench.run(["wide"])
    assert figures.pop("machine")["cores"] >= 1
    assert figures == {"wide": {"sides": {"left": 1, "right": "x"}}}


def test_unknown_name(folder):
    with pytest.raises(UserError, match="no benchmark 'fats'; did you mean 'fast'?"):
        bench.run(["wide", "fats"])


def test_what_is_printed(folder, capsys):
    assert cli.main(["bench", "fast", "wide"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["fast.rate", "2.5"],
        ["fast.name", "a"],
        ["wide.sides.left", "1"],
    ]
    assert cli.main(["bench", "fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fast"] == {"rate": 2.5, "name": "a"}
    assert cli.main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=1) == ["fast", "How fast."]


def test_settings(folder):
    assert bench.run(["fast"], ["fast.rate=3", "fast.name=b=c"])["fast"] == {
        "rate": 3.0,
        "name": "b=c",
    }
    for setting, message in {
        "fast.rat=1": "fast has no setting 'rat'; did you mean 'rate'?",
        "fast.rate=much": "'much' is not of type float",
        "wide.rate=1": "write NAME.KEY=VALUE, NAME one of fast",
        "fast.rate": "write NAME.KEY=VALUE",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            bench.run(["fast"], [setting])


def test_what_fails_does_not_cost_the_others_their_figures(folder, capsys, caplog):
    (folder / "bad.py").write_text("def run(): raise RuntimeError('no luck')")
    assert cli.main(["bench", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["fast"]["rate"] == 2.5 and printed["wide"]["sides"]["left"] == 1
    assert (printed["passed"], printed["failed"]) == (False, ["bad"])
    assert "bench bad: failed: no luck" in caplog.messages
    assert caplog.messages[-1] == "bench: failed, as said above: bad"
    with pytest.raises(RuntimeError, match="no luck"):
        bench.run(["bad"])


def test_what_cannot_run_here(folder, caplog):
    text = "from emu_jax.bench import Missing\ndef run(): raise Missing('torch is missing')"
    (folder / "slow.py").write_text(text)
    with caplog.at_level("INFO", logger="emu_jax"):
        assert list(bench.run()) == ["fast", "wide", "machine"]
    assert "bench slow: left out: torch is missing" in caplog.messages
    with pytest.raises(UserError, match="torch is missing"):
        bench.run(["slow"])


def test_turns_are_taken_in_alternating_order():
    time, order = itertools.count(), []
    parts = {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 4}
    seconds = bench.take_turns(parts, 3, clock=lambda: float(next(time)))
    assert "".join(order) == "aabb" + "bbaa" + "aabb"  # each once before it is timed
    assert seconds == {"a": [1.0] * 3, "b": [0.25] * 3}  # b does four at a time
    order.clear()
    bench.take_turns(parts, 2, warm=False)
    assert "".join(order) == "ab" + "ba"
    with pytest.raises(UserError, match="turns cannot be 0"):
        bench.take_turns(parts, 0)


def test_ratio_and_spread():
    assert bench.median([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "spread": 1.0}
    assert bench.median([2.0]) == {"median": 2.0, "spread": 0.0}
    # Of each turn: the machine was twice as slow at the second.
    assert bench.ratio([3.0, 6.0], [2.0, 4.0]) == {"median": 1.5, "spread": 0.0}
    with pytest.raises(ValueError):
        bench.ratio([1.0], [1.0, 2.0])


def test_the_page_is_written_from_figures(folder, capsys):
    (folder / "drawn.py").write_text(DRAWN)
    path = folder / "performance.md"
    path.write_text(PAGE)
    assert cli.main(["bench", "drawn", "--write", str(path)]) == 0
    text = path.read_text()
    lines = text.splitlines()
    assert lines[:3] == ["# Speed", "Written by hand.", "<!-- bench drawn -->"]
    assert lines[3].startswith(f"**{bench.cores()} cores, ")
    assert lines[5:8] == ["| s | bytes |", "| --- | --- |", "| 2 ± 0.5 | 12,345 |"]
    (plot,) = folder.glob("performance-drawn-*.png")
    assert plot.read_text() == "a plot" and lines[9] == f"![drawn]({plot.name})"
    assert lines[11].startswith("(`emu-jax bench drawn`; python ") and " jax " in lines[11]
    assert text.endswith(PAGE.partition("<!-- /bench -->")[2])  # the other table as it was

    assert cli.main(["bench", "fast", "--set", "fast.rate=3", "--write", str(path)]) == 0
    assert "(`emu-jax bench fast --set fast.rate=3`; python " in path.read_text()
    assert path.read_text().startswith(text.partition("Also by hand")[0])
    page = bench.Page(path)
    assert list(page.records()) == ["drawn", "fast"]
    assert page.rendered(path.read_text(), page.records()) == path.read_text()
    assert cli.main(["bench", "wide", "--write", str(path)]) == 2
    assert "has no place for the table of wide" in capsys.readouterr().err


def test_a_page_keeps_the_figures_of_every_hardware(folder, monkeypatch):
    path = folder / "performance.md"
    path.write_text(PAGE)
    here = bench.machine()
    for machine in (
        here | {"cores": 4, "processor": "Z"},
        here | {"processor": "A", "devices": "8 x TPU v5p"},
        here | {"cores": 4, "processor": "Z", "jax": "later"},
    ):
        monkeypatch.setattr(bench, "machine", lambda found=machine: found)
        bench.run(["fast"], write=path)
    kept = bench.Page(path).records()["fast"]
    assert list(kept) == ["4 cores, Z", f"8 x TPU v5p, {here['cores']} cores, A"]
    assert kept["4 cores, Z"]["machine"]["jax"] == "later"
    text = path.read_text()
    assert text.count("**4 cores, Z**") == 1 and text.index("**4 cores, Z**") < text.index("**8 x")


def test_plots_go_where_they_are_asked_for(folder):
    (folder / "drawn.py").write_text(DRAWN)
    bench.run(["drawn"], out=folder / "plots")
    assert (folder / "plots" / "drawn.png").read_text() == "a plot"


def test_a_label_keeps_a_record_beside_another(folder, tmp_path):
    (folder / "drawn.py").write_text(DRAWN)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for label in ("", "16 rows"):
        bench.run(["fast"], write=page, label=label)
    records = bench.Page(page).records()["fast"]
    plain, labeled = records
    assert labeled == f"{plain}: 16 rows" and f"**{labeled}**" in page.read_text()


def test_figures_are_written_after_each_part(folder):
    parts = 'def run():\n yield {"a": 1}\n yield {"a": 1, "b": 2}\n raise RuntimeError("no luck")'
    (folder / "fast.py").write_text(parts)
    page = bench.Page(folder / "page.md")
    page.path.write_text(PAGE)
    with pytest.raises(RuntimeError, match="no luck"):
        bench.run(["fast"], write=page.path)
    (record,) = page.records()["fast"].values()
    assert record["figures"] == {"a": 1, "b": 2}
    assert bench.NOT_MEASURED in page.rendered(PAGE, {"fast": {}})


def test_the_parts_of_the_gpu_share_the_time(monkeypatch):
    """A part that fails is recorded, and the next one runs with the time that is left."""
    gpu, limits = bench.load_benchmark("gpu"), []

    def measured(name, settings, seconds, preload):
        limits.append(seconds)
        time[0] += 10
        if name == "train_step":
            raise RuntimeError("out of memory")
        return {"x": 1}

    time = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: time[0])
    monkeypatch.setattr(gpu.bench, "run_benchmark_in_subprocess", measured)
    monkeypatch.setattr(
        gpu.bench, "load_benchmark", lambda name: SimpleNamespace(table=lambda f: f"{f}")
    )
    monkeypatch.setattr(gpu.os, "environ", {})
    monkeypatch.setattr(gpu, "PARTS", gpu.PARTS[:4])  # shares of 80, 30, 160 and 60
    steps = gpu.run(smoke=1, seconds=330)
    assert [len(next(steps)["parts"]) for _ in range(3)] == [1, 2, 3]
    figures = next(steps)
    assert limits == [80, 320 * 30 / 250, 310 * 160 / 220, 300]
    assert "images=2 turns=1 compiled=0 remat=none`, 10 s):\n\nNot measured. out of memory" in (
        text := gpu.table(figures)
    )
    assert text.endswith("{'x': 1}")
    with pytest.raises(UserError, match=r"not measured \(bench gpu\): Training step: see"):
        next(steps)
    with pytest.raises(bench.Missing, match="no GPU is attached"):
        next(gpu.run())


@pytest.mark.slow
def test_a_benchmark_in_a_process_of_its_own():
    with pytest.raises(RuntimeError, match=r"^UserError: floors.side is 3: make it at least 4$"):
        bench.run_benchmark_in_subprocess("floors", ["floors.side=3"], 300)
    with pytest.raises(RuntimeError, match="stopped after 0 s"):
        bench.run_benchmark_in_subprocess("floors", [], 0.01)


def test_the_script_for_a_gpu_names_its_use(tmp_path):
    script = shipped("benchmarks") / "gpu.sh"
    for arguments in (["--smok"], ["--smoke", "a", "b"]):
        done = subprocess.run([script, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and "usage: benchmarks/gpu.sh" in done.stderr


def test_the_figures_of_performance_md_are_the_measured_ones():
    """Its tables are those that the records beside it give, to the digit."""
    page = bench.Page(shipped("docs") / "performance.md")
    records, text = page.records(), page.path.read_text()
    page.check(bench.benchmarks())
    assert re.findall("<!-- bench (.*?) -->", text) and records.keys() == bench.benchmarks().keys()
    assert page.rendered(text, records) == text


def test_the_commands_of_performance_md_are_those_there_are():
    text = (shipped("docs") / "performance.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^emu-jax bench (.*?)(?: *#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = command.split()
        settings = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
        names = [word for word in itertools.takewhile(lambda w: not w.startswith("-"), words)]
        bench._settings(settings, {name: bench.load_benchmark(name) for name in names})


def test_every_benchmark_says_what_it_measures():
    paths = bench.benchmarks()
    assert shipped("benchmarks").name == "benchmarks" and "data" in paths
    for path in paths.values():
        assert bench.about(path).endswith("."), path
        functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        run = [function for function in functions if function.name == "run"]
        assert len(run) == 1 and run[0].returns, path
        assert ast.unparse(run[0].returns) in RESULTS, path
        assert len(run[0].args.args) == len(run[0].args.defaults), path


def tiny(rows: int = 1) -> TrainConfig:
    """Every tower, at a size for seconds."""
    model = digits()
    assert model.cformer is not None
    cformer = dataclasses.replace(model.cformer, normalize=False, dropout=0.1)
    llama = dataclasses.replace(model.llama, layers=2)
    vision = dataclasses.replace(model.vision, layers=2)
    model = dataclasses.replace(
        model, vision=vision, cformer=cformer, llama=llama, unet=None, vae=None
    )
    data = DataConfig(batch_size=rows, row_tokens=48, row_images=3, n_causal=4, image_size=32)
    return pretraining("tiny", model, data=data, dtype="float32")


@pytest.mark.slow
def test_the_step_and_its_twin_in_pytorch(monkeypatch):
    """From the same weights the same loss and gradients; then both are timed."""
    torch = pytest.importorskip("torch")
    step = bench.load_benchmark("train_step")
    cfg = tiny(rows=2)
    assert cfg.model.cformer is not None
    still = dataclasses.replace(cfg.model.cformer, dropout=0.0)
    quiet = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, cformer=still))
    batch = step.documents(quiet)
    assert batch["text_loss_mask"].sum() == 2 * (48 - 3 * 6)
    ours, theirs = step.Ours(quiet, batch), step.Theirs(torch, quiet, batch)
    theirs.take(ours.weights(), quiet.model)
    loss = theirs.model(**theirs.batch)
    loss.backward()
    with ours.settings():
        (value, _), grads = jax.jit(ours.trainer.gradients)(ours.state, ours.batch)
    assert float(value) == pytest.approx(loss.item(), rel=1e-6)
    expected = step.translated(jax.tree.map(np.asarray, grads), quiet.model)
    largest = max(float(p.grad.abs().max()) for p in theirs.model.parameters())
    for name, parameter in theirs.model.named_parameters():
        assert np.abs(expected[name] - parameter.grad.numpy()).max() < 1e-5 * largest, name

    monkeypatch.setattr(step.floors, "peak", lambda dtype: lambda: 1e9)
    figures = step.measure(cfg, 2, ["eager"])
    assert figures["loss_difference"] < 1e-6
    assert figures["ours_over_eager"]["median"] > 0 and figures["ours_of_peak"]["median"] > 0
    assert "compiled" not in step.table(figures) and "PyTorch, eager" in step.table(figures)


def test_floors(monkeypatch):
    floors = bench.load_benchmark("floors")
    monkeypatch.setattr(floors, "SECONDS", 0.002)
    figures = floors.run(side=64)
    assert figures["float32_peak_flops"]["median"] > 1e7
    assert figures["copy_peak_bytes"]["median"] > 1e7
    assert floors.table(figures).count("GFLOP/s") == 2


@pytest.mark.slow
def test_scaling_over_devices(monkeypatch, tmp_path):
    """Over 1 and 2 of the CPU devices, which is the mechanism alone; and a sweep behind it."""
    scaling = bench.load_benchmark("scaling")
    monkeypatch.setattr(scaling.step, "settings", lambda config, rows, *_: tiny(rows))
    figures = scaling.run(devices=2, turns=2)
    points = {(p["curve"], p["devices"]): p for p in figures["points"]}
    assert [p["rows"] for p in points.values()] == [1, 2, 2, 2]
    assert points["weak", 2]["seconds"] == points["strong", 2]["seconds"]  # measured once
    assert points["weak", 1]["efficiency"] == points["strong", 1]["efficiency"] == 1
    assert "No prediction" in scaling.table(figures)

    report = {
        "fits": True,
        "curve": "weak",
        "topology": "v5e:4x4",
        "slices": 1,
        "devices": 2,
        "tokens_per_second": 1e5,
        "tokens_per_second_overlap": 2e5,
        "rows": 2,
        "model_flops": 2e9,
        "remat": {"llama": "dots"},
    }
    strong = report | {"curve": "strong", "devices": 1}
    path = tmp_path / "sweep.json"
    path.write_text(
        json.dumps(
            [
                report,
                strong,
                report | {"fits": False},
                report | {"curve": ""},
                report | {"devices": 1},
                strong | {"rows": 4, "model_flops": 4e9},
            ]
        )
    )
    figures["predicted"] = scaling.predictions(path, "v5e", 1e9, 1, 2, "dots")
    assert [(p["curve"], p["devices"]) for p in figures["predicted"]] == [
        ("weak", 2),
        ("strong", 1),
    ]
    rows = [line.split(" | ")[-1] for line in scaling.table(figures).splitlines()[2:6]]
    assert rows == ["- |", "100,000 to 200,000 |", "100,000 to 200,000 |", "- |"]
    scaling.plot(figures, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    for chip, row_flops in (("v6e", 1e9), ("v5e", 2e9)):
        with pytest.raises(UserError, match=f"no curve of {chip} for this model"):
            scaling.predictions(path, chip, row_flops, 1, 2, "dots")
    with pytest.raises(UserError, match="or rows=2, remat=dots"):
        scaling.predictions(path, "v5e", 1e9, 1, 2, "full")


@pytest.mark.slow
def test_scaling_leaves_out_what_does_not_fit(monkeypatch):
    scaling = bench.load_benchmark("scaling")
    with pytest.raises(UserError, match="least is 3, devices 2"):
        scaling.run(least=3, devices=2)
    with pytest.raises(UserError, match="devices 99"):
        scaling.run(devices=99)
    assert [scaling.counts(*pair) for pair in ((1, 1), (1, 6), (4, 24))] == [
        [1],
        [1, 2, 4, 6],
        [4, 8, 16, 24],
    ]

    def timed(cfg, devices, turns):
        if cfg.data.batch_size > 2 * devices:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return [1.0] * turns

    monkeypatch.setattr(scaling, "timed", timed)
    points = scaling.measure(tiny, [2, 4, 8], 1, 2)
    assert [(p["curve"], p["devices"], p["efficiency"]) for p in points] == [
        ("weak", 2, 1),
        ("weak", 4, 1),
        ("strong", 4, 1),
        ("weak", 8, 1),
        ("strong", 8, 0.5),
    ]
    with pytest.raises(UserError, match="nothing fits"):
        scaling.measure(tiny, [1], 4, 2)


def test_scaling_of_a_lone_cpu_device_is_measured_apart(monkeypatch):
    scaling = bench.load_benchmark("scaling")
    monkeypatch.setattr(scaling.jax, "devices", lambda: ["cpu:0"])
    monkeypatch.setattr(bench, "cores", lambda: 2)
    code = "import json, os, sys; print('words'); print(json.dumps({'scaling': "
    code += "{'words': sys.argv[1:], 'was': os.environ['XLA_FLAGS']}}))"
    run = scaling.subprocess.run
    monkeypatch.setattr(
        scaling.subprocess,
        "run",
        lambda command, **how: run([command[0], "-c", code, *command[3:]], **how),
    )
    figures = scaling.run(turns=3)
    assert figures["was"].endswith(scaling.CPU_FLAGS) and figures["flags"] == scaling.CPU_FLAGS
    assert {"--set=scaling.turns=3", "--set=scaling.devices=2"} <= set(figures["words"])
    code = "raise SystemExit(2)"
    with pytest.raises(UserError, match="scaling: the process with several CPU devices failed"):
        scaling.run()


@pytest.mark.slow
@pytest.mark.alone
def test_the_pipeline_keeps_up_with_decoding():
    figures = bench.run(["data"])["data"]
    assert 75_000 < figures["image_bytes"] < 92_000
    assert figures["full_over_raw"]["median"] >= 0.85
    assert figures["fast_over_raw"]["median"] >= 2.0


def test_low_precision_is_compared_seed_by_seed(monkeypatch, tmp_path):
    """Each variant is recorded as soon as it is trained, and compared with float32 of its seed."""
    low = bench.load_benchmark("low_precision")
    monkeypatch.setattr(low, "VARIANTS", {n: low.VARIANTS[n] for n in (low.BASE, "int8 moments")})
    last = iter([2.0, 2.02, 4.0, 3.96])
    trained = []

    def train(cfg, folder):
        trained.append((cfg.optimizer.moments_dtype, cfg.seed, folder))
        folder.mkdir(parents=True)
        losses = {cfg.eval[0].every: 8.0, cfg.steps: next(last)}
        rows = [
            {"stage": cfg.name, "evaluation": "heldout", "step": step, "time": 0, "loss": loss}
            for step, loss in losses.items()
        ]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(low, "train", train)
    figures = []
    for update in low.run(steps=6, seeds=2, points=2, workdir=str(tmp_path / "runs")):
        figures.append(json.loads(json.dumps(update)))
        low.table(figures[-1])
    assert [t[:2] for t in trained] == [("float32", 0), ("int8", 0), ("float32", 1), ("int8", 1)]
    assert len({folder for *_, folder in trained}) == 4
    assert [sorted(f["variants"]) for f in figures[:2]] == [
        ["float32"],
        ["float32", "int8 moments"],
    ]
    assert figures[-1]["steps"] == [3, 6]
    # In the third the second seed of the variant is missing.
    expected = ("2.0200 | +1.00% | +1.00%", "2.0200 | +1.00% | +1.00%", "2.9900 | +0.00% | ")
    for update, cells in zip(figures[1:], expected, strict=True):
        (row,) = [line for line in low.table(update).splitlines() if "int8" in line]
        assert row.startswith(f"| int8 moments | {cells}") and "| +0.5% | 2.54 |" in row
    low.plot(figures[2], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="steps is 5 and points 2: make steps a multiple"):
        next(low.run(steps=5, points=2))
    with pytest.raises(UserError, match="no config 'emu_10m'; did you mean 'emu_100m'"):
        next(low.run(config="emu_10m"))


def test_low_precision_of_a_larger_model_keeps_its_layers():
    low = bench.load_benchmark("low_precision")
    changes = low.VARIANTS["int8 matmuls"]
    cfg = low.settings("emu_100m", Path("data"), 500, 0, 10, **changes)
    ladder = emu_ladder("0.1B")
    assert cfg.model.llama == dataclasses.replace(ladder.llama, vocab_size=350)
    assert cfg.model.cformer == ladder.cformer and cfg.model.vision.layers == ladder.vision.layers
    parameters, size = low.sizes(cfg)
    assert 69e6 < parameters < 71e6 and size == pytest.approx(8, abs=1e-3)


@pytest.mark.slow
def test_low_precision_trains_only_what_is_missing(monkeypatch, tmp_path):
    low = bench.load_benchmark("low_precision")
    monkeypatch.setattr(low, "VARIANTS", {n: low.VARIANTS[n] for n in (low.BASE, "int8 moments")})
    train, reports = low.train, []
    monkeypatch.setattr(low, "train", lambda *args: reports.append(train(*args)))
    settings = {"steps": 2, "seeds": 1, "points": 2, "workdir": str(tmp_path)}
    next(low.run(**settings))  # is cut off after the first variant
    *_, figures = low.run(**settings)
    assert [report.seconds > 0 for report in reports] == [True, False, True]
    base, variant = (values["heldout_losses"] for values in figures["variants"].values())
    assert base != variant and np.shape(base) == np.shape(variant) == (1, 2)
    assert np.abs(low.relative(figures, "int8 moments")).max() < 0.01
