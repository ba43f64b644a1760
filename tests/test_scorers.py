"""The scorers against figures worked by hand."""

import importlib.util
import logging
import math
import shutil
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from emu_jax.errors import UserError
from emu_jax.evaluate import scorers
from emu_jax.evaluate.scorers import captions, frechet, visdial, vqa

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")


@pytest.fixture(autouse=True)
def untold():
    """Every test hears the warnings that are given once."""
    scorers.warned.cache_clear()


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def rel(value):
    return pytest.approx(value, rel=1e-6)


# ---------------------------------------------------------------- captions


def test_cider_by_hand(no_java):
    """Two items, so an n-gram of one item's references has idf log(2 / 1) = L, one of both has
    log(2 / 2) = 0, and one of neither counts as of one: L."""
    found = captions.score(
        {"bus": ["A red bus."], "dog": ["A dog."]}, {"bus": "a red car", "dog": "a dog"}
    )
    # bus: 1-grams (a 0, red L, car L) . (a 0, red L, bus L) / (L sqrt2 L sqrt2) = 1/2
    #      2-grams (a red L, red car L) . (a red L, red bus L) / (L sqrt2 L sqrt2) = 1/2
    #      3-grams share nothing, 4-grams there are none: 0, 0
    # dog: 1-grams 1 ("a" weighs nothing), 2-grams 1, 3- and 4-grams none: 0, 0
    # Lengths are equal, so the penalty is 1. CIDEr-D is ten times the mean over n.
    bus, dog = 10 * (1 / 2 + 1 / 2 + 0 + 0) / 4, 10 * (1 + 1 + 0 + 0) / 4
    assert found.per_item == {"bus": rel(100 * bus), "dog": rel(100 * dog)}
    assert found.values["CIDEr"] == rel(100 * (2.5 + 5) / 2)


def test_cider_clips_and_penalises_length(no_java):
    found = captions.score({1: ["red bus", "red bus stop"], 2: ["dog"]}, {1: "red red", 2: "cat"})
    # Prediction (red 2L): norm 2L. Clipped to the reference's L.
    # First reference (red L, bus L): L L / (2L . L sqrt2) = 1 / (2 sqrt2)
    # Second (red L, bus L, stop L): L L / (2L . L sqrt3) = 1 / (2 sqrt3); it is longer by one
    # word, so the penalty is exp(-1 / (2 . 6^2)).
    # "red red" is in neither. Mean over two references and four n.
    first, second = 1 / (2 * math.sqrt(2)), math.exp(-1 / 72) / (2 * math.sqrt(3))
    one = 10 * (first + second) / 2 / 4
    assert found.per_item == {1: rel(100 * one), 2: 0}
    assert found.values["CIDEr"] == rel(100 * one / 2)


def test_bleu_by_hand(no_java):
    found = captions.score(
        {1: ["the cat sat", "a cat is here"], 2: ["a dog runs fast"]},
        {1: "the the the cat", 2: "a dog"},
    ).values
    # 1-grams: of "the the the cat", "the" counts once (the most in one reference) and "cat"
    # once, 2 of 4; "a dog" 2 of 2: 4/6. 2-grams: "the cat" of 3, "a dog" of 1: 2/4.
    # 3-grams: 0 of 2. Lengths 4 + 2; the nearest references are of 4 + 4.
    brevity = math.exp(1 - 8 / 6)
    assert found["BLEU-1"] == rel(100 * brevity * 4 / 6)
    assert found["BLEU-2"] == rel(100 * brevity * math.sqrt(4 / 6 * 2 / 4))
    assert found["BLEU-3"] == pytest.approx(0, abs=1e-3)
    assert found["BLEU-4"] == pytest.approx(0, abs=1e-1)


def test_rouge_by_hand(no_java):
    found = captions.score(
        {1: ["police kill the gunman", "police then killed him"], 2: ["a dog"]},
        {1: "police killed", 2: "a dog"},
    ).values
    # Longest common subsequences 1 and 2. Precision 2/2 (the best), recall 2/4 (the best),
    # beta 1.2: F = (1 + 1.44) P R / (R + 1.44 P). The second item has 1.
    f = 2.44 * 1 * 0.5 / (0.5 + 1.44 * 1)
    assert found["ROUGE-L"] == rel(100 * (f + 1) / 2)


