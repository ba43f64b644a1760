"""Set-up of all tests: a compilation cache, 8 CPU devices, strict warnings."""

import dataclasses
import fcntl
import functools
import gc
import importlib.metadata
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# An unblocked loop of collectives over more devices than cores can deadlock.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
# XLA flags of tests that need no optimized programs: compiling is most of their work.
UNOPTIMIZED = LEVEL_0 = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # jaxlib 0.12 refuses the first flag
    # The older emitters of fused loops, and one LLVM module: half of the processor time to compile
    # the programs of test_attention.py and test_platforms.py.
    UNOPTIMIZED += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
flags = os.environ.get("XLA_FLAGS", "")
if UNOPTIMIZED not in flags:  # as in processes that tests start
    flags = flags.replace(LEVEL_0, UNOPTIMIZED)
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = flags.strip()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from stores import _stores, gcs, s3, store  # noqa: E402, F401

if os.environ.get("EMU_JAX_CHECK_SHAPES", "1") != "0":  # before any test imports the package
    install_import_hook("emu_jax", "shape_checks.check")

# The release's weights are torch files; torch is installed for Python 3.11 alone.
TORCH = ("backbones", "convert", "generate", "golden", "training_oracle", "verify")
MARKS = ("slow", "optimized", "alone")
# Files that take longest, the longest first: those of the slow tests, then others of `make test`.
LONGEST = (
    "test_train.py",
    "test_restarts.py",
    "test_convert.py",
    "test_finetune.py",
    "test_generate.py",
    "test_eval.py",
    "test_held_out.py",
    "test_faults.py",
    "test_page.py",
    "test_plan.py",
    "test_launch.py",
    "test_decoder.py",
    "test_random_keys.py",
    "test_platforms.py",
    "test_data.py",
    "test_mixture.py",
    "test_training_oracle.py",
    "test_attention.py",
    "test_training.py",
    "test_emu2_generate.py",
    "test_low_precision.py",
)
collect_ignore = []
if importlib.util.find_spec("torch") is None:
    collect_ignore = [f"test_{name}.py" for name in TORCH]


def pytest_report_header():
    return f"left out, since torch is missing: {collect_ignore}" if collect_ignore else None


@functools.cache
def marks_in(path: Path) -> set[str]:
    """Returns which of MARKS a test file names."""
    text = path.read_text()
    return {name for name in MARKS if f"mark.{name}" in text}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out files that lack a mark required by `-m "A and B"`: they need not be imported."""
    if collection_path.suffix != ".py" or " or " in config.option.markexpr:
        return None
    required = {term for term in config.option.markexpr.split(" and ") if term in MARKS}
    return True if required - marks_in(collection_path) else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Makes garbage collections few: at their usual rate they take an eighth of the time to trace.

    None while modules are imported, and what is there by then is not searched later.
    """
    gc.disable()
    result = yield
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Checks marks before -m removes tests, and puts long files first afterwards.

    With `--no-loadscope-reorder`, files start in this order. If a long file started last, all
    workers but one would wait for it. Files that are not listed follow by their number of tests.
    """
    for item in items:
        for mark in item.iter_markers():
            if mark.name in MARKS and mark.name not in marks_in(item.path):
                raise pytest.UsageError(
                    f"mark {mark.name} comes from another file ({item.nodeid}): name it in the "
                    "file of the test, or -m leaves the test out"
                )
    yield
    tests = Counter(item.path for item in items)

    def order(item: pytest.Item) -> tuple[int, int]:
        name = item.path.name
        place = LONGEST.index(name) if name in LONGEST else len(LONGEST)
        return place, -tests[item.path]

    items.sort(key=order)


GOLDEN = Path(__file__).parent / "golden" / "tiny"


@pytest.fixture(scope="session")
def golden():
    """Recorded outputs of the released code (tests/golden/README.md)."""
    return np.load(GOLDEN / "expected.npz")


@pytest.fixture(scope="session")
def copy_digits(tmp_path_factory) -> Callable[[Path], Path]:
    """Copies the embedded digits, which are built once for all workers, into a folder."""
    from emu_jax.data.digits import build_digits

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with open(shared / "digits.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_digits(shared / "digits")
    return lambda folder: shutil.copytree(shared / "digits", folder, dirs_exist_ok=True)


def as_emu2(model):
    """The config of an Emu1 with what Emu2 has instead: another encoder, connector and decoder."""
    from emu_jax.config import PoolingConfig

    levels, width = len(model.unet.block_out_channels), model.vision.width
    heads = model.unet.attention_head_dim
    unet = dataclasses.replace(
        model.unet,
        attention_head_dim=tuple(heads * 2 ** (n % 2) for n in range(levels)),
        transformer_layers_per_block=tuple(1 + n % 2 for n in range(levels)),
        use_linear_projection=True,
        cross_attention_dim=width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width + 48,
    )
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, post_norm=True, final_norm=False),
        cformer=None,
        pooling=PoolingConfig(n_embeddings=4, n_frame=4),
        llama=dataclasses.replace(model.llama, regression_head=False),
        unet=unet,
        scheduler=dataclasses.replace(model.scheduler, sampler="euler"),
    )


def random_parameters(template) -> dict:
    """Returns random parameters for an `AbstractModel`. They compile nothing, unlike its own
    initializers."""
    import jax

    rng = np.random.default_rng(0)
    found = {}
    for path, shape in template.shapes.items():
        value = 0.05 * rng.normal(size=shape.shape) + path.endswith(".scale")
        found[path] = jax.device_put(value.astype(shape.dtype), shape.sharding)
    return found


def relative_error(ours, theirs) -> float:
    """max |a - b| / max |b|, the golden files' measure."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
