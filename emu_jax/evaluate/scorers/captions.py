"""CIDEr, BLEU and ROUGE-L of captions, by the COCO caption evaluation (pycocoevalcap).

CIDEr is CIDEr-D (Vedantam et al., arXiv:1411.5726, section 7): n-grams up to 4, clipped, with a
Gaussian penalty of sigma 6 on the difference in length. Document frequencies are computed from the
scored references, so a figure depends on the whole set.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores, check_keys, warned

PYTHON_TOKENIZER = (
    "captions were split by a tokenizer in Python, since Java is missing: figures can differ "
    "slightly from those with the Stanford PTB tokenizer"
)


def score(
    references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]
) -> Scores:
    """Scores one caption for each image or clip against all its human captions.

    Args:
        references: at least one caption for each item.
        predictions: one caption, possibly empty, for each item of `references`.

    Returns:
        CIDEr, BLEU-1 to BLEU-4 and ROUGE-L, all times 100. CIDEr times 100 can exceed 100.
        The figure of single items is CIDEr.

    Raises:
        UserError: items lack references or predictions, or pycocoevalcap is not installed.
    """
    check_keys(references, predictions, "captions")
    for key, captions in references.items():
        if not captions:
            raise UserError(f"item {key!r} has no reference caption")
    coco = _pycocoevalcap()

    keys = list(references)
    counts = [len(references[key]) for key in keys]
    lines = [caption for key in keys for caption in references[key]]
    split, notes = tokenize(lines + [predictions[key] for key in keys])
    # The package takes dictionaries of lists of captions, with tokens joined by spaces.
    words = iter(split)
    expected = {i: [next(words) for _ in range(n)] for i, n in enumerate(counts)}
    given = {i: [next(words)] for i in range(len(keys))}

    cider, cider_of_each = coco.Cider().compute_score(expected, given)
    bleu, _ = coco.Bleu(4).compute_score(expected, given, verbose=0)
    rouge, _ = coco.Rouge().compute_score(expected, given)
    values = {"CIDEr": cider, **{f"BLEU-{n}": b for n, b in enumerate(bleu, 1)}, "ROUGE-L": rouge}
    if len(keys) == 1:
        notes = (*notes, "CIDEr of a single item is 0: no n-gram tells it from other items")
    return Scores(
        {name: 100 * float(value) for name, value in values.items()},
        notes,
        {key: 100 * float(c) for key, c in zip(keys, cider_of_each, strict=True)},
    )


def tokenize(captions: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Tokenizes captions for the COCO evaluation. Returns them and notes for `Scores`.

    The captions are in lower case, split by Penn Treebank rules, without punctuation, with tokens
    joined by spaces. A token may contain a no-break space: Stanford's tokenizer writes "22 3/4"
    with one, and the evaluation, which splits at ordinary spaces, counts it as one word.
    Uses Stanford's tokenizer if Java is installed, otherwise `python_tokens`.
    """
    # The tokenizer reads one caption per line, so other line ends would shift later captions.
    lines = [_LINE_ENDS.sub(" ", caption) for caption in captions]
    java = shutil.which("java")
    if java:
        tokens, notes = _java_tokens(java, lines), ()
    else:
        tokens, notes = [python_tokens(line) for line in lines], (warned(PYTHON_TOKENIZER),)
    punctuation = _pycocoevalcap().PUNCTUATIONS
    return [" ".join(w for w in words if w not in punctuation) for words in tokens], notes


def _pycocoevalcap() -> SimpleNamespace:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise UserError(
            f"captions are scored by pycocoevalcap ({error}): pip install 'emu_jax[eval]'"
        ) from None
    return SimpleNamespace(
        Bleu=Bleu,
        Cider=Cider,
        Rouge=Rouge,
        PUNCTUATIONS=frozenset(ptbtokenizer.PUNCTUATIONS),
        jar=Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR),
    )