# What Stanford's tokenizer makes of it, less the punctuation that the evaluation drops.
TOKENS = {
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    'Two dogs (brown) aren\'t "playing", they\'re asleep...':
        "two dogs -lrb- brown -rrb- are n't playing they 're asleep",
    "a boy's hat; the dogs' toys: 3,000 items & $5.50/50% off!":
        "a boy 's hat the dogs toys 3,000 items & $ 5.50 / 50 % off",
    "it's 3:30 o'clock - the cat can't/cannot move -- e.g. Mr. Smith, U.S. flag":
        "it 's 3:30 o'clock the cat ca n't / can not move e.g. mr. smith u.s. flag",
    "gonna wanna a black/white t-shirt & rock 'n' roll café 'quoted'":
        "gon na wan na a black/white t-shirt & rock 'n' roll café quoted",
    "red,white and blue;and end.no space, at 7:30pm on the 2nd":
        "red white and blue and end.no space at 7:30 pm on the 2nd",
    "an em—dash … ‘single’ “double” don’t ½ cup": "an em dash single double do n't 1/2 cup",
    "rock'n'roll, y'all: ma'am shouldn't've; I'd've": "rock 'n' roll y' all ma'am should n't 've "
        "i 'd 've",
    "hello!!! two\nlines\r\nof text\u2028here": "hello !!! two lines of text here",
    "St. Louis fans, a T. Rex. at 5 p.m.": "st. louis fans a t. rex at 5 p.m.",
    # Within a word the tokenizer writes a no-break space, whichever of both it read.
    "corner of 22 3/4 St": "corner of 22\xa03/4 st",
    "1\xa01/2 cups, 10-3/4 inch, 3 1/2-inch": "1\xa01/2 cups 10-3/4 inch 3\xa01/2 inch",
    "x1 1/2 and 12345 1/2": "x1 1/2 and 12345 1/2",
    "no\xa0break, an\u3000ideographic\tspace \xa0": "no break an ideographic space",
    "": "",
}  # fmt: skip


def test_python_tokenizer(no_java, caplog):
    found, notes = captions.tokenize(list(TOKENS))
    assert found == list(TOKENS.values())
    assert notes == (captions.PYTHON_TOKENIZER,)


@needs_java
def test_java_tokenizer(tmp_path, capfd):
    found, notes = captions.tokenize(list(TOKENS))
    assert found == list(TOKENS.values())
    assert notes == ()
    assert capfd.readouterr() == ("", "")


@needs_java
def test_both_tokenizers_give_the_same_scores(monkeypatch, tmp_path):
    references = {1: ["A man's riding a wave.", "the man (surfer) rides"], 2: ["Two dogs, a cat."]}
    predictions = {1: "a man's riding.", 2: "two dogs; isn't it?"}
    ours = captions.score(references, predictions)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert captions.score(references, predictions).values == ours.values


@needs_java
def test_rouge_counts_words_as_the_official_evaluation():
    """ "22 3/4" is one word. Of 6 words the prediction has 4 of the reference's 4 in order:
    precision 4/6, recall 1, beta 1.2."""
    references = {"a": ["corner of 22 3/4 st"], "b": ["a dog"]}
    predictions = {"a": "the corner of 22 3/4 st 8th", "b": "a dog"}
    precision, recall, beta = 4 / 6, 1, 1.2
    f = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    found = captions.score(references, predictions)
    assert found.values["ROUGE-L"] == pytest.approx(100 * (f + 1) / 2)


def test_the_missing_java_is_told_once(no_java, caplog, capsys):
    with caplog.at_level(logging.WARNING, "emu_jax"):
        for _ in range(2):
            found = captions.score({1: ["a cat"], 2: ["a dog"]}, {1: "a cat", 2: "a cow"})
            assert found.notes == (captions.PYTHON_TOKENIZER,)
    assert caplog.messages == [captions.PYTHON_TOKENIZER]
    assert capsys.readouterr().out == ""


def test_java_that_fails_is_a_user_error(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no such jar >&2\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"status 3, 0 of 1 lines\): no such jar"):
        captions.tokenize(["a cat"])


