"""What training reads: `DataConfig`, and the shapes of the batches it describes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from emu_jax.config import UserError, to_dict
from emu_jax.data.sources import SourceConfig
from emu_jax.data.unused import MAY_LACK
from emu_jax.tokenizer import Tokenizer

Kind = Literal["rows", "captions", "pictures", "contexts"]
Batch = dict[str, np.ndarray]

PAIRS = "pairs"  # the mixture's documents of one picture and its words


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which documents, and how they become batches.

    Documents come from `sources`, or without any from the ArrayRecord files in `root/split`:
    `KIND.array_record`, or `KIND-*.array_record`, for each kind of `mixture`.

    Sources with no sizes of their own are packed together: rows hold documents of all of them,
    drawn in proportion to their weights. A source that gives one (`batch_size`, `row_tokens`
    or `row_images`) has batches to itself. A step draws from the one or the other in proportion
    to weights, a group's being the sum of its sources'.
    """

    root: str = "data"
    split: str = "train"
    sources: tuple[SourceConfig, ...] = ()
    cache: str = ""  # a folder for what is found in sources once; by default beside their files
    embedded: str = ""  # "digits": made at `root` when it is not there
    tokenizer: str = ""  # a folder; by default `root/tokenizer`
    instruct: bool = False  # [USER] and [ASSISTANT] are tokens, whatever the folder says
    # Documents are drawn in proportion to these weights, by kind; 0 leaves a kind out.
    mixture: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"pairs": 1.0, "pages": 1.0, "storyboards": 1.0}
    )
    seed: int = 0

    batch_size: int = 128  # rows, of all processes together
    row_tokens: int = 2048  # T
    row_images: int = 16  # I
    n_causal: int = 32  # N, embeddings of a picture
    image_size: int = 224  # of the visual encoder
    target_size: int = 512  # of the autoencoder

    picture_first: float = 0.5  # how often a pair's picture comes before its words
    learn_img: bool = False  # score [IMG] as a text target
    drop_condition: float = 0.1  # how often the decoder's context is dropped
    autoencode: float = 0.0  # how often, of the others, it is the picture itself

    augment: bool = False
    rotate: float = 15.0  # degrees, either way
    scale: float = 0.15  # a fraction, either way
    shift: float = 0.125  # a fraction of the side, either way

    # A damaged document is passed over and counted; when more than this share is, of a thousand
    # documents or more, training stops.
    max_damaged_rate: float = 0.05

    block_documents: int = 1024  # packed together
    decode_threads: int = 1  # that read and decode documents; 0: one for each processor
    fast_decode: bool = False  # JPEGs at a fraction of their size: other pixels, twice as fast
    prefetch: int = 4  # batches made ahead, on a thread; 0: each when it is asked for

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that these data are read with."""
        folder = self.tokenizer or Path(self.root) / "tokenizer"
        return Tokenizer.load(folder, instruct=self.instruct or None)

    def batch_sizes(self) -> set[int]:
        """The rows of each batch that there may be."""
        return {source.batch_size or self.batch_size for source in self.sources} or {
            self.batch_size
        }

    def check(self) -> None:
        """
        Raises:
            UserError: a value that means nothing.
        """
        smallest = self.n_causal + 4
        rules: list[tuple[str, bool, str]] = [
            ("seed", 0 <= self.seed < 2**32, "be in 0 .. 2**32 - 1"),
            ("row_tokens", self.row_tokens >= smallest, f"hold one picture: at least {smallest}"),
            ("row_images", self.row_images >= 1, "be at least 1"),
            ("block_documents", self.block_documents >= 1, "be at least 1"),
            ("image_size", self.image_size >= 1, "be at least 1"),
            ("target_size", self.target_size >= 1, "be at least 1"),
            ("picture_first", 0 <= self.picture_first <= 1, "be in 0 .. 1"),
            ("drop_condition", 0 <= self.drop_condition <= 1, "be in 0 .. 1"),
            ("autoencode", 0 <= self.autoencode <= 1, "be in 0 .. 1"),
            ("scale", 0 <= self.scale < 1, "be in 0 .. 1"),
            ("max_damaged_rate", 0 <= self.max_damaged_rate <= 1, "be in 0 .. 1"),
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
                (f"{where}.row_tokens", tokens == 0 or tokens >= smallest,
                 f"hold one picture: at least {smallest}"),
                (f"{where}.window_tokens", source.window_tokens == 0 or
                 source.window_tokens >= smallest, f"hold one picture: at least {smallest}"),
                (f"{where}.window_images", source.window_images >= 0, "not be negative"),
                (f"{where}.picked_images", source.picked_images >= 0, "not be negative"),
                (f"{where}.frames", source.frames >= 1, "be at least 1"),
                (f"{where}.frame_seconds", source.frame_seconds > 0, "be positive"),
                (f"{where}.allow_missing", set(source.allow_missing) <= set(MAY_LACK),
                 f"name some of {', '.join(MAY_LACK)}"),
            ]  # fmt: skip
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


def batch_shapes(cfg: DataConfig, kind: Kind) -> dict[str, tuple[tuple[int, ...], type]]:
    """(shape, dtype) of each array of a global batch.

    rows:     tokens, segment_ids (0 = padding), positions int32 [B,T]; text_loss_mask bool
              [B,T], True where the token is a text target; images uint8 [B,I,h,w,3];
              image_valid, image_scored (a regression target) bool [B,I]; image_slots
              int32 [B,T], which of the I*N embeddings of the row stands at an <image>, -1
              elsewhere.
    captions: images uint8 [B,h,w,3]; tokens int32 [B,T], `<s> words </s>` and padding on
              the right; valid bool [B,T].
    pictures: images uint8 [B,H,W,3], of the autoencoder's size.
    contexts: tokens int32 [B,T], what comes before a picture, up to and with its [IMG],
              padded on the right; length int32 [B]; images, image_valid, image_slots of
              the context's own pictures as in rows; target uint8 [B,H,W,3], the picture.
    """
    B, T, I = cfg.batch_size, cfg.row_tokens, cfg.row_images  # noqa: E741
    h, H = cfg.image_size, cfg.target_size
    int32, uint8 = np.int32, np.uint8
    inputs = {
        "images": ((B, I, h, h, 3), uint8), "image_valid": ((B, I), bool),
        "image_slots": ((B, T), int32),
    }  # fmt: skip
    shapes: dict[str, dict[str, tuple[tuple[int, ...], Any]]] = {
        "rows": {
            "tokens": ((B, T), int32), "segment_ids": ((B, T), int32),
            "positions": ((B, T), int32), "text_loss_mask": ((B, T), bool),
            "image_scored": ((B, I), bool), **inputs,
        },
        "captions": {
            "images": ((B, h, h, 3), uint8), "tokens": ((B, T), int32), "valid": ((B, T), bool),
        },
        "pictures": {"images": ((B, H, H, 3), uint8)},
        "contexts": {
            "tokens": ((B, T), int32), "length": ((B,), int32), **inputs,
            "target": ((B, H, H, 3), uint8),
        },
    }  # fmt: skip
    return shapes[kind]
