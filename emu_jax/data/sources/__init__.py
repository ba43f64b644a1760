"""Readers of documents in place, one for each supported format.

open.py       `SourceConfig`, and the table of formats
pairs.py      WebDataset tars, TensorFlow Datasets
pages.py      MMC4, OBELICS
videos.py     videos with captions, or with subtitles
dialogues.py  instructions and answers
entries.py    entries of listings in JSON; parquet.py, in Parquet
listings.py   media files that the entries of the three above name; urls.py, by URL
formats.py    compressed listings, and detection of unsupported formats
video.py      decoding of videos: frames, subtitle tracks, storyboards
cues.py       subtitle files as cues
folders.py    files found by name in subfolders
tars.py       members of tars, found by name
index.py      cached, memory-mapped indexes
spans.py      compact positions of the members of samples
"""

from emu_jax.data.sources.open import FORMATS, SourceConfig, find_files, open_source

__all__ = ["FORMATS", "SourceConfig", "find_files", "open_source"]