def test_captions_that_cannot_be_scored(monkeypatch, no_java):
    with pytest.raises(UserError, match="1 of 2 captions missing, 'b' first"):
        captions.score({"a": ["x"], "b": ["y"]}, {"a": "x"})
    with pytest.raises(UserError, match="unknown items, 'c' first"):
        captions.score({"a": ["x"]}, {"a": "x", "c": "y"})
    with pytest.raises(UserError, match="'a' has no reference"):
        captions.score({"a": []}, {"a": "x"})
    with pytest.raises(UserError, match="nothing to score"):
        captions.score({}, {})
    assert "single item" in captions.score({"a": ["x"]}, {"a": ""}).notes[-1]
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    for name in [n for n in sys.modules if n.startswith("pycocoevalcap.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"emu_jax\[eval\]"):
        captions.score({"a": ["x"]}, {"a": "x"})


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("The dog and a cat", "dog and cat"),
        ("it's a dog.", "it's dog"),
        ("dont", "don't"),
        ("wouldnt've", "wouldn't've"),
        ("somebody'd", "somebodyd"),  # the official table has it the wrong way round
        ("Yes!", "yes"),  # nothing after it: a space, which goes
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),  # next to a space: removed
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,000", "1000"),  # a comma within a number: punctuation is removed everywhere
        ("1,000-2,000", "10002000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("$5", "$5"),  # not in the list
        ("what's up?", "what's up"),
        ("", ""),
    ],
)
def test_vqa_normalisation(answer, normal):
    assert vqa.normalize(answer) == normal


def test_vqa_accuracy_by_hand():
    # 2 of 10 say so: leaving out one of the two, 1/3; one of the other eight, 2/3.
    two = (2 * 1 / 3 + 8 * 2 / 3) / 10
    # 3 of 10: 2/3 for three of the subsets, else 1. 1 of 10: 0 once, else 1/3.
    three, one = (3 * 2 / 3 + 7 * 1) / 10, 9 * (1 / 3) / 10
    answers = {
        "two": ["red"] * 2 + ["blue"] * 8,
        "three": [{"answer": "Red.", "answer_id": i} for i in range(3)] + ["blue"] * 7,
        "one": ["red"] + [f"colour {i}" for i in range(9)],
        "four": ["the red"] * 4 + ["blue"] * 6,
        "none": ["blue"] * 9 + ["green"],
    }
    types = {"two": "other", "three": "other", "one": "number", "four": "number", "none": "other"}
    found = vqa.score(answers, dict.fromkeys(answers, "Red"), answer_types=types)
    expected = {"two": two, "three": three, "one": one, "four": 1, "none": 0}
    assert found.per_item == {key: rel(100 * value) for key, value in expected.items()}
    assert found.values == {
        "accuracy": rel(100 * (two + three + one + 1) / 5),
        "accuracy/answer/number": rel(100 * (one + 1) / 2),
        "accuracy/answer/other": rel(100 * (two + three) / 3),
    }
    assert found.notes == ()


def test_vqa_normalises_only_where_people_disagree():
    same, other = {"q": ["yes"] * 10}, {"q": ["yes"] * 9 + ["no"]}
    assert vqa.score(same, {"q": "yes\n"}).values == {"accuracy": 100}
    assert vqa.score(same, {"q": "Yes."}).values == {"accuracy": 0}
    assert vqa.score(other, {"q": "Yes."}).values == {"accuracy": 100}


def test_white_space_around_peoples_answers():
    """VQA's code drops it; the release's for OK-VQA and VizWiz's drop it around the prediction
    alone. Of ten people eight say "yes" and two " no\\n": none of 8 is right, or both."""
    people = {"q": ["yes"] * 8 + [" no\n"] * 2}
    two = (2 * 1 / 3 + 8 * 2 / 3) / 10
    assert vqa.score(people, {"q": " no\t"}).values == {"accuracy": rel(100 * two)}
    assert vqa.score({"q": [" yes"] * 10}, {"q": "yes"}).values == {"accuracy": 100}
    for convention in ("okvqa", "vizwiz"):
        found = vqa.score(people, {"q": " no\t"}, convention=convention)
        assert found.values == {"accuracy": 0}, convention
        found = vqa.score(people, {"q": "yes\n"}, convention=convention)
        assert found.values == {"accuracy": 100}, convention
        same = vqa.score({"q": [" yes"] * 10}, {"q": "yes"}, convention=convention)
        assert same.values == {"accuracy": 0}, convention


def test_vizwiz_normalises_only_the_prediction():
    same = {"q": [{"answer": "yes", "answer_confidence": "yes"}] * 10}
    assert vqa.score(same, {"q": "Yes."}, convention="vizwiz").values == {"accuracy": 100}
    capital = {"q": ["Yes"] * 9 + ["no"]}
    assert vqa.score(capital, {"q": "Yes"}, convention="vizwiz").values == {"accuracy": 0}


