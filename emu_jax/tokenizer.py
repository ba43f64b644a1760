"""LLaMA ids with Emu's special tokens, exactly as the releases give them.

The release runs the slow `LlamaTokenizer` of transformers 4.29-4.31. Each family adds its tokens
after the base vocabulary (`Emu1/models/modeling_llama.py`, `Emu2/emu/constants.py`). Text is split
at special tokens, and white space next to them is stripped. Each piece of text is then encoded
separately, with LLaMA's leading space.

Later language models bring a byte-level BPE (LLaMA-3, Qwen). Emu's tokens are added likewise.
White space next to special tokens is kept, as `AutoTokenizer` does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from emu_jax.errors import UserError
from emu_jax.storage import as_path, refuse_stand_in, writing

Family = Literal["emu", "emu2"]

PAD, IMG, IMG_END, IMAGE = "[PAD]", "[IMG]", "[/IMG]", "<image>"
USER, ASSISTANT = "[USER]", "[ASSISTANT]"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
# Emu2's: [gIMG] stands for an embedding of a video's frame.
FRAME, VIDEO = "[gIMG]", "[VIDEO]"
GROUNDING, PHRASE, PHRASE_END, OBJECT, OBJECT_END = (
    "<grounding>",
    "<phrase>",
    "</phrase>",
    "<object>",
    "</object>",
)
PATCH_INDICES = tuple(f"<patch_index_{i:04}>" for i in range(257))  # coordinates of boxes

# Tokens that each family adds to LLaMA's vocabulary, in order. [USER] and [ASSISTANT] may follow.
_ADDED: dict[Family, tuple[str, ...]] = {
    "emu": (PAD, IMG, IMG_END, IMAGE),
    "emu2": (
        PAD,
        IMG,
        IMG_END,
        IMAGE,
        FRAME,
        "[/gIMG]",
        "[EOC]",
        VIDEO,
        GROUNDING,
        PHRASE,
        PHRASE_END,
        OBJECT,
        OBJECT_END,
        "</delimiter_of_multi_objects/>",
        "<REC>",
        *PATCH_INDICES,
    ),
}

# The files of a LLaMA tokenizer folder. `save` writes those that `load` read.
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
_NOTE = "emu_tokenizer.json"  # written by `save` next to the files: the arguments of `load`
_ADDED_FILE = "added_tokens.json"  # of the slow tokenizer, in folders of Emu2 on the Hub
_SPACE = "\u2581"  # sentencepiece's character for a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """A vocabulary before Emu's tokens.

    Attributes:
        encode_plain: encodes text in which no token is spelled out.
        special: tokens that are left out of decoded text.
        spelled: tokens that text may spell out.
        unk: id of `<unk>`; None if every text can be encoded.
        byte_level: whether a piece spells bytes in GPT-2's alphabet.
    """

    pieces: Sequence[str]
    encode_plain: Callable[[str], list[int]]
    special: dict[str, int]
    spelled: dict[str, int]
    bos: int
    eos: int
    unk: int | None
    byte_level: bool = False


class Tokenizer:
    """Converts text to ids and back. Create it with `Tokenizer.load` or `Tokenizer.train`.

    Attributes:
        bos, eos, unk, pad_id, img, img_end, image: ids of `<s>`, `</s>`, `<unk>`, `[PAD]`,
            `[IMG]`, `[/IMG]`, `<image>`. A byte-level BPE has no `<unk>` (None).
        byte_level: whether the vocabulary is a byte-level BPE, not LLaMA's.
        frame: id of `[gIMG]`, which stands for an embedding of a video's frame; None in Emu1,
            where `<image>` does.
        video: id of `[VIDEO]`, which precedes the frames of a video; None in Emu1.
        user, assistant: ids of `[USER]`, `[ASSISTANT]`; None without `instruct`.
        added: Emu's tokens, in the order of their ids from `base_size` on.
        spelled: all tokens that text may spell out.
        family: the family whose tokens are added, "emu" or "emu2".
        fast: whether white space next to special tokens is kept, as `AutoTokenizer` does on the
            Hub. The release strips it.
        base_size: pieces of the LLaMA vocabulary, before Emu's tokens.
        fingerprint: a short hash; equal for tokenizers that give equal ids.
    """

    def __init__(
        self,
        vocabulary: _Vocabulary,
        files: dict[str, bytes],
        *,
        instruct: bool = False,
        family: Family = "emu",
        fast: bool = False,
    ) -> None:
        self.added = added = added_tokens(family, instruct)
        self.instruct, self.fast = instruct, fast
        self.family: Family = family
        self.base_size = len(vocabulary.pieces)
        self.unk, self.bos, self.eos = vocabulary.unk, vocabulary.bos, vocabulary.eos
        self.byte_level = vocabulary.byte_level
        self._added = {t: self.base_size + i for i, t in enumerate(added)}
        self.pad_id, self.img = self._added[PAD], self._added[IMG]
        self.img_end, self.image = self._added[IMG_END], self._added[IMAGE]
        self.frame, self.video = self._added.get(FRAME), self._added.get(VIDEO)
        self.user, self.assistant = self._added.get(USER), self._added.get(ASSISTANT)

        self._vocabulary = vocabulary
        self._pieces = [*vocabulary.pieces, *added]
        self._bytes = [int(m[1], 16) if (m := _BYTE.fullmatch(p)) else None for p in self._pieces]
        self._special = {**vocabulary.special, **self._added}
        self._spelled = {**vocabulary.spelled, **self._added}
        self.spelled = tuple(self._spelled)
        # The longest first: a token may begin with another.
        spelled = sorted(self._spelled, key=len, reverse=True) if self.byte_level else self._spelled
        self._split = re.compile("(" + "|".join(re.escape(t) for t in spelled) + ")")
        # Emu2's release leaves LLaMA's own <unk> as it is, which strips nothing.
        keeps = {UNK} if family == "emu2" else set()
        self._keeps_space = set(self._spelled) if fast or self.byte_level else keeps
        self._files = files
        settings = () if (family, fast) == ("emu", False) else (family, fast)
        digest = hashlib.sha256(repr((instruct, sorted(files.items()), *settings)).encode())
        self.fingerprint = digest.hexdigest()[:12]

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        instruct: bool | None = None,
        family: Family | None = None,
        fast: bool | None = None,
    ) -> Tokenizer:
        """Reads a LLaMA tokenizer folder: its `tokenizer.json`, or else `tokenizer.model`.

        By default the settings are those that `save` noted in the folder. In a folder that it did
        not write, the family and `instruct` follow from its `added_tokens.json`, or else are those
        of the pretrained Emu1.

        Args:
            instruct: whether `[USER]` and `[ASSISTANT]` exist.
            family: the family whose tokens are added.
            fast: whether to keep white space next to special tokens, as `AutoTokenizer` does.

        Raises:
            UserError: neither file exists, or it cannot be read.
        """
        directory = as_path(directory)
        files = {n: (directory / n).read_bytes() for n in _FILES if (directory / n).is_file()}
        for name in files:
            refuse_stand_in(directory / name)
        try:
            noted = _noted_settings(directory)
            instruct = noted[0] if instruct is None else instruct
            family = noted[1] if family is None else family
            fast = noted[2] if fast is None else fast
            if "tokenizer.json" in files:
                source = directory / "tokenizer.json"
                vocabulary = _from_json(files["tokenizer.json"], files)
            elif "tokenizer.model" in files:
                source = directory / "tokenizer.model"
                vocabulary = _from_sentencepiece(files["tokenizer.model"])
            else:
                raise UserError(
                    f"{directory} has no tokenizer.json and no tokenizer.model: "
                    "name a LLaMA tokenizer folder"
                )
        except UserError:
            raise
        except Exception as error:  # the libraries raise bare Exception
            raise UserError(f"cannot read the tokenizer in {directory}: {error}") from None
        tokenizer = cls(vocabulary, files, instruct=instruct, family=family, fast=fast)
        if source.suffix == ".json":
            tokenizer._check_added(json.loads(files["tokenizer.json"]), source)
        return tokenizer

    def _check_added(self, values: dict[str, Any], source: Path) -> None:
        """Checks that tokens which the file already adds have the release's ids."""
        for token in values.get("added_tokens") or ():
            if token["id"] >= self.base_size and token["content"] in self._added:
                if token["id"] != self._added[token["content"]]:
                    raise UserError(
                        f"{source} gives {token['content']} the id {token['id']}, the release "
                        f"{self._added[token['content']]}: use the tokenizer without added tokens"
                    )

    def as_fast(self) -> Tokenizer:
        """Returns a copy that keeps white space next to special tokens, as `AutoTokenizer` does."""
        return Tokenizer(
            self._vocabulary,
            self._files,
            instruct=self.instruct,
            family=self.family,
            fast=True,
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the folder that `load` reads, each file atomically and synced to disk."""
        directory = as_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"instruct": self.instruct}
        if (self.family, self.fast) != ("emu", False):
            settings |= {"family": self.family, "fast": self.fast}
        ours = json.dumps(settings).encode() + b"\n"
        for name, content in {**self._files, _NOTE: ours}.items():
            with writing(directory / name, shared=True) as temporary:
                temporary.write_bytes(content)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        instruct: bool = False,
        family: Family = "emu",
    ) -> Tokenizer:
        """Trains a byte-fallback BPE in LLaMA's format, deterministically.

        `<unk>`, `<s>`, `</s>` have the ids 0, 1, 2. The 256 bytes follow, then characters and
        merges, which never cross a space. There are fewer than `vocab_size` pieces if the texts
        have no more to merge. Emu's own tokens are added to these.
        """
        byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
        trainee = tokenizers.Tokenizer(
            tokenizers.models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True)
        )
        trainee.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="always", split=True
        )
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[UNK, BOS, EOS, *byte_pieces],
            show_progress=False,
        )
        trainee.train_from_iterator(list(texts), trainer)
        values = json.loads(trainee.to_str())
        # Byte pieces marked as special would be dropped by other decoders.
        values["added_tokens"] = [t for t in values["added_tokens"] if t["id"] < 3]
        values.update(_LLAMA_PIPELINE)
        content = json.dumps(values, ensure_ascii=False, indent=1).encode()
        files = {"tokenizer.json": content}
        return cls(_from_json(content, {}), files, instruct=instruct, family=family)

    def __len__(self) -> int:
        """Returns the size of the vocabulary, including Emu's tokens."""
        return len(self._pieces)

    def piece(self, id: int) -> str:
        """Returns a token as the vocabulary writes it: U+2581 is a space, `<0x0A>` a byte. A
        byte-level BPE writes bytes in GPT-2's alphabet, where U+0120 is a space."""
        return self._pieces[id]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encodes text, in which special tokens may be spelled out (`[IMG]`, `</s>`, ...)."""
        return self.encode_parts([text], bos)

    def encode_parts(self, texts: Iterable[str], bos: bool = True) -> list[int]:
        """Encodes texts as if joined, except that no special token spans two of them.

        `["[IM", "G]"]` gives the literal characters; `["[IMG]"]` gives the special token. Where no
        special token spans two texts the ids are those of `encode("".join(texts))`.

        Raises:
            UserError: a text contains half of a surrogate pair, which no encoding can hold.
        """
        pieces = [""]  # text, special, text, special, ..., text
        for text in texts:
            first, *rest = self._split.split(text)
            pieces[-1] += first
            pieces += rest
        ids = [self.bos] if bos else []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self._spelled[piece])
                continue
            if i > 0 and pieces[i - 1] not in self._keeps_space:
                piece = piece.lstrip()
            if i < len(pieces) - 1 and pieces[i + 1] not in self._keeps_space:
                piece = piece.rstrip()
            if not piece.isascii():
                _check_unicode(piece)
            ids += self.encode_plain(piece)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Encodes text literally, without `<s>`: special tokens are not recognized.

        Use it for text of unknown origin, which must not be able to spell an `<image>`.
        """
        return self._vocabulary.encode_plain(text) if text else []

    @functools.cached_property
    def _sizes(self) -> tuple[Int32[np.ndarray, "V"], Bool[np.ndarray, "V"]]:
        """Returns the UTF-8 bytes of each token, 0 if it is special, and which begin with a
        space."""
        if self.byte_level:
            sizes = [0 if p in self._special else len(self._bytes_of(p)) for p in self._pieces]
            return np.array(sizes, np.int32), np.zeros(len(sizes), bool)
        sizes = [
            0 if piece in self._special else 1 if byte is not None else _utf8_size(piece)
            for piece, byte in zip(self._pieces, self._bytes, strict=True)
        ]
        spaces = [piece.startswith(_SPACE) for piece in self._pieces]
        return np.array(sizes, np.int32), np.array(spaces)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decodes ids as `LlamaTokenizer.decode` of transformers 4.31 does.

        Without `skip_special_tokens`, special tokens are spelled out, with that library's spaces
        around them. A byte-level BPE has no such spaces.
        """
        data = bytearray()
        groups: list[str | list[int]] = []  # Emu's tokens, and runs of LLaMA's
        for i in map(int, ids):
            if not 0 <= i < len(self._pieces):
                raise IndexError(f"id {i} is not in the vocabulary of {len(self)} tokens")
            if skip_special_tokens and self._pieces[i] in self._special:
                continue
            if self.byte_level:
                data += self._bytes_of(self._pieces[i])
            elif i >= self.base_size:
                groups.append(self._pieces[i])
            elif groups and isinstance(groups[-1], list):
                groups[-1].append(i)
            else:
                groups.append([i])
        if self.byte_level:
            return data.decode(errors="replace")
        return " ".join(g if isinstance(g, str) else self._join(g) for g in groups)

    def _bytes_of(self, piece: str) -> bytes:
        """Returns the bytes that a piece of a byte-level BPE adds to a text."""
        if piece in self._spelled:
            return piece.encode()
        return bytes(map(_gpt2_bytes().__getitem__, piece))

    def _join(self, ids: list[int]) -> str:
        text, after_special = "", False
        run: list[int] = []
        for n, i in enumerate(ids):
            if i not in (self.bos, self.eos, self.unk):
                run.append(i)
                after_special = False
                continue
            if n > 0 and not after_special:
                text += " "
            text += self._spell(run) + self._pieces[i]
            run, after_special = [], True
        return text + self._spell(run)

    def _spell(self, ids: list[int]) -> str:
        """Decodes like sentencepiece: bytes become characters, and one leading space is dropped."""
        text, pending, first = "", bytearray(), True
        for i in ids:
            if (byte := self._bytes[i]) is not None:
                pending.append(byte)
                continue
            text += _decode_utf8(pending)
            pending.clear()
            piece = self._pieces[i]
            if first and not text:
                piece = piece.removeprefix(_SPACE)
            text += piece.replace(_SPACE, " ")
            first = False
        return text + _decode_utf8(pending)

    def text_bytes(self, ids: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """Counts the UTF-8 bytes that each token adds to the decoded text of its row.

        Special tokens add none. A space is dropped at the beginning of a row and behind a special
        token, as in `decode`.
        """
        sizes, spaces = self._sizes
        special = np.ones(ids.shape, bool)  # whether the token before adds no bytes
        special[:, 1:] = sizes[ids[:, :-1]] == 0
        return sizes[ids] - (special & spaces[ids])

    def pad(
        self, rows: Sequence[Sequence[int]], side: Literal["left", "right"]
    ) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Pads rows of unequal length to one array.

        The release pads on the left for text generation, on the right for training and image
        generation.

        Returns:
            The ids, and a mask that is True at the rows' own tokens.
        """
        width = max(map(len, rows), default=0)
        ids = np.full((len(rows), width), self.pad_id, np.int32)
        mask = np.zeros((len(rows), width), bool)
        for n, row in enumerate(rows):
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[n, where], mask[n, where] = row, True
        return ids, mask

    def image_placeholder(self, n_causal: int) -> str:
        """Returns the text that stands for an image in a prompt."""
        return IMG + IMAGE * n_causal + IMG_END

    def frame_placeholder(self, n_frame: int) -> str:
        """Returns the text that stands for a frame of a video in a prompt."""
        return IMG + (IMAGE if self.frame is None else FRAME) * n_frame + IMG_END


def added_tokens(family: Family, instruct: bool) -> list[str]:
    """Returns the tokens that a release adds to LLaMA's vocabulary, in the order of their ids."""
    return [*_ADDED[family], *([USER, ASSISTANT] if instruct else [])]


def _noted_settings(directory: Path) -> tuple[bool, Family, bool]:
    """Returns `instruct`, `family` and `fast` of a tokenizer folder (see `Tokenizer.load`)."""
    if (directory / _NOTE).is_file():
        noted = json.loads((directory / _NOTE).read_text())
        family = noted.get("family", "emu")
        if family not in get_args(Family):
            raise UserError(f"{directory / _NOTE}: unknown family {family!r}: use emu or emu2")
        return bool(noted["instruct"]), family, bool(noted.get("fast", False))
    if (directory / _ADDED_FILE).is_file():
        added = json.loads((directory / _ADDED_FILE).read_text())
        if FRAME in added:
            return USER in added, "emu2", False
    return False, "emu", False


# LLaMA's treatment of raw text, in the terms of the tokenizers library.
_LLAMA_PIPELINE = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": _SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        ],
    },
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}


