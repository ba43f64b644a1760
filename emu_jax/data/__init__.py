"""Sources -> documents -> packed rows -> batches.

documents.py  what a record holds, what a source is, and ArrayRecord files
sources.py    `SourceConfig`: every format that documents may come in
  pairs.py      WebDataset tars, TensorFlow Datasets
  pages.py      MMC4, OBELICS
  videos.py     with captions, or with subtitles
  dialogues.py  instructions and answers
  listings.py   the JSON entries and named files that the three read; tars.py, video.py,
  index.py      what is found in files once and kept; storage.py, local and remote files
images.py     the release's preprocessing, and augmentation
packing.py    documents into rows of fixed size
pipeline.py   `DataConfig` and `Batches`: what training reads
digits.py     scikit-learn's handwritten digits as documents
"""

from emu_jax.data.documents import Document, Picture, Text
from emu_jax.data.pipeline import Batches, DataConfig

__all__ = ["Batches", "DataConfig", "Document", "Picture", "Text"]
