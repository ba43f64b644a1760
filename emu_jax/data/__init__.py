"""Sources -> documents -> packed rows -> batches.

documents.py  what a record holds, what a source is, and ArrayRecord files
sources.py    `SourceConfig`: every format that documents may come in
  pairs.py      WebDataset tars, TensorFlow Datasets
  pages.py      MMC4, OBELICS
  videos.py     with captions, or with subtitles
  dialogues.py  instructions and answers
  listings.py   the JSON entries and named files that the last three read
  formats.py    compressed listings, and formats that are named
  cues.py       subtitle files as cues
  folders.py    files found by name in sub-folders
  tars.py, video.py, storage.py  archives, video, local and remote files
  index.py      arrays derived from files once and kept beside them
  unused.py     counts of what a source holds and what is used of it
build.py      raw data to ArrayRecord files, filtered by clean.py; inspect.py, a page about them
outlines.py   how long documents are, counted once
packing.py    what is kept of a document, and which row it goes to
mixture.py    sources in an endless order, planned without reading an image
filling.py    documents into arrays: read, tokenised, decoded
images.py     the release's preprocessing, and augmentation
pipeline.py   `Batches`, what training reads; config.py, its `DataConfig`
digits.py     scikit-learn's handwritten digits as documents
latents.py    conditions and latents of the decoder, computed once
"""

from emu_jax.data.documents import Document, Picture, Text
from emu_jax.data.pipeline import Batches, DataConfig

__all__ = ["Batches", "DataConfig", "Document", "Picture", "Text"]
