"""Verdicts on the claims and relations of a study, from the scores of its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from mnv2_jax.study import verdict
from mnv2_jax.study.design import Claim, Relation, Settings, Study, find_cell
from mnv2_jax.study.results import Scores, scores_of
from mnv2_jax.study.state import State
from mnv2_jax.study.verdict import Chances, Judgement, Prediction


class Judged(NamedTuple):
    """A claim or a relation with its verdict."""

    what: str
    """The claim as a sentence."""
    scores: tuple[Scores, ...]
    """Of the claim's cell, or of the better and the worse one."""
    seeds: tuple[int, ...]
    """Seeds that have a score in all of these."""
    planned: int
    """Number of seeds that the study has."""
    judgement: Judgement | None
    """None while no run has a score."""
    prediction: Prediction | None
    """Whether the published number could be one of these runs; None for a relation."""
    source: str

    @property
    def word(self) -> str:
        """The verdict."""
        return verdict.UNDECIDED if self.judgement is None else self.judgement.verdict

    @property
    def missing(self) -> str | None:
        """What an undecided claim lacks, as a sentence; None if it is decided."""
        if self.judgement is None:
            reason: str | None = "at least 2 are needed for an interval"
        else:
            reason = self.judgement.missing
        done = len(self.seeds)
        if reason is None or done >= self.planned:
            return reason
        runs = "runs are" if len(self.scores) == 1 else "pairs of runs are"
        return f"{done} of {self.planned} {runs} done; {reason}"

    @property
    def sentence(self) -> str:
        """The verdict, and what it lacks."""
        return f"{self.word}: {self.missing}" if self.missing else self.word

    def to_json(self) -> dict[str, Any]:
        """Returns the verdict with its numbers as values that JSON can hold."""
        return {
            "claim": self.what,
            "verdict": self.word,
            "seeds": list(self.seeds),
            "planned": self.planned,
            "missing": self.missing,
            "judgement": None if self.judgement is None else dataclasses.asdict(self.judgement),
            "prediction": None if self.prediction is None else dataclasses.asdict(self.prediction),
            "source": self.source,
        }


def number_of_claims(study: Study) -> int:
    """Returns how many claims and relations are tested at once."""
    return len(study.claims) + len(study.relations)


def judge_all(study: Study, states: Iterable[State]) -> list[Judged]:
    """Judges the claims, then the relations, each at `verdict.LEVEL` on its own."""
    states = list(states)
    return [
        *(_claim(study, claim, states) for claim in study.claims),
        *(_relation(study, relation, states) for relation in study.relations),
    ]


def chances_of(study: Study, claim: Claim) -> Chances:
    """Computes which verdicts the planned seeds will bring on a claim that is exactly true, at the assumed spread."""
    return verdict.chances(_region(claim), len(study.seeds), study.spread)


def sentence(claim: Claim | Relation) -> str:
    """Writes a claim or a relation as a sentence."""
    if isinstance(claim, Relation):
        margin = f" by {100 * claim.margin:.2f} points" if claim.margin else ""
        return f"{_words(claim.better)} beats {_words(claim.worse)}{margin} ({claim.when} {claim.metric})"
    sign = "≥" if claim.side == "at_least" else "="
    return (
        f"{_words(claim.cell)}: {claim.when} {claim.metric} {sign} {100 * claim.published:.2f} %"
        f" ± {100 * claim.tolerance:.2f}"
    )


def _claim(study: Study, claim: Claim, states: list[State]) -> Judged:
    scores = scores_of(study, states, claim.metric, claim.when)[find_cell(study, claim.cell).name]
    seeds, values, planned = tuple(scores.by_seed), list(scores.by_seed.values()), len(study.seeds)
    if not values:
        return Judged(sentence(claim), (scores,), (), planned, None, None, claim.source)
    images = scores.images or None
    judgement = verdict.judge(_region(claim), values, images=images, same_images=claim.same_images)
    prediction = verdict.predict_run(claim.published, values, images=images)
    return Judged(sentence(claim), (scores,), seeds, planned, judgement, prediction, claim.source)


def _relation(study: Study, relation: Relation, states: list[State]) -> Judged:
    all_scores = scores_of(study, states, relation.metric, relation.when)
    better, worse = (all_scores[find_cell(study, cell).name] for cell in (relation.better, relation.worse))
    seeds = tuple(seed for seed in better.by_seed if seed in worse.by_seed)
    judgement = None
    if seeds:
        pairs = [[scores.by_seed[seed] for seed in seeds] for scores in (better, worse)]
        judgement = verdict.beats(*pairs, margin=relation.margin, images=better.images or None)
    return Judged(sentence(relation), (better, worse), seeds, len(study.seeds), judgement, None, relation.source)


def _region(claim: Claim) -> verdict.Claim:
    return verdict.Claim(claim.published, claim.tolerance, claim.side)


def _words(values: Settings) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in values.items()) or "the only cell"