def test_okvqa_stems_as_the_release_does():
    some = {"q": ["surf"] * 5 + ["pony tails."] * 4 + ["Race"]}
    for said, right in (("Surfing.", 1), ("the surf", 1), ("pony tail", 1), ("pony, tails", 1)):
        found = vqa.score(some, {"q": said}, convention="okvqa")
        assert found.values == {"accuracy": 100 * right}, said
        assert found.notes == (vqa.STEMMED,)
    # The stemmer sees whole answers: the last word of several alone is stemmed.
    assert vqa.score(some, {"q": "ponies tail"}, convention="okvqa").values == {"accuracy": 0}
    # Where all agree, their answer stays as it is; the prediction is stemmed all the same.
    same = {"q": ["surfing"] * 10}
    assert vqa.score(same, {"q": "surfing"}, convention="okvqa").values == {"accuracy": 0}
    # The answers keep their articles and number words, the prediction does not.
    two = {"q": ["two"] * 9 + ["a cat"]}
    assert vqa.score(two, {"q": "two"}, convention="okvqa").values == {"accuracy": 0}


def test_vqa_with_one_answer(caplog):
    found = vqa.score({1: ["red"], 2: ["red"]}, {1: "red", 2: "blue"})
    assert found.values == {"accuracy": 50}
    assert found.notes == tuple(caplog.messages) and "2 questions" in found.notes[0]


def test_vqa_that_cannot_be_scored():
    with pytest.raises(UserError, match="1 of 1 predictions missing"):
        vqa.score({1: ["a"]}, {})
    with pytest.raises(UserError, match="question 1 has no answers"):
        vqa.score({1: []}, {1: "a"})
    with pytest.raises(UserError, match="question 1 has no type"):
        vqa.score({1: ["a", "b"]}, {1: "a"}, answer_types={})


def test_exact_match():
    found = vqa.exact({1: "dog", 2: "Cat", 3: "run"}, {1: " Dog", 2: "cats", 3: "run."})
    assert found.per_item == {1: 100, 2: 0, 3: 0}
    assert found.values == {"accuracy": rel(100 / 3)}


@pytest.fixture
def nltk_data(monkeypatch, tmp_path):
    """The folder where nltk looks for data: empty, whatever else it has loaded."""
    import nltk
    from nltk.corpus import wordnet

    def forget():
        if "_unload" in vars(wordnet):
            wordnet._unload()

    forget()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    yield tmp_path
    forget()


def write_wordnet(folder):
    """WordNet's files with the nouns entity > animal > dog, cat and the verbs move > run."""
    folder.mkdir(parents=True)
    parents = {
        "n": {"entity": None, "animal": "entity", "dog": "animal", "cat": "animal"},
        "v": {"move": None, "run": "move"},
        "a": {"red": None},
        "r": {"fast": None},
    }
    for pos, name in {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}.items():
        # A synset is called by where its line begins, so lines are of one length.
        head = "  1 WordNet 3.0 Copyright\n"
        offset = {word: len(head) + 80 * i for i, word in enumerate(parents[pos])}
        data, index = head, head
        for word, parent in parents[pos].items():
            pointers = "000" if parent is None else f"001 @ {offset[parent]:08d} {pos} 0000"
            frames = " 00" if pos == "v" else ""
            line = f"{offset[word]:08d} 03 {pos} 01 {word} 0 {pointers}{frames} | {word}"
            data += line.ljust(79) + "\n"
            symbols = "0" if parent is None else "1 @"
            index += f"{word} {pos} 1 {symbols} 1 0 {offset[word]:08d}  \n"
        (folder / f"data.{name}").write_text(data)
        (folder / f"index.{name}").write_text(index)
        (folder / f"{name}.exc").write_text("ran run\n" if pos == "v" else "")
    (folder / "lexnames").write_text("".join(f"{i:02d}\tname{i}\t1\n" for i in range(45)))
    (folder / "index.sense").write_text("")
    (folder / "cntlist.rev").write_text("")


