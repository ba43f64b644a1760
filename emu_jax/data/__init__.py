"""Sources -> documents -> packed rows -> batches.

documents.py  documents, the interface of a source, and ArrayRecord files
sources.py    `SourceConfig`: the supported formats
  pairs.py      WebDataset tars, TensorFlow Datasets
  pages.py      MMC4, OBELICS
  videos.py     with captions, or with subtitles
  dialogues.py  instructions and answers
  listings.py   JSON entries and the media files that they name, for the three above
  formats.py    compressed listings, and detection of unsupported formats
  cues.py       subtitle files as cues
  folders.py    files found by name in subfolders
  tars.py, video.py, storage.py  archives, videos, local and remote files
  index.py      cached, memory-mapped indexes
  unused.py     counts of the used and unused parts of a source
build.py      raw data to ArrayRecord files, filtered by clean.py; inspect.py, a page about them
outlines.py   lengths of documents, counted once
packing.py    truncation and packing of documents into rows
mixture.py    sources mixed into an endless order, planned without reading an image
filling.py    fills arrays with documents: reads, tokenizes, decodes
images.py     the release's preprocessing, and augmentation
pipeline.py   `Batches`, the iterator that training reads; config.py, its `DataConfig`
digits.py     scikit-learn's handwritten digits as documents
latents.py    precomputed conditions and latents of the decoder
"""

from emu_jax.data.documents import Document, Image, Text
from emu_jax.data.pipeline import Batches, DataConfig

__all__ = ["Batches", "DataConfig", "Document", "Image", "Text"]