def _named_tokens(files: dict[str, bytes]) -> dict[str, str]:
    """Returns {`bos_token`, ...: the token} of a tokenizer folder's JSON files."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, token in json.loads(files.get(file, b"{}")).items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                names[name] = token
    return names


def _from_json(content: bytes, files: dict[str, bytes]) -> _Vocabulary:
    values = json.loads(content)
    if values["model"].get("type", "BPE") != "BPE":
        raise UserError(f"tokenizer.json is a {values['model']['type']} model, LLaMA's is BPE")
    byte_level = '"ByteLevel"' in json.dumps(values.get("pre_tokenizer"))
    added = values.get("added_tokens") or [] if byte_level else []
    ours = added_tokens("emu2", instruct=True)  # `Tokenizer` adds them itself
    added = [token for token in added if token["content"] not in ours]
    vocab = values["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    pieces = sorted(vocab, key=vocab.__getitem__)
    if [vocab[p] for p in pieces] != list(range(len(pieces))):
        raise UserError("the ids in tokenizer.json have gaps")
    if byte_level:
        return _byte_level(values, vocab, pieces, added, _named_tokens(files))
    # Only the model itself: special tokens are split off here, and other versions of the
    # same file treat leading spaces differently.
    values.update(_LLAMA_PIPELINE, added_tokens=[], truncation=None, padding=None)
    raw = tokenizers.Tokenizer.from_str(json.dumps(values))
    return _llama(pieces, lambda text: raw.encode(text, add_special_tokens=False).ids)


def _from_sentencepiece(content: bytes) -> _Vocabulary:
    import sentencepiece

    raw = sentencepiece.SentencePieceProcessor(model_proto=content)
    return _llama([raw.id_to_piece(i) for i in range(raw.get_piece_size())], raw.encode)


def _llama(pieces: Sequence[str], encode_plain: Callable[[str], list[int]]) -> _Vocabulary:
    """Returns a vocabulary in LLaMA's format, of which text may spell out three tokens."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    if missing := [t for t in (UNK, BOS, EOS) if t not in ids]:
        raise UserError(f"the tokenizer lacks {', '.join(missing)}: not a LLaMA tokenizer")
    special = {token: ids[token] for token in (UNK, BOS, EOS)}
    return _Vocabulary(
        pieces, encode_plain, special, special, bos=ids[BOS], eos=ids[EOS], unk=ids[UNK]
    )


