"""The tokenizer against what the release's own gives (tests/golden)."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from emu_jax.errors import UserError
from emu_jax.tokenizer import Tokenizer

TINY = Path(__file__).parent / "golden" / "tiny"
META = json.loads((TINY / "meta.json").read_text())
EXPECTED = np.load(TINY / "expected.npz")

# Spaces, accents, control characters, emoji, what looks special and is not.
SNIPPETS = [
    "a cat",
    " the dog ",
    "héllo",
    "🙂",
    "日本語",
    "\n",
    "\t",
    "  ",
    " ",
    "▁",
    "<0x0A>",
    "[IM",
    "]:",
    ".",
    ", ",
    " \n ",
    "e\u0301",
    "\u00a0",
    "\u3000",
    "don't",
    "123",
    "image",
    "\x00b",
]
SPECIAL = ["[IMG]", "[/IMG]", "<image>", "[PAD]", "<s>", "</s>", "<unk>"]


def random_text(rng: random.Random) -> str:
    pool = [rng.choice(SNIPPETS if rng.random() < 0.7 else SPECIAL) for _ in range(9)]
    return "".join(pool[: rng.randint(0, 9)])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY / "tokenizer")


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(TINY / "tokenizer" / "tokenizer.model", folder)
    return folder


def test_special_ids(tokenizer):
    want = META["special"]
    assert len(tokenizer) == META["vocab"]
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos) == (
        want["<unk>"],
        want["<s>"],
        want["</s>"],
    )
    assert (tokenizer.pad_id, tokenizer.img, tokenizer.img_end, tokenizer.image) == (
        want["[PAD]"],
        want["[IMG]"],
        want["[/IMG]"],
        want["<image>"],
    )
    assert tokenizer.user is None and tokenizer.assistant is None

    instruct = Tokenizer.load(TINY / "tokenizer", instruct=True)
    assert instruct.user == META["special_instruct"]["[USER]"]
    assert instruct.assistant == META["special_instruct"]["[ASSISTANT]"]
    assert len(instruct) == META["vocab"] + 2


@pytest.mark.parametrize("case", META["tokenizer_cases"], ids=lambda c: repr(c["text"][-20:]))
def test_encode_golden(tokenizer, sentencepiece_folder, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.encode(case["text"], bos=False) == case["ids"][1:]
    assert Tokenizer.load(sentencepiece_folder).encode(case["text"]) == case["ids"]


def test_encode_golden_instruct():
    tokenizer = Tokenizer.load(TINY / "tokenizer", instruct=True)
    assert tokenizer.encode(META["instruct_prompt"]) == EXPECTED["instruct/ids"][0].tolist()


def test_encode_golden_prompts_padded_right(tokenizer):
    rows = [tokenizer.encode(prompt) for prompt in META["prompts"]]
    ids, mask = tokenizer.pad(rows, side="right")
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, EXPECTED["train/ids"])
    np.testing.assert_array_equal(mask, EXPECTED["train/mask"].astype(bool))


@pytest.mark.parametrize("tag", META["generate"])
def test_decode_golden(tokenizer, tag):
    ids = EXPECTED[f"generate/{tag}/ids"]
    assert [tokenizer.decode(row) for row in ids] == META["generate"][tag]["texts"]


@pytest.mark.parametrize(
    "ids, skipped, spelled",
    # Recorded from LlamaTokenizer.decode of transformers 4.31.
    [
        (
            [1, 260, 458, 513, 515, 514, 263, 454, 2],
            "a cat the dog",
            "<s>a cat [IMG] <image> [/IMG]  the dog</s>",
        ),
        ([260, 458, 2, 2, 260], "a cat a", " a cat</s></s>a"),
        ([470, 470, 260], "  a", "  a"),
        ([470, 229, 133, 260], "\ufffd\ufffd a", "\ufffd\ufffd a"),
        ([243, 162, 155, 131, 470, 131], "\U0001f600 \ufffd", "\U0001f600 \ufffd"),
        ([513, 513, 260, 512, 512], "a", "[IMG] [IMG] a [PAD] [PAD]"),
        ([1, 1, 2, 0, 260], "a", "<s><s></s><unk>a"),
        ([35, 260], "  a", "  a"),
        ([], "", ""),
    ],
)
def test_decode_recorded(tokenizer, ids, skipped, spelled):
    assert tokenizer.decode(ids) == skipped
    assert tokenizer.decode(ids, skip_special_tokens=False) == spelled


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
    for bad in (len(tokenizer), -1):
        with pytest.raises(IndexError):
            tokenizer.decode([5, bad])


def test_sentencepiece_equals_json(tokenizer, sentencepiece_folder):
    other = Tokenizer.load(sentencepiece_folder)
    assert len(other) == len(tokenizer)
    rng = random.Random(0)
    for _ in range(2000):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert other.encode(text) == ids, text
        assert other.decode(ids, False) == tokenizer.decode(ids, False)


def test_pad_left_and_empty(tokenizer):
    ids, mask = tokenizer.pad([[1, 5], [7], []], side="left")
    want = META["special"]["[PAD]"]
    assert ids.tolist() == [[1, 5], [want, 7], [want, want]]
    assert mask.tolist() == [[True, True], [False, True], [False, False]]
    assert tokenizer.pad([], side="left")[0].shape == (0, 0)


def test_image_placeholder(tokenizer):
    ids = tokenizer.encode(tokenizer.image_placeholder(3), bos=False)
    assert ids == [tokenizer.img, *[tokenizer.image] * 3, tokenizer.img_end]


def test_plain_text_spells_no_special_token(tokenizer, sentencepiece_folder):
    for each in (tokenizer, Tokenizer.load(sentencepiece_folder)):
        for text in SPECIAL:
            ids = each.encode_plain(f"a {text} b")
            assert all(2 < i < each.base_size for i in ids)
            assert each.decode(ids) == f"a {text} b"


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("only_model", [False, True])
def test_save_and_load(tmp_path, sentencepiece_folder, instruct, only_model):
    source = sentencepiece_folder if only_model else TINY / "tokenizer"
    tokenizer = Tokenizer.load(source, instruct=instruct)
    tokenizer.save(tmp_path / "a")
    tokenizer.save(tmp_path / "a")  # over itself
    again = Tokenizer.load(tmp_path / "a")
    assert again.instruct is instruct
    assert again.fingerprint == tokenizer.fingerprint
    text = META["instruct_prompt"]
    assert again.encode(text) == tokenizer.encode(text)
    for name in ("tokenizer.json", "tokenizer.model"):
        kept, original = tmp_path / "a" / name, source / name
        assert kept.is_file() == original.is_file()
        assert not kept.is_file() or kept.read_bytes() == original.read_bytes()
    assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]


TEXTS = ["a handwritten seven", "the digit seven", "seven", "this is a nine", "nine and seven"]


def test_train(tmp_path):
    tokenizer = Tokenizer.train(TEXTS * 3, vocab_size=400)
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert len(tokenizer.encode_plain("seven")) == 1
    assert len(tokenizer.encode_plain("a handwritten seven")) == 3
    assert tokenizer.encode("[IMG] seven") == [1, tokenizer.img, *tokenizer.encode_plain("seven")]
    tokenizer.save(tmp_path)
    for text in ("a handwritten seven", "ünïcode 🙂 日本語\n\ttabs  and spaces ", "", "[IM <s"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)


def test_train_is_deterministic_and_bounded():
    one, two = Tokenizer.train(TEXTS, 300), Tokenizer.train(iter(TEXTS), 300)
    assert one.fingerprint == two.fingerprint
    assert one.base_size == 300
    assert Tokenizer.train(TEXTS, 299).fingerprint != one.fingerprint


def test_errors(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json and no tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(UserError, match="cannot read the tokenizer in"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01nonsense")
    with pytest.raises(UserError, match="cannot read the tokenizer in"):
        Tokenizer.load(tmp_path)


def test_added_tokens_of_a_folder_must_agree(tmp_path):
    values = json.loads((TINY / "tokenizer" / "tokenizer.json").read_text())
    token = dict(values["added_tokens"][0], content="[PAD]", id=512)
    values["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert Tokenizer.load(tmp_path).pad_id == 512
    token["id"] = 515
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"gives \[PAD\] the id 515, the release 512"):
        Tokenizer.load(tmp_path)


def test_tokens_add_up_to_the_bytes_of_their_text(tokenizer):
    rng = random.Random(3)
    for _ in range(100):
        texts = ["".join(rng.choices(SNIPPETS, k=rng.randint(1, 6))) for _ in range(2)]
        parts = [[tokenizer.bos, *tokenizer.encode_plain(text)] for text in texts]
        rows = np.array([parts[0] + parts[1] + [tokenizer.img, tokenizer.pad_id]], np.int32)
        found = tokenizer.text_bytes(rows)
        assert (found >= 0).all() and (found[0, -2:] == 0).all()
        assert found.sum() == sum(len(tokenizer.decode(ids).encode()) for ids in parts), texts


# --- Byte-level BPE ------------------------------------------------------------------------------

ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_byte_level(folder: Path, **named: str) -> Path:
    """A byte-level BPE as LLaMA-3 and Qwen have it, with tokens of its own behind the BPE's."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(words, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["a cat and the dog", "the image of a cat 123"] * 9, trainer)
    bpe.add_special_tokens(ADDED)
    bpe.add_tokens(["<tool_call>"])
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def test_byte_level_ids_are_those_of_transformers(tmp_path):
    """Ids, texts, and counts of bytes, with Emu's tokens behind those of the tokenizer."""
    from transformers import PreTrainedTokenizerFast

    named = {"bos_token": ADDED[1], "eos_token": ADDED[2], "pad_token": ADDED[0]}
    folder = write_byte_level(tmp_path / "words", **named)
    ours = Tokenizer.load(folder, instruct=True)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    theirs.add_special_tokens({"additional_special_tokens": ours.added})
    assert len(ours) == len(theirs) == ours.base_size + 6
    assert ours.base_size == ours.pad_id and ours.unk is None
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    rng = random.Random(0)
    pool = [*SNIPPETS, *SPECIAL, *ADDED, "<tool_call>", "[USER]"]
    for _ in range(200):
        text = "".join(rng.choice(pool) for _ in range(rng.randint(0, 9)))
        ids = ours.encode(text, bos=False)
        spelled = text.replace("</s>", ADDED[2])  # which dialogues end their answers with
        assert ids == theirs.encode(spelled, add_special_tokens=False), text
        for skip in (True, False):
            decode = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, **decode)
        row = np.array([ids], np.int32).reshape(1, -1)
        assert ours.text_bytes(row).sum() == len(ours.decode(ids).encode())
    assert ours.encode("a</s>", bos=False)[-1] == ours.eos
    literal = ours.encode_plain("<|im_end|>[IMG]")
    assert not set(literal) & {ours.eos, ours.img} and ours.decode(literal) == "<|im_end|>[IMG]"
    assert ours.decode([*ours.encode("é", bos=False)[:1]]) == "\ufffd"  # half a character

    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.encode("a[IMG]") == ours.encode("a[IMG]")


@pytest.mark.parametrize(
    "named, bos",
    [
        ({"eos_token": ADDED[2], "pad_token": ADDED[0]}, ADDED[0]),  # as in Qwen2.5-Instruct
        ({"eos_token": ADDED[0], "pad_token": ADDED[0]}, ADDED[0]),  # as in Qwen2.5
        ({"eos_token": {"content": ADDED[0]}}, ADDED[0]),
    ],
)
def test_byte_level_without_a_first_token_starts_with_padding(named, bos, tmp_path):
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "words", **named))
    assert tokenizer.piece(tokenizer.bos) == bos
    (tmp_path / "words" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer lacks eos_token: name its tokens"):
        Tokenizer.load(tmp_path / "words")