def test_wups_by_hand(nltk_data, caplog):
    write_wordnet(nltk_data / "corpora" / "wordnet")
    answers = {
        1: ["cat"],
        2: ["the dog"],
        3: ["cat", "dogs"],
        4: ["dog"],
        5: ["dog"],
        6: ["xyz"],
        7: ["cat"],
    }
    predictions = {
        1: "dogs ran",
        2: "dog",
        3: "an animal",
        4: "run",
        5: "cat",
        6: "cat",
        7: "xyz dog",
    }
    types = {1: "CW", 2: "DB", 3: "TP", 4: "TN", 5: "DC", 6: "DO", 7: "DL"}
    found = vqa.wups(answers, predictions, question_types=types)
    # Wu-Palmer: twice the depth of what both are over the depths of both, entity being at 1:
    # dog and cat (3 each) are animals (2): 4 / 6. dog and animal: 4 / 5. A verb is put under a
    # common root at 1, run being at 3 and dog, below that root, at 4: 2 / 7; a noun is not.
    # 1: dog-cat 2/3 times run-cat 2/7, against cat-dog 2/3: the smaller.
    # 3: the better of cat and dog, which are alike. 4: run-dog 2/7, but dog-run nothing.
    # 5: counting must match. 6: no such word. 7: a word like no other is passed over.
    expected = {1: 2 / 3 * 2 / 7, 2: 1, 3: 4 / 5, 4: 0, 5: 0, 6: 0, 7: 2 / 3}
    assert found.per_item == {key: rel(100 * value) for key, value in expected.items()}
    assert found.values["WUPS"] == rel(100 * sum(expected.values()) / 7)
    assert found.values["WUPS_C"] == found.values["WUPS/CW"] == rel(100 * 4 / 21)
    assert found.values["WUPS_T"] == found.values["WUPS/TN"] == rel(40)
    assert found.values["WUPS_D"] == rel(100 * (1 + 2 / 3) / 4)
    assert found.notes == (vqa.NO_TAGGER,) == tuple(caplog.messages)


def test_wups_without_wordnet_is_exact_match(nltk_data, caplog):
    found = vqa.wups({1: ["The dog"], 2: ["cat", "dog"], 3: ["cat"]}, {1: "dog", 2: "dog", 3: "x"})
    assert found.values == {"exact": rel(200 / 3)}
    assert found.notes == (vqa.NO_WORDNET,) == tuple(caplog.messages)


def test_a_damaged_wordnet_is_a_user_error(nltk_data):
    write_wordnet(nltk_data / "corpora" / "wordnet")
    (nltk_data / "corpora" / "wordnet" / "data.adj").unlink()
    with pytest.raises(UserError, match="cannot read nltk's wordnet"):
        vqa.wups({1: ["cat"]}, {1: "cat"})


# ---------------------------------------------------------------- dialogues


def test_ranks_by_hand():
    ranks = {"a": [1, 2, 3], "b": [3, 1, 2], "c": list(range(100, 0, -1))}
    found = visdial.sparse(ranks, {"a": 0, "b": 0, "c": 93})
    # The answers rank 1, 3 and 100 - 93 = 7.
    assert found.values == {
        "MRR": rel(100 * (1 + 1 / 3 + 1 / 7) / 3),
        "R@1": rel(100 / 3),
        "R@5": rel(200 / 3),
        "R@10": 100,
        "mean rank": rel(11 / 3),
    }
    assert found.per_item == {"a": 100, "b": rel(100 / 3), "c": rel(100 / 7)}


def test_ndcg_by_hand(caplog):
    ranks = {"a": [1, 3, 2, 4], "b": [2, 1, 3], "c": [1, 2], "unjudged": [1]}
    relevance = {"a": [0, 0.5, 1, 0], "b": [1, 0.2, 0.4], "c": [0, 0]}
    found = visdial.dense(ranks, relevance)
    # a: k = 2. In the model's order 0, 1 (then 0.5, past k); at best 1, 0.5.
    a = (0 / math.log2(2) + 1 / math.log2(3)) / (1 / math.log2(2) + 0.5 / math.log2(3))
    # b: k = 3. In the model's order 0.2, 1, 0.4; at best 1, 0.4, 0.2.
    b = (0.2 + 1 / math.log2(3) + 0.4 / 2) / (1 + 0.4 / math.log2(3) + 0.2 / 2)
    assert found.per_item == {"a": rel(100 * a), "b": rel(100 * b)}
    assert found.values == {"NDCG": rel(100 * (a + b) / 2)}
    assert found.notes == ("NDCG leaves out 1 rounds without a relevant candidate",)
    assert caplog.messages == list(found.notes)

    both = visdial.score(ranks, {"a": 2, "b": 0, "c": 0, "unjudged": 0}, relevance)
    assert both.values["NDCG"] == found.values["NDCG"]
    assert both.values["mean rank"] == rel((2 + 2 + 1 + 1) / 4)
    assert "NDCG" not in visdial.score(ranks, {k: 0 for k in ranks}).values


