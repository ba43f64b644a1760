"""The shape of the package: imports run one way, a light `import emu_jax`, the README's map."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "emu_jax"

# A room may import those of its own line and of the lines above it; rooms of one line may
# not import each other in a circle.
LEVELS = [
    {
        "config",
        "errors",
        "hardware",
        "host_memory",
        "hub",
        "markdown",
        "page",
        "progress",
        "sharding",
        "storage",
        "tokenizer",
    },
    {"models"},
    {"diffusion", "data", "convert", "checkpoint", "integrity"},
    {"train", "generate"},
    {"demo", "evaluate", "plan", "publish", "serve", "bench", "verify"},
    {"__init__", "cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Public names that several modules define on purpose.
SHARED_NAMES = {
    "log": "each module's logger",
    "T": "a type variable",
    "main": "the entry point of a script",
    "score": "each scorer's function",
    **dict.fromkeys(
        ["convert", "init", "plan", "precompute", "push", "serve", "train", "verify"],
        "a verb of cli.py, and the function that it calls",
    ),
    **dict.fromkeys(
        [
            "attention",
            "cross_entropy",
            "decoding_layers",
            "empty_cache",
            "gelu",
            "guided_denoiser",
            "layer_norm",
            "low_precision_dot",
            "matmul",
            "order_exchanges",
            "rms_norm",
            "rotate_pairs",
            "top_k",
            "upsampled_convolution",
            "wait_for",
        ],
        "a kernel of each backend: models/cpu.py, models/tpu.py and models/xla.py",
    ),
}
HEAVY = ("torch", "tensorflow", "diffusers", "transformers")


def top_level() -> set[str]:
    """Entries of the package's folder: `config.py` as config.py, a folder as models/."""
    files = {p.name for p in PACKAGE.glob("*.py")}
    folders = {f"{p.name}/" for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    return files | folders


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import, wherever it stands; `from a import b` is
    a.b. `module` is the dotted name of the package that holds the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def package_imports() -> Iterator[tuple[str, str, str]]:
    """(where, room, imported name) over the whole package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        module = ".".join(["emu_jax", *relative.parts[:-1]])
        room = relative.parts[0].removesuffix(".py")
        for line, name in imports(path.read_text(), module):
            yield f"emu_jax/{relative}:{line}", room, name


def imported_room(name: str) -> str | None:
    """The room that `emu_jax.x.y` lies in; __init__ for what the package itself exports."""
    parts = name.split(".")
    if parts[0] != "emu_jax":
        return None
    rooms = {entry.removesuffix(".py").rstrip("/") for entry in top_level()}
    return parts[1] if len(parts) > 1 and parts[1] in rooms else "__init__"


def test_every_room_has_a_level():
    rooms = {entry.removesuffix(".py").rstrip("/") for entry in top_level()}
    assert rooms <= LEVEL.keys()


def test_imports_run_one_way():
    upward, graph = [], {}
    for where, room, name in package_imports():
        other = imported_room(name)
        if other is None or other == room:
            continue
        if LEVEL[other] > LEVEL[room]:
            upward.append(f"{where}: {room} imports {other}")
        if "__init__" not in (room, other):
            graph.setdefault(room, set()).add(other)
    assert not upward, "\n".join(upward)
    assert len(graph) > 3
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_walk_sees_every_form_of_import():
    source = "import emu_jax.train.loop\ndef f():\n from emu_jax import cli\n from ..data import x"
    names = [name for _, name in imports(source, "emu_jax.models")]
    assert [imported_room(name) for name in names] == ["train", "cli", "data"]
    assert imported_room("emu_jax.load") == "__init__"


def public_names(source: str) -> set[str]:
    """The classes, functions, constants and type aliases that a module defines."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = (n for target in targets for n in ast.walk(target))
            names |= {n.id for n in found if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_no_public_name_is_defined_twice():
    modules: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in public_names(path.read_text()):
            modules.setdefault(name, []).append(path.relative_to(PACKAGE).as_posix())
    twice = {name: files for name, files in modules.items() if len(files) > 1}
    assert {name: twice[name] for name in twice.keys() - SHARED_NAMES.keys()} == {}
    assert twice.keys() == SHARED_NAMES.keys()  # no exemption is out of date
    source = "a: int = 1\nb, c = d = 2\nclass E: f = 1\ndef g(): h = 1\n_i = 3"
    assert public_names(source) == set("abcdEg")


def test_one_module_asks_for_the_platform():
    """Whoever else needs to know calls `models.backend`."""
    asks = re.compile(r"default_backend|platform\(\) ?==")
    files = {f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*.py")}
    assert {f for f in files if asks.search((PACKAGE / f).read_text())} == {"models/backend.py"}


def test_torch_only_in_convert():
    """The other libraries that weigh as much are imported where they are used, not at the top."""
    torch = [
        where
        for where, room, name in package_imports()
        if name.split(".")[0] in ("torch", "peft") and room != "convert"
    ]
    assert not torch
    for path in PACKAGE.rglob("*.py"):
        body = ast.Module(ast.parse(path.read_text()).body, [])
        for node in body.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {name.split(".")[0] for _, name in imports(ast.unparse(node), "emu_jax")}
                assert not names & set(HEAVY), f"{path}:{node.lineno}"


def loaded_by(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import emu_jax",
        "import emu_jax; [getattr(emu_jax, name) for name in emu_jax.__all__]",
        "import emu_jax.cli, emu_jax.train.loop, emu_jax.demo.demo",
    ],
)
def test_imports_load_no_other_framework(code):
    loaded = loaded_by(code)
    assert "emu_jax" in loaded
    assert not loaded & set(HEAVY)


def test_import_is_light():
    assert not loaded_by("import emu_jax, emu_jax.cli") & {"jax", "flax", "numpy", "PIL"}


def test_a_worker_of_data_build_loads_no_jax():
    """Every decoding process would spend seconds and memory on it."""
    loaded = loaded_by("import emu_jax.data.build.build, emu_jax.data.sources")
    assert {"numpy", "PIL", "array_record"} <= loaded
    assert not loaded & {"jax", "flax", "grain"}


def test_unknown_name_is_an_attribute_error():
    import emu_jax

    with pytest.raises(AttributeError, match="lod"):
        emu_jax.lod  # noqa: B018
    assert dir(emu_jax) == sorted([*emu_jax.__all__, "__version__"])


def test_exports_are_the_documented_ones():
    """Documented in docs/api.md and in the package's docstring."""
    import emu_jax

    page = (ROOT / "docs" / "api.md").read_text()
    table = re.findall(r"^\| `emu_jax\.(\w+)` \|", page, re.MULTILINE)
    assert sorted(table) == sorted(emu_jax.__all__)
    assert emu_jax.__doc__
    assert set(emu_jax.__all__) <= set(re.findall(r"\w+", emu_jax.__doc__))


def test_readme_maps_the_package():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^emu_jax/\n((?:  .+\n)+)", text, re.MULTILINE)
    assert block, "README.md has no map of emu_jax/"
    lines = [line.split(maxsplit=1) for line in block[1].splitlines()]
    assert all(len(line) == 2 for line in lines)
    mapped = [name for name, _ in lines]
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == top_level() - {"__init__.py", "__main__.py"}
    order = [LEVEL[name.removesuffix(".py").rstrip("/")] for name in mapped]
    assert order == sorted(order)
