"""Answers to questions: the VQA accuracy, exact match, and WUPS.

- `score`: VQAv2 by VQA's evaluation (Antol et al., arXiv:1505.00468, section 5;
  GT-Vision-Lab/VQA `vqaEval.py`), OK-VQA by Emu's release, VizWiz by VizWiz's own evaluation.
- `exact`: MSVD-QA and MSRVTT-QA.
- `wups`: open-ended NExT-QA (Xiao et al., arXiv:2105.08276; doc-doc/NExT-OE `eval_oe.py`).
"""

from __future__ import annotations

import functools
import math
import re
import zipfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores, check_keys, warned
from emu_jax.progress import track

STEMMED = (
    "answers were reduced to their stems (Porter's, by nltk), as Emu's release does for OK-VQA"
)

_Answer = str | Mapping[str, Any]  # a dict as in the annotations holds it under "answer"


def score(
    answers: Mapping[Hashable, Sequence[_Answer]],
    predictions: Mapping[Hashable, str],
    *,
    answer_types: Mapping[Hashable, str] | None = None,
    convention: Literal["vqa", "okvqa", "vizwiz"] = "vqa",
) -> Scores:
    """Returns the VQA accuracy, in percent.

    The accuracy of a prediction is min(1, matches / 3) against the other people's answers, averaged
    over leaving out each of the (ten) people in turn.

    `vqa` normalizes prediction and answers alike, and only if people disagree. `okvqa` follows
    Emu's release (`mm_eval/datasets/vqa_tools/vqa_eval.py: OKVQAEval`): the prediction is always
    normalized. If people disagree, their answers lose their punctuation and are stemmed; the
    prediction is always stemmed. `vizwiz` always normalizes the prediction and never the answers.
    White space around the prediction never counts; around people's answers it counts in `okvqa`
    and `vizwiz`.

    Args:
        answers: the human answers to each question, at least one.
        predictions: one answer to each question.
        answer_types: the answer types of the annotations, to report a figure for each.

    Returns:
        `accuracy`, and `accuracy/answer/T` for each type T. The formula gives 0 for a question with
        a single answer; there an exact match counts as correct, with a note.

    Raises:
        UserError: questions lack answers, types or a prediction, or `okvqa` lacks nltk's stemmer.
    """
    check_keys(answers, predictions, "predictions")
    stem = _porter() if convention == "okvqa" else None
    right: dict[Hashable, float] = {}
    single = 0
    for key, human_answers in answers.items():
        people = [a if isinstance(a, str) else a["answer"] for a in human_answers]
        if convention == "vqa":
            people = [_one_line(answer) for answer in people]
        if not people:
            raise UserError(f"question {key!r} has no answers")
        single += len(people) == 1
        prediction, disagree = _one_line(predictions[key]), len(set(people)) > 1
        if stem:
            prediction = _plain_words(stem(_unpunctuated(prediction)))
            people = [stem(_unpunctuated(a)) for a in people] if disagree else people
        elif convention == "vizwiz":
            prediction = normalize(prediction)
        elif disagree:
            people, prediction = [normalize(a) for a in people], normalize(prediction)
        right[key] = 100 * _leave_one_out([answer == prediction for answer in people])

    values = {"accuracy": _mean(right.values())}
    values |= _by_type("accuracy/answer", right, answer_types)
    notes = [STEMMED] if stem else []
    if single:
        note = f"{single} questions have only one answer: an exact match counts as correct"
        notes.append(warned(note))
    return Scores(values, tuple(notes), right)


def exact(answers: Mapping[Hashable, str], predictions: Mapping[Hashable, str]) -> Scores:
    """Returns `accuracy`, the percentage of predictions that equal the answer, in percent.

    Used for MSVD-QA and MSRVTT-QA (Xu et al., MM 2017), whose answers are one lower-case word of a
    vocabulary. Case and surrounding white space are ignored.

    Raises:
        UserError: a question lacks a prediction.
    """
    check_keys(answers, predictions, "predictions")
    right = {
        key: 100.0 * (predictions[key].strip().lower() == answer.strip().lower())
        for key, answer in answers.items()
    }
    return Scores({"accuracy": _mean(right.values())}, (), right)


