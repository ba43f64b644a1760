"""Where documents come from: a source for each format that teams keep their data in."""

from __future__ import annotations

import dataclasses
import glob

from emu_jax.config import UserError, suggest
from emu_jax.data.documents import DocumentFiles, Source


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    name: str = ""  # in messages, metrics and the list of documents; no two alike
    format: str = "records"  # see FORMATS
    paths: tuple[str, ...] = ()  # files or folders; `*` stands for anything in a name
    # Of sources that are packed together, the share of documents; see `DataConfig.sources`.
    weight: float = 1.0


FORMATS = {
    "records": lambda cfg, paths: DocumentFiles(paths),
}


def open_source(cfg: SourceConfig) -> Source:
    """The source that `cfg` describes.

    Raises:
        UserError: an unknown format, or nothing is there.
    """
    if cfg.format not in FORMATS:
        close = suggest(cfg.format, FORMATS)
        raise UserError(f"source {cfg.name!r}: unknown format {cfg.format!r}{close}")
    paths = [p for pattern in cfg.paths for p in sorted(glob.glob(pattern)) or [pattern]]
    return FORMATS[cfg.format](cfg, paths)
