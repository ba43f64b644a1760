"""Sources -> documents -> packed rows -> batches.

documents.py  what a record holds, and ArrayRecord files of them
images.py     the release's preprocessing, and augmentation
packing.py    documents into rows of fixed size
pipeline.py   `DataConfig` and `Batches`: what training reads
digits.py     scikit-learn's handwritten digits as documents
"""

from emu_jax.data.documents import Document, Picture, Text
from emu_jax.data.pipeline import Batches, DataConfig

__all__ = ["Batches", "DataConfig", "Document", "Picture", "Text"]