def test_rankings_that_cannot_be_scored():
    with pytest.raises(UserError, match="'a' are not 1 to 3"):
        visdial.sparse({"a": [0, 1, 2]}, {"a": 0})
    with pytest.raises(UserError, match="no number 3"):
        visdial.sparse({"a": [1, 2, 3]}, {"a": 3})
    with pytest.raises(UserError, match="2 ranks and 1 relevances"):
        visdial.dense({"a": [1, 2]}, {"a": [1]})
    with pytest.raises(UserError, match="1 of 1 rounds missing"):
        visdial.dense({"b": [1, 2]}, {"a": [1]})
    with pytest.raises(UserError, match="undefined"):
        visdial.dense({"a": [1, 2]}, {"a": [0, 0]})


# ---------------------------------------------------------------- Fréchet distance


def gaussian(rng, width, rank=None):
    factor = rng.normal(size=(width, rank or width))
    return frechet.Gaussian(rng.normal(size=width), factor @ factor.T)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_distance_against_the_matrix_square_root(width):
    rng = np.random.default_rng(width)
    a, b = gaussian(rng, width), gaussian(rng, width)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    apart = a.mean - b.mean
    expected = apart @ apart + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet.distance(a, b) == rel(expected) == frechet.distance(b, a)


def test_distance_of_diagonal_covariances():
    # Independent features: (m_a - m_b)^2 + (s_a - s_b)^2 for each, s being deviations.
    a = frechet.Gaussian(np.array([0.0, 1, 2]), np.diag([4.0, 9, 0]))
    b = frechet.Gaussian(np.array([1.0, 1, 0]), np.diag([1.0, 16, 25]))
    assert frechet.distance(a, b) == rel((1 + 0 + 4) + ((2 - 1) ** 2 + (3 - 4) ** 2 + (0 - 5) ** 2))


def test_distance_of_singular_covariances():
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 48))
    zero = np.zeros(48)
    # Of u u^T and v v^T the root of the product has trace |u . v|.
    found = frechet.distance(
        frechet.Gaussian(zero, np.outer(u, u)), frechet.Gaussian(zero, np.outer(v, v))
    )
    assert found == rel(u @ u + v @ v - 2 * abs(u @ v))
    # Spread in directions that are orthogonal has nothing in common, and far less than 1e-8,
    # the root of rounding, may come of it.
    basis = scipy.linalg.qr(rng.normal(size=(48, 48)))[0]
    one, other = 3 * basis[:, :20], 5 * basis[:, 20:40]
    found = frechet.distance(
        frechet.Gaussian(zero, one @ one.T), frechet.Gaussian(zero, other @ other.T)
    )
    assert found == pytest.approx(20 * 9 + 20 * 25, rel=1e-12)
    # Fewer images than features: nothing lies between a Gaussian and itself.
    same = gaussian(rng, 48, rank=5)
    assert abs(frechet.distance(same, same)) < 1e-12 * np.trace(same.covariance)
    none = frechet.Gaussian(zero, np.zeros((48, 48)))
    assert frechet.distance(none, none) == 0


def test_moments_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(1)
    features = (1e4 + rng.normal(size=(101, 6)) * [1, 2, 3, 1e-2, 1, 1]).astype(np.float32)
    whole = frechet.Moments(6)
    whole.add(features)
    joined = frechet.Moments(6)
    for part in (features[:0], *np.array_split(features, 9)):
        joined.add(part)
    exact = features.astype(np.float64)
    for found in (whole.gaussian(), joined.gaussian()):
        assert found.count == 101
        np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12
        )
    with pytest.raises(UserError, match="at least two images, not 0"):
        frechet.Moments(6).gaussian()


def test_distances_that_cannot_be_taken():
    rng = np.random.default_rng(2)
    with pytest.raises(UserError, match="width 3 cannot be compared with features of width 4"):
        frechet.distance(gaussian(rng, 3), gaussian(rng, 4))
    broken = frechet.Gaussian(np.array([np.nan]), np.ones((1, 1)))
    with pytest.raises(UserError, match="not finite"):
        frechet.distance(broken, broken)


