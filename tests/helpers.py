"""Functions that several test files share."""

import contextlib
from pathlib import Path
from unittest import mock

from emu_jax.models import backend
from emu_jax.train.telemetry.metrics import DOCUMENTS_FILE
from emu_jax.train.telemetry.rows import read_rows


@contextlib.contextmanager
def kernels_of(name: str):
    """Makes programs traced in this context use the kernels of `cpu`, `tpu` or `xla`."""
    with (
        mock.patch.object(backend, "on_cpu", lambda: name == "cpu"),
        mock.patch.object(backend, "platform", lambda: name),
    ):
        yield


def read_documents(workdir: Path) -> dict[int, list[tuple[str, int]]]:
    """Returns {step: [(source, index)]} of the documents that all processes read, unordered."""
    steps: dict[int, list[tuple[str, int]]] = {}
    for path in sorted(workdir.glob(DOCUMENTS_FILE.format("*"))):
        for row in read_rows(path, lambda row: "documents" in row):
            steps.setdefault(row["step"], []).extend(map(tuple, row["documents"]))
    return steps
