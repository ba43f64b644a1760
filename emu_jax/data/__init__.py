"""Sources -> documents -> packed rows -> batches.

documents.py  documents, the interface of a source, and ArrayRecord files
sources/      readers of documents, one for each format: `SourceConfig`
storage.py    local and remote files
unused.py     counts of the used and unused parts of a source
build/        raw data to filtered ArrayRecord files
inspect.py    a page about the training data
lengths.py    tokens and images of each document, counted once
packing.py    truncation and packing of documents into rows
mixture.py    sources mixed into an endless order, planned without reading an image
batches.py    `BatchBuilder`, one for each kind: reads, tokenizes and decodes documents
images.py     the release's preprocessing, and augmentation
pipeline.py   `Batches`, the iterator that training reads; config.py, its `DataConfig`
digits.py     scikit-learn's handwritten digits as documents
latents.py    precomputed conditions and latents of the decoder
"""

from emu_jax.data.documents import Document, Image, Text
from emu_jax.data.pipeline import Batches, DataConfig

__all__ = ["Batches", "DataConfig", "Document", "Image", "Text"]