def _java_tokens(java: str, lines: Sequence[str]) -> list[list[str]]:
    """Runs the command of pycocoevalcap's PTBTokenizer through pipes.

    The original writes a file next to its jar, in a directory that may be read-only.
    """
    command = [
        java,
        "-Dfile.encoding=UTF-8",
        "-cp",
        os.fspath(_pycocoevalcap().jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        "-encoding",
        "UTF-8",
    ]
    text = "".join(line + "\n" for line in lines)
    # Lone surrogates cannot be encoded as UTF-8.
    done = subprocess.run(command, input=text.encode(errors="replace"), capture_output=True)
    split = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(split) != len(lines):
        said = done.stderr.decode(errors="replace").strip().splitlines()[:1]
        raise UserError(
            f"{java} did not run the PTB tokenizer (status {done.returncode}, {len(split)} of "
            f"{len(lines)} lines): {''.join(said) or 'it said nothing'}"
        )
    return [line.rstrip().split(" ") for line in split]  # as pycocoevalcap splits them


_LINE_ENDS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
# The tokenizer's replacements of non-ASCII characters and HTML entities.
_WRITTEN = {
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "–": " -- ",
    "—": " -- ",
    "…": " ... ",
    "£": "#",
    "€": "$",
    "¢": " cents ",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "'n'": " 'n' ",
}
_BRACKETS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}
_REPLACED = re.compile("|".join(map(re.escape, _WRITTEN)))
_SPLIT = [
    re.compile(r"(?<=\w)(?=n't(?!\w)|'(?:s|m|d|ll|re|ve)(?!\w))"),  # is n't, it 's
    re.compile(r"(?<=\bcan)(?=not\b)|(?<=\bgon)(?=na\b)|(?<=\bwan)(?=na\b)"),
    re.compile(r"(?<=\bgot)(?=ta\b)|(?<=\bgim)(?=me\b)|(?<=\blem)(?=me\b)"),
]
_ABBREVIATIONS = (
    r"mr|mrs|ms|dr|prof|st|mt|ft|ave|blvd|rd|jr|sr|gen|sen|rep|gov|sgt|capt|col|lt|rev|hon|"
    r"inc|co|corp|ltd|vs|etc|al|ph\.d|jan|feb|mar|apr|aug|sept|sep|oct|nov|dec"
)
_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)[^\s"<>]+
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | </?[a-z][^<>\s]*>
    | (?<!\w)(?:[a-z]\.)+(?![^\W_])             # p.m., t. rex
    | (?:{_ABBREVIATIONS})\.(?![^\W_])          # keep their period
    | no\.(?=\s*\d)
    | n't(?!\w) | '(?:s|m|d|ll|re|ve)(?!\w)
    | '\d\ds?(?!\w) | '[nt]'(?!\w)            # '90s, rock 'n' roll
    | 't(?=is\b|was\b) | y'(?=all\b) | ma'am
    | (?<!\w)\d{{1,4}}[\ \xa0]\d{{1,4}}/\d{{1,4}}(?!\d)  # 22 3/4
    | (?<!\S)[-+]\.?\d+(?:[.,:/-]\d+)*        # a sign is part of its number
    | \d+(?:[.:]\d+)+(?=[ap]m\b)              # 7:30 of 7:30pm
    | \.\d+ | \d+(?:[.,:]\d+)+
    | [\#@][a-z]\w*
    | (?:[odlc]'(?=\w\w))?[^\W_]+             # o'clock; hyphens, slashes and periods
      (?:[-_/.](?:[odlc]')?[^\W_]+)*           # within a word are part of it
    | \.{{3,}} | -{{2,}} | [!?]{{2,}} | \S
    """,
    re.VERBOSE,
)


def python_tokens(caption: str) -> list[str]:
    """Splits a caption into the tokens of Stanford's PTBTokenizer.

    Covers the contractions, quotes, brackets, numbers, abbreviations and hyphens of captions, and
    splits all 40,460 captions of Flickr8k identically. Does not cover the longer lists of
    abbreviations and emoticons, phone numbers and dates. Opening and closing quotes both become
    `'`, since the evaluation drops them.
    """
    text = _REPLACED.sub(lambda found: _WRITTEN[found[0]], caption).lower()
    for place in _SPLIT:
        text = place.sub(" ", text)
    tokens: list[str] = _TOKEN.findall(text.replace('"', "'"))
    tokens = [token.replace(" ", "\xa0") for token in tokens]
    return ["..." if t.startswith("...") else _BRACKETS.get(t, t) for t in tokens]