def _byte_level(
    values: dict[str, Any],
    ids: dict[str, int],
    pieces: list[str],
    added: list[dict[str, Any]],
    named_tokens: dict[str, str],
) -> _Vocabulary:
    """Returns the vocabulary of a byte-level BPE (LLaMA-3, Qwen).

    A tokenizer without `bos_token` starts a sequence with `pad_token`, or else with `eos_token`, as
    Qwen's config.json does. Text may spell `eos_token` as `</s>` too, as dialogues and prompts do.

    Args:
        values: the content of tokenizer.json.
        ids: {piece: id}.
        added: the tokens that tokenizer.json adds to the BPE's.
        named_tokens: see `_named_tokens`.
    """
    eos = named_tokens.get("eos_token", "")
    bos = named_tokens.get("bos_token") or named_tokens.get("pad_token") or eos
    if missing := [t or "eos_token" for t in (bos, eos) if t not in ids]:
        raise UserError(
            f"the tokenizer lacks {missing[0]}: name its tokens in tokenizer_config.json"
        )
    # Only the model itself: special tokens are split off in `Tokenizer`.
    plain = values | {
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    raw = tokenizers.Tokenizer.from_str(json.dumps(plain))
    spelled = {EOS: ids[eos]} | {token["content"]: token["id"] for token in added}
    special = {token["content"]: token["id"] for token in added if token.get("special")}
    return _Vocabulary(
        pieces,
        lambda text: raw.encode(text, add_special_tokens=False).ids,
        special | {bos: ids[bos], eos: ids[eos]},
        spelled | {bos: ids[bos], eos: ids[eos]},
        bos=ids[bos],
        eos=ids[eos],
        unk=None,
        byte_level=True,
    )


@functools.cache
def _gpt2_bytes() -> dict[str, int]:
    """Returns {character: byte} of GPT-2's alphabet, which has a printable character for each."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _utf8_size(piece: str) -> int:
    return len(piece.replace(_SPACE, " ").encode())


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text {text[:40]!a} is not valid Unicode (half of a surrogate pair at character "
            f"{error.start}): pass text that was decoded from UTF-8"
        ) from None


def _decode_utf8(data: bytearray) -> str:
    """Decodes UTF-8, with one U+FFFD for each byte that belongs to no character."""
    text, start = "", 0
    while start < len(data):
        for length in (1, 2, 3, 4):
            try:
                text += data[start : start + length].decode()
                break
            except UnicodeDecodeError:
                continue
        else:
            text, length = text + "\ufffd", 1
        start += length
    return text
