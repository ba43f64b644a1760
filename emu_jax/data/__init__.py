"""Sources -> documents -> packed rows -> batches.

documents.py  documents, the interface of a source, and ArrayRecord files
sources/      readers of documents, one for each format: `SourceConfig`
storage.py    local and remote files; file_cache.py, local copies of remote ones within a bound
records.py    ArrayRecord files in object stores
unused.py     counts of the used and unused parts of a source
build/        raw data to filtered ArrayRecord files; indexes made in parallel
inspect.py    a page about the training data
lengths.py    tokens and images of each document, counted once
known_lengths.py  those that `data build` stored beside its shards
packing.py    truncation and packing of documents into rows
mixture.py    sources mixed into an endless order, planned without reading an image
permutation.py  the order of billions of documents, computed by number
preview.py    the sources of a run before it starts: what is missing, steps per epoch
batches.py    `BatchBuilder`, one for each kind: reads, tokenizes and decodes documents
images.py     the release's preprocessing, and augmentation
pipeline.py   `Batches`, the iterator that training reads; config.py, its `DataConfig`
digits.py     scikit-learn's handwritten digits as documents
latents.py    precomputed conditions and latents of the decoder

Importing this package imports none of its modules, so decoding processes load neither jax nor
grain.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu_jax.data.config import DataConfig as DataConfig
    from emu_jax.data.documents import Document as Document
    from emu_jax.data.documents import Image as Image
    from emu_jax.data.documents import Text as Text
    from emu_jax.data.pipeline import Batches as Batches

_HOME = {
    "Batches": "emu_jax.data.pipeline",
    "DataConfig": "emu_jax.data.config",
    "Document": "emu_jax.data.documents",
    "Image": "emu_jax.data.documents",
    "Text": "emu_jax.data.documents",
}
__all__ = ["Batches", "DataConfig", "Document", "Image", "Text"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'emu_jax.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
