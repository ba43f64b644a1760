"""Sources -> documents -> packed rows -> batches.

documents.py  what a record holds, what a source is, and ArrayRecord files
sources.py    `SourceConfig`: every format that documents may come in
  pairs.py      WebDataset tars, TensorFlow Datasets
  pages.py      MMC4, OBELICS
  videos.py     with captions, or with subtitles
  dialogues.py  instructions and answers
  listings.py   the JSON entries and named files that the last three read
  formats.py    compressed listings, and formats that are named
  tars.py, video.py, storage.py  archives, moving pictures, local and remote files
  index.py      what is found in files once and kept
build.py      raw data to ArrayRecord files, filtered by clean.py; inspect.py, a page about them
outlines.py   how long documents are, counted once
packing.py    what is kept of a document, and which row it goes to
mixture.py    sources in an endless order, planned without reading a picture
filling.py    documents into arrays: read, tokenised, decoded
images.py     the release's preprocessing, and augmentation
pipeline.py   `Batches`, what training reads; config.py, its `DataConfig`
digits.py     scikit-learn's handwritten digits as documents
latents.py    conditions and latents of the decoder, computed once
"""

from emu_jax.data.documents import Document, Picture, Text
from emu_jax.data.pipeline import Batches, DataConfig

__all__ = ["Batches", "DataConfig", "Document", "Picture", "Text"]