def wups(
    answers: Mapping[Hashable, Sequence[str]],
    predictions: Mapping[Hashable, str],
    *,
    question_types: Mapping[Hashable, str] | None = None,
) -> Scores:
    """Returns WUPS@0 of open-ended answers, in percent, by NExT-QA's evaluation.

    On the authors' released predictions (HGA, validation) it reproduces their published 21.48.

    Words are lemmatized and stop words dropped. Each word of one answer gets its best Wu-Palmer
    similarity (WordNet 3.0, first senses) to a word of the other. Words with no similar word are
    skipped. The similarities of a side are multiplied, and the smaller product counts. Of several
    answers, the one nearest to the prediction counts. Counting and yes-no questions (DC, DB) must
    match exactly.

    Args:
        answers: the annotated answer, and the additional one of the test split if there is one.
        predictions: one answer to each question.
        question_types: NExT-QA's types: CW, CH, TN, TP, TC, DL, DB, DC or DO.

    Returns:
        `WUPS` and, given types, `WUPS_C`, `WUPS_T`, `WUPS_D` and `WUPS/T` of each type (TN and TP
        are merged). Without nltk's WordNet, `exact` takes the place of `WUPS` in these names, with
        a note: the percentage that matches in lower case without stop words.

    Raises:
        UserError: questions lack answers, types or a prediction.
    """
    check_keys(answers, predictions, "predictions")
    types = {} if question_types is None else {key: question_types.get(key) for key in answers}
    net, notes = _wordnet()
    name = "WUPS" if net else "exact"
    prepare = net.prepare if net else _content_words
    likeness_of: dict[Hashable, float] = {}
    for key, human_answers in track(answers.items(), len(answers), name, "answer"):
        if not human_answers:
            raise UserError(f"question {key!r} has no answers")
        if question_types is not None and types[key] is None:
            raise UserError(f"question {key!r} has no type")
        prediction = prepare(predictions[key])
        if net and types.get(key) not in ("DC", "DB"):
            likeness = max(net.wups(prediction, prepare(answer)) for answer in human_answers)
        else:
            likeness = float(any(prediction == prepare(answer) for answer in human_answers))
        likeness_of[key] = 100 * likeness

    values = {name: _mean(likeness_of.values())}
    if question_types is not None:
        merged = {key: "TN" if kind == "TP" else str(kind) for key, kind in types.items()}
        groups = _by_type(name, likeness_of, {key: kind[0] for key, kind in merged.items()})
        values |= {group.replace("/", "_"): value for group, value in groups.items()}
        values |= _by_type(name, likeness_of, merged)
    return Scores(values, notes, likeness_of)


# ---------------------------------------------------------------- VQA's normalization

