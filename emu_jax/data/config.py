"""`DataConfig`, the configuration of the training data."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from emu_jax.config import to_dict
from emu_jax.data.file_cache import CACHE_BYTES
from emu_jax.data.sources import SourceConfig
from emu_jax.data.unused import MAY_LACK
from emu_jax.errors import UserError
from emu_jax.storage import as_path
from emu_jax.tokenizer import Family, Tokenizer

Kind = Literal["rows", "captions", "images", "contexts", "views"]
HostBatch = dict[str, np.ndarray]

PAIRS = "pairs"  # kind of documents of one image and its caption


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Selects the documents, and how they become batches.

    Documents come from `sources`. Without sources they come from the ArrayRecord files in
    `root/split`: `KIND.array_record`, or `KIND-*.array_record`, for each kind of `mixture`.

    Sources without sizes of their own are packed together: a row holds documents of all of them,
    sampled in proportion to their weights. A source that sets `batch_size`, `row_tokens` or
    `row_images` has batches of its own. Each step samples one of these groups in proportion to
    weight; the weight of a group is the sum of its sources' weights.
    """

    root: str = "data"
    split: str = "train"
    sources: tuple[SourceConfig, ...] = ()
    # Folder of indexes and token counts, local or gs://; by default beside the sources' files.
    cache: str = ""
    # Bytes of local copies of remote files that cannot be read in place, on each host. The least
    # recently used are evicted and downloaded again.
    cache_bytes: int = CACHE_BYTES
    embedded: str = ""  # "digits": built at `root` if missing
    tokenizer: str = ""  # a folder; by default `root/tokenizer`
    family: str = ""  # "emu2": add the tokens of Emu2, even if the folder does not say so
    instruct: bool = False  # add [USER] and [ASSISTANT] as tokens even if the folder does not
    # Documents are sampled in proportion to these weights, by kind; 0 leaves a kind out.
    mixture: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"pairs": 1.0, "pages": 1.0, "storyboards": 1.0}
    )
    seed: int = 0
    # Fraction of each source's documents, by a hash of their index, that is not trained on.
    holdout: float = 0.0
    held_out: bool = False  # read these documents, rather than the others

    batch_size: int = 128  # rows of a global batch, over all processes
    row_tokens: int = 2048  # T
    row_images: int = 16  # I
    n_causal: int = 32  # N, embeddings of an image
    # Embeddings of a video frame, at `[gIMG]` tokens (64 in Emu2's releases). 0: frames are still
    # images.
    n_frame: int = 0
    image_size: int = 224  # of the visual encoder
    target_size: int = 512  # of the autoencoder

    image_first: float = 0.5  # probability that a pair's image comes before its words
    learn_img: bool = False  # make [IMG] a text target
    last_image: bool = False  # regress only the last image of each document
    drop_condition: float = 0.1  # probability that the decoder's context, or image, is dropped
    autoencode: float = 0.0  # otherwise, probability that the context is the target image

    augment: bool = False
    rotate: float = 15.0  # at most, in degrees, either way
    scale: float = 0.15  # at most, as a fraction, either way
    shift: float = 0.125  # at most, as a fraction of the side, either way

    # Damaged documents are skipped and counted. Training stops when more than this fraction is
    # damaged, after at least 1,000 documents.
    max_damaged_rate: float = 0.05

    block_documents: int = 1024  # documents packed together
    # Rows that share a stream of documents, at most. A process plans the streams of its own rows,
    # so planning costs the same on any number of hosts; 8 suits most runs. 0: one stream for all
    # rows, planned by every process. It decides which documents share a row. A resumed run keeps
    # its own.
    row_group: int = 0
    decode_threads: int = 1  # threads that read and decode documents; 0: one a processor
    fast_decode: bool = False  # decode JPEGs at reduced size: twice as fast, pixels differ
    prefetch: int = 4  # batches made ahead on a thread; 0: make each on demand

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer of the data."""
        folder = self.tokenizer or as_path(self.root) / "tokenizer"
        family = next((known for known in get_args(Family) if known == self.family), None)
        return Tokenizer.load(folder, instruct=self.instruct or None, family=family)

    def batch_sizes(self) -> set[int]:
        """Returns the batch sizes that occur, of any source."""
        return {source.batch_size or self.batch_size for source in self.sources} or {
            self.batch_size
        }

    def stream_rows(self) -> int:
        """Returns the rows of a batch that share a stream: as many as `row_group` if they divide
        the batch evenly, else fewer."""
        most = min(self.row_group, self.batch_size) or self.batch_size
        return next(rows for rows in range(most, 0, -1) if self.batch_size % rows == 0)

    def __post_init__(self) -> None:
        """Validates the config.

        Raises:
            UserError: a value is out of range, or the sources are inconsistent.
        """
        smallest = self.n_causal + 4
        rules: list[tuple[str, bool, str]] = [
            ("family", self.family in ("", *get_args(Family)), "be emu, emu2 or empty"),
            ("seed", 0 <= self.seed < 2**32, "be in 0 .. 2**32 - 1"),
            ("batch_size", self.batch_size >= 1, "be at least 1"),
            ("n_causal", self.n_causal >= 1, "be at least 1"),
            ("n_frame", 0 <= self.n_frame <= self.n_causal, "be in 0 .. n_causal"),
            ("row_tokens", self.row_tokens >= smallest, f"hold one image: at least {smallest}"),
            ("row_images", self.row_images >= 1, "be at least 1"),
            ("block_documents", self.block_documents >= 1, "be at least 1"),
            ("row_group", self.row_group >= 0, "not be negative"),
            ("image_size", self.image_size >= 1, "be at least 1"),
            ("target_size", self.target_size >= 1, "be at least 1"),
            ("image_first", 0 <= self.image_first <= 1, "be in 0 .. 1"),
            ("drop_condition", 0 <= self.drop_condition <= 1, "be in 0 .. 1"),
            ("autoencode", 0 <= self.autoencode <= 1, "be in 0 .. 1"),
            ("holdout", 0 <= self.holdout < 1, "be at least 0 and below 1"),
            ("scale", 0 <= self.scale < 1, "be in 0 .. 1"),
            ("max_damaged_rate", 0 <= self.max_damaged_rate <= 1, "be in 0 .. 1"),
            ("cache_bytes", self.cache_bytes >= 1, "be at least 1"),
            ("decode_threads", self.decode_threads >= 0, "not be negative"),
            ("prefetch", self.prefetch >= 0, "not be negative"),
        ]
        for n, source in enumerate(self.sources):
            where, tokens = f"sources.{n}", source.row_tokens
            rules += [
                (f"{where}.name", bool(source.name), "not be empty"),
                (f"{where}.weight", source.weight >= 0, "not be negative"),
                (f"{where}.batch_size", source.batch_size >= 0, "not be negative"),
                (f"{where}.row_images", source.row_images >= 0, "not be negative"),
                (
                    f"{where}.row_tokens",
                    tokens == 0 or tokens >= smallest,
                    f"hold one image: at least {smallest}",
                ),
                (
                    f"{where}.window_tokens",
                    source.window_tokens == 0 or source.window_tokens >= smallest,
                    f"hold one image: at least {smallest}",
                ),
                (f"{where}.window_images", source.window_images >= 0, "not be negative"),
                (f"{where}.picked_images", source.picked_images >= 0, "not be negative"),
                (f"{where}.frames", source.frames >= 1, "be at least 1"),
                (f"{where}.frame_seconds", source.frame_seconds > 0, "be positive"),
                (
                    f"{where}.allow_missing",
                    set(source.allow_missing) <= set(MAY_LACK),
                    f"name some of {', '.join(MAY_LACK)}",
                ),
            ]
        for name, fine, rule in rules:
            if not fine:
                value: Any = to_dict(self)
                for key in name.split("."):
                    value = value[int(key)] if isinstance(value, list) else value[key]
                raise UserError(f"config key {name!r} must {rule}, not {value!r}")
        for kind, weight in self.mixture.items():
            if weight < 0:
                raise UserError(f"config key 'mixture.{kind}' must not be negative: {weight!r}")
        names = [source.name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two sources are called {twice[0]!r}: give one another name")
        if self.sources and not any(source.weight for source in self.sources):
            raise UserError("config key 'sources' has no positive weight: nothing to read")