def test_statistics_come_back(tmp_path):
    path = tmp_path / "coco.npz"
    stored = gaussian(np.random.default_rng(3), 5)
    frechet.save_statistics(stored, path)
    assert [p.name for p in tmp_path.iterdir()] == ["coco.npz"]
    read = frechet.load_statistics(path)
    np.testing.assert_array_equal(read.mean, stored.mean)
    np.testing.assert_array_equal(read.covariance, stored.covariance)

    with pytest.raises(UserError, match="does not exist"):
        frechet.load_statistics(tmp_path / "none.npz")
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UserError, match="mu and sigma"):
        frechet.load_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"mu is \(3,\) and sigma \(2, 2\)"):
        frechet.load_statistics(path)
    array = tmp_path / "mu.npy"
    np.save(array, np.zeros(3))
    for content in (path.read_bytes()[:-40], b"", array.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*coco\.npz as an \.npz"):
            frechet.load_statistics(path)


def test_fid_needs_a_network(tmp_path):
    with pytest.raises(UserError, match="inception-2015-12-05.pt"):
        frechet.Inception(None)
    with pytest.raises(UserError, match="does not exist"):
        frechet.Inception(tmp_path / "none.pt")


@pytest.fixture
def network(tmp_path):
    """TorchScript in the shape of the 2015 Inception: its features are the means of the three
    channels and the height and width that it was given; without the flag, something else."""
    torch = pytest.importorskip("torch")

    class Tiny(torch.nn.Module):
        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            size = torch.tensor([float(img.shape[2]), float(img.shape[3])])
            means = img.to(torch.float32).mean(dim=[2, 3])
            features = torch.cat([means, size.unsqueeze(0).repeat(img.shape[0], 1)], dim=1)
            return features if return_features else features[:, 0]

    path = tmp_path / "inception.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Tiny()).save(path)
    return path


def some_images(tmp_path):
    rng = np.random.default_rng(4)
    shapes = [(8, 12), (20, 10), (8, 12), (5, 5), (20, 10)]
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    files = []
    for i, image in enumerate(images):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(files[-1])
    return images, files


def test_features_of_images(network, tmp_path):
    images, files = some_images(tmp_path)
    inception = frechet.Inception(network)
    expected = np.stack([[*p.reshape(-1, 3).mean(0), *p.shape[:2]] for p in images])
    np.testing.assert_allclose(inception(images), expected, rtol=1e-5)
    # From files, and in batches that the number of images is no multiple of.
    for given in (images, files):
        found = frechet.moments(given, inception, batch=2).gaussian()
        np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            found.covariance, np.cov(expected, rowvar=False), rtol=1e-4, atol=1e-3
        )
    with pytest.raises(UserError, match="no drawings"):
        frechet.moments([], inception, what="drawings")


def test_features_of_clean_images(network, tmp_path):
    images, _ = some_images(tmp_path)
    grey = np.full((30, 40, 3), [10, 128, 250], np.uint8)
    found = frechet.Inception(network, "clean")([*images, grey])
    assert (found[:, 3:] == 299).all()
    # Even colour stays as it is; what antialiasing averages keeps its mean.
    np.testing.assert_allclose(found[-1, :3], [10, 128, 250], rtol=1e-5)
    board = np.zeros((1196, 1196, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255
    clean = frechet._clean(board)
    assert np.abs(clean[8:-8, 8:-8] - 127.5).max() < 1.5  # rather than black, white or stripes


def test_fid_of_a_set_with_itself(network, tmp_path, caplog):
    images, _ = some_images(tmp_path)
    inception = frechet.Inception(network)
    found = frechet.moments(images, inception).gaussian()
    scored = frechet.score(found, found, [inception.note])
    assert scored.values["FID"] == pytest.approx(0, abs=1e-9 * np.trace(found.covariance))
    assert scored.notes[0] == "5 images against 5 real ones"
    assert "not antialiased" in scored.notes[1] and "inception.pt" in scored.notes[1]
    assert "singular" in scored.notes[2] and caplog.messages == [scored.notes[2]]
    assert "bicubic" in frechet.Inception(network, "clean").note
    with pytest.raises(UserError, match="resized by"):
        frechet.Inception(network, "bilinear")  # pyright: ignore


@needs_torch
def test_a_network_that_is_none(tmp_path):
    import torch

    path = tmp_path / "weights.pth"
    for content in (b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not TorchScript"):
            frechet.Inception(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not TorchScript"):
        frechet.Inception(path)