_NUMBERS = {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_WITHIN = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official table without the entries that have no effect on lower-case words.
_CONTRACTIONS = {
    **{
        word.replace("'", ""): word
        for word in """
            ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd
            he's how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've
            needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's
            someone'd someone'll someone's something'd something'll that's there'd there're
            there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're
            what's what've when's where'd where's where've who'd who'll who's who've why'll
            why're why's won't would've wouldn't y'all you'd you'll you're you've
        """.split()
    },
    # Words with two apostrophes, with the first or the second missing.
    **{
        short: word
        for word in """
            couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
            someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've
            y'all'll you'd've
        """.split()
        for first, second, third in [word.split("'")]
        for short in (f"{first}{second}'{third}", f"{first}'{second}{third}")
    },
    "somebody'd": "somebodyd",  # sic
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def normalize(answer: str) -> str:
    """Normalizes an answer as VQA's evaluation does.

    Removes each punctuation mark that is next to a space anywhere in the answer, or all marks if
    the answer has a comma within a number. Replaces other marks by spaces, and drops periods that
    no digit follows. Then converts to lower case, turns number words into digits, drops articles
    and restores apostrophes.
    """
    return _plain_words(_unpunctuated(answer))


def _unpunctuated(answer: str) -> str:
    within = _COMMA_WITHIN.search(answer)
    text = answer
    for mark in _PUNCTUATION:
        alone = mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if alone or within else " ")
    # The official code passes a flag (32) in place of the count.
    return _PERIOD.sub("", text, count=32)


def _plain_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _porter() -> Callable[[str], str]:
    """Returns Porter's stemmer. The release stems whole answers, so only the last word changes."""
    try:
        from nltk.stem import PorterStemmer
    except ImportError as error:
        raise UserError(
            f"OK-VQA is scored by stems, with nltk ({error}): pip install 'emu_jax[eval]'"
        ) from None
    return functools.cache(PorterStemmer().stem)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(matches: Sequence[bool]) -> float:
    """Averages min(1, matches / 3) of the other people over the person left out."""
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    return sum(min(1, (total - match) / 3) for match in matches) / len(matches)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _by_type(
    name: str, figures: Mapping[Hashable, float], types: Mapping[Hashable, str] | None
) -> dict[str, float]:
    """Returns the mean over the items of each type, under `name/type`."""
    if types is None:
        return {}
    groups: dict[str, list[float]] = {}
    for key, figure in figures.items():
        if key not in types:
            raise UserError(f"question {key!r} has no type")
        groups.setdefault(types[key], []).append(figure)
    return {f"{name}/{kind}": _mean(groups[kind]) for kind in sorted(groups)}


# ---------------------------------------------------------------- WUPS

NO_WORDNET = (
    "WUPS needs nltk (pip install 'emu_jax[eval]') and its wordnet (python -m nltk.downloader "
    "wordnet averaged_perceptron_tagger_eng): exact match is given in its place"
)
NO_TAGGER = (
    "words were lemmatised without their part of speech, since nltk's "
    "averaged_perceptron_tagger_eng is missing: WUPS can differ slightly"
)
# NExT-OE's stop words: nltk's English list without words that can answer a question.
_STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself
    yourselves he him his himself she she's her hers herself it it's its itself they them their
    theirs themselves what which who whom this that that'll these those am is are was were be
    been being have has had having do does did doing a an the and but if or because as until
    while to from of at for with about into through during again further then here there when
    where why how all any each most other some such only own so than too very s t can will just
    don don't should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't
    doesn doesn't hadn hadn't hasn hasn't haven haven't isn isn't ma mightn mightn't mustn
    mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't
    wouldn wouldn't
    """.split()
)


def _content_words(answer: str) -> list[str]:
    return [word for word in answer.lower().split() if word not in _STOP_WORDS]


class _WordNet:
    """NExT-OE's lemmas and similarities, by nltk's WordNet (lemmatized as by pywsd)."""

    def __init__(self, net: Any, tagged: bool) -> None:
        from nltk.stem import PorterStemmer, WordNetLemmatizer
        from nltk.tokenize import NLTKWordTokenizer

        self._net, self._tagged = net, tagged
        self._split = NLTKWordTokenizer().tokenize
        self._stem = PorterStemmer().stem
        self._base = WordNetLemmatizer().lemmatize
        # A word is represented by its first sense, of any part of speech.
        self._sense = functools.cache(lambda word: next(iter(net.synsets(word)), None))
        self._similarity = functools.cache(self._wu_palmer)

    def prepare(self, answer: str) -> list[str]:
        """Returns the lemmas of an answer, without stop words."""
        lemmas = [self._lemma(word.lower(), pos) for word, pos in self._tag(self._split(answer))]
        return [lemma for lemma in lemmas if lemma not in _STOP_WORDS]

    def wups(self, one: Sequence[str], other: Sequence[str]) -> float:
        """Returns WUPS@0 of two lists of lemmas, the smaller of both directions."""
        return min(self._directed(one, other), self._directed(other, one))

    def _directed(self, one: Sequence[str], other: Sequence[str]) -> float:
        best = [max((self._similarity(a, b) for b in other), default=0.0) for a in one]
        return math.prod(alike) if (alike := [b for b in best if b > 0]) else 0.0

    def _wu_palmer(self, a: str, b: str) -> float:
        if a == b:
            return 1.0
        first, second = self._sense(a), self._sense(b)
        if first is None or second is None:
            return 0.0
        # Only verbs get a common root, so the similarity is asymmetric: a noun is unlike any verb,
        # a verb slightly like any noun. NExT-OE's figures come from nltk 3.3, which does this.
        return first.wup_similarity(second, simulate_root=first.pos() == "v") or 0.0

    def _tag(self, words: list[str]) -> list[tuple[str, str | None]]:
        if not self._tagged:
            return [(word, None) for word in words]
        from nltk import pos_tag

        # A word whose tag is not a WordNet part of speech is tagged again on its own.
        kinds = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}
        return [
            (word, kinds.get(tag[:2]) or kinds.get(pos_tag([word.lower()])[0][1][:2], "n"))
            for word, tag in pos_tag(words)
        ]

    def _lemma(self, word: str, pos: str | None) -> str:
        """Returns the base form or else the stem, whichever WordNet has, or else the word."""
        lemma = self._base(word, pos) if pos else self._net.morphy(word) or word
        stem = self._stem(word)
        return next((form for form in (lemma, stem) if self._sense(form)), word)


def _wordnet() -> tuple[_WordNet | None, tuple[str, ...]]:
    """Returns nltk's WordNet, or None if it is missing, and notes for `Scores`."""
    try:
        import nltk
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return None, (warned(NO_WORDNET),)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read nltk's wordnet: {error}") from None
    try:
        nltk.pos_tag(["word"])
    except LookupError:
        return _WordNet(wordnet, tagged=False), (warned(NO_TAGGER),)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read nltk's averaged_perceptron_tagger_eng: {error}") from None
    return _WordNet(wordnet, tagged=True), ()
