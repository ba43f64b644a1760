"""Visual Dialog v1.0: retrieval scores of a model's ranking of the 100 candidates of a round.

Sparse scores use the single human answer (Das et al., arXiv:1611.08669). Dense scores use human
relevance judgments of all candidates in one round of a dialogue (the VisDial challenge,
batra-mlp-lab/visdial-challenge-starter-pytorch `metrics.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from emu_jax.errors import UserError
from emu_jax.evaluate.scorers import Scores, check_keys, warned


def score(
    ranks: Mapping[Hashable, Sequence[int]],
    answers: Mapping[Hashable, int],
    relevance: Mapping[Hashable, Sequence[float]] | None = None,
) -> Scores:
    """Returns the figures of `sparse`, and those of `dense` if `relevance` is given. The figure of
    a single round is its reciprocal rank, in percent."""
    sparse_scores = sparse(ranks, answers)
    if not relevance:
        return Scores(
            sparse_scores.values,
            ("NDCG is left out: no relevance was given",),
            sparse_scores.per_item,
        )
    judged = dense(ranks, relevance)
    return Scores(judged.values | sparse_scores.values, judged.notes, sparse_scores.per_item)


def sparse(ranks: Mapping[Hashable, Sequence[int]], answers: Mapping[Hashable, int]) -> Scores:
    """Returns `MRR`, `R@1`, `R@5` and `R@10` in percent, and the answer's `mean rank`, from 1.

    Args:
        ranks: for each round, the candidates' ranks in the candidates' order; 1 is the best.
        answers: the index of the correct candidate, from 0 (`gt_index` of the annotations).

    Raises:
        UserError: rounds lack ranks, the ranks are not 1 to their number, or an index is out
            of range.
    """
    check_keys(answers, ranks, "rounds")
    rank_of: dict[Hashable, int] = {}
    for key, answer in answers.items():
        ranked = _checked(key, ranks[key])
        if not 0 <= answer < len(ranked):
            raise UserError(f"round {key!r} has {len(ranked)} candidates, and no number {answer}")
        rank_of[key] = int(ranked[answer])
    answer_ranks = np.array(list(rank_of.values()))
    values = {"MRR": 100 * float((1 / answer_ranks).mean())}
    values |= {f"R@{k}": 100 * float((answer_ranks <= k).mean()) for k in (1, 5, 10)}
    values["mean rank"] = float(answer_ranks.mean())
    return Scores(values, (), {key: 100 / rank for key, rank in rank_of.items()})


def dense(
    ranks: Mapping[Hashable, Sequence[int]], relevance: Mapping[Hashable, Sequence[float]]
) -> Scores:
    """Returns `NDCG`, in percent, over the rounds with relevance judgments.

    The NDCG of a round is DCG@k in ranked order divided by DCG@k in the best order. k is the number
    of candidates with a relevance above 0. The i-th candidate, from 1, contributes its relevance
    divided by log2(i + 1).

    Args:
        ranks: for each round, the candidates' ranks; rounds missing in `relevance` are ignored.
        relevance: for each round, the candidates' relevance from 0 to 1 (`gt_relevance` of the
            annotations). Rounds without a relevant candidate are left out, with a note.

    Raises:
        UserError: rounds lack ranks, the ranks are not 1 to their number, or the numbers of ranks
            and relevances differ.
    """
    check_keys(relevance, [key for key in ranks if key in relevance], "rounds")
    ndcg_of: dict[Hashable, float] = {}
    for key, judged in relevance.items():
        order = np.argsort(_checked(key, ranks[key]))
        gain = np.asarray(judged, np.float64)
        if len(gain) != len(order):
            raise UserError(f"round {key!r} has {len(order)} ranks and {len(gain)} relevances")
        k = int((gain > 0).sum())
        if k:
            discount = np.log2(np.arange(k) + 2)
            best = (np.sort(gain)[::-1][:k] / discount).sum()
            ndcg_of[key] = 100 * float((gain[order][:k] / discount).sum() / best)
    if not ndcg_of:
        raise UserError("NDCG is undefined: no round has a relevant candidate")
    notes = ()
    if left := len(relevance) - len(ndcg_of):
        notes = (warned(f"NDCG leaves out {left} rounds without a relevant candidate"),)
    return Scores({"NDCG": float(np.mean(list(ndcg_of.values())))}, notes, ndcg_of)


def _checked(key: Hashable, ranks: Sequence[int]) -> Int[np.ndarray, " C"]:
    ranked = np.asarray(ranks)
    if not np.array_equal(np.sort(ranked), np.arange(1, len(ranked) + 1)):
        raise UserError(f"the ranks of round {key!r} are not 1 to {len(ranked)}, each once")
    return ranked
