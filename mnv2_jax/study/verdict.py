"""Statistics of a study: what the scores of a few seeds say of a published number.

Scores are shares of 1, such as 0.932 for 93.2 % of the images. A claim holds if the true mean, over all seeds that
could be drawn, lies in the claim's region; Student's interval over the seeds that were run judges it. At a level of
95 %, the wrong side of a border is taken in at most 2.5 % of studies, and any wrong verdict is given in at most 5 %, if
scores are normal, whatever their spread.

That holds for a number of seeds that was fixed beforehand. Who looks at the verdict, adds seeds while it is undecided,
and looks again, has to count every look in `family_level`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import integrate, special

LEVEL = 0.95
"""Level of an interval that judges one claim."""
REPRODUCED, NOT_REPRODUCED, BETTER, UNDECIDED = "reproduced", "not reproduced", "better", "undecided"
MOST_SEEDS = 1000
"""Number of seeds, in all, up to which one is sought that would decide."""
ROUNDING = 1e-6
"""Spread up to which scores are equal: that of float32, and less than one image of a million."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is published of a cell, and how near the true mean must come for it to hold.

    Raises:
      ValueError: if the tolerance is negative or the side unknown.
    """

    value: float
    """Published score."""
    tolerance: float
    """Distance from the published score that still counts as the same, such as 0.005."""
    side: Literal["equal", "at_least"] = "equal"
    """The true mean must lie within value ± tolerance (equal), or not below value - tolerance (at_least)."""

    def __post_init__(self) -> None:
        if not self.tolerance >= 0 or self.side not in ("equal", "at_least"):
            raise ValueError(f"a claim has a tolerance >= 0 and a side 'equal' or 'at_least'; got {self}")

    @property
    def region(self) -> tuple[float, float]:
        """True means for which the claim holds: its borders, which belong to it; the upper one may be infinite."""
        return self.value - self.tolerance, self.value + self.tolerance if self.side == "equal" else np.inf


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the scores of a cell's seeds say of their true mean."""

    seeds: int
    mean: float
    spread: float | None
    """Standard deviation over the seeds (divided by seeds - 1); None for one seed."""
    level: float
    low: float | None
    high: float | None
    """Ends of the interval of the true mean; None where the spread is unknown."""
    sampling_error: float | None
    """Half the width of the test set's own interval, at the same level; None without the number of its images. It is
    part of `low` and `high` only where it was joined."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a study says of a claim."""

    verdict: str
    """`REPRODUCED` if the interval lies in the claim's region, `NOT_REPRODUCED` if below it, `BETTER` if above the
    region of a claim of equality, otherwise `UNDECIDED`."""
    summary: Summary
    more_seeds: int | None
    """Fewest additional seeds that would decide if mean and spread stayed as they are, which chance makes about an even
    bet. None if a verdict was reached, the spread is unknown, or no number up to `MOST_SEEDS` would."""
    missing: str | None
    """What an undecided study lacks, as a sentence; None if a verdict was reached."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Where one more run would land, and whether a published one did."""

    low: float | None
    high: float | None
    """Ends of the interval of a new single run; None where the spread is unknown."""
    holds: bool | None
    """Whether the published score lies in it."""


@dataclasses.dataclass(frozen=True)
class Chances:
    """Probabilities of the verdicts on a claim, before anything runs."""

    reproduced: float
    not_reproduced: float
    better: float
    undecided: float

    @property
    def decided(self) -> float:
        """Probability of any verdict, right or wrong."""
        return 1 - self.undecided


def summarise(
    scores: Sequence[float], *, images: int | None = None, same_images: bool = True, level: float = LEVEL
) -> Summary:
    """Summarises the scores of a cell by Student's interval over its seeds.

    A spread below one image's step, 1 / images, counts as that step, since scores move in such steps and a few of them
    may be equal by luck. Equal scores without the number of images have an unknown spread, and no interval.

    Args:
      scores: one for each seed.
      images: number of test images, if the scores are shares of them that are right.
      same_images: whether what the scores are held against was measured on the same test images. Otherwise, as for a
        statement about all images that there could be, the sampling error of the test set is joined.
      level: probability that the interval holds the true mean.

    Raises:
      ValueError: if there is no score or one isn't finite, if the number of images is missing where the sampling error
        must be joined, or if it is there and the mean isn't a share of 1.
    """
    values = _finite(scores)
    own = None if images is None else sampling_error(float(values.mean()), images, level)
    return _summary(values, _known_spread(values, images), own, _joined(own, same_images), level)


def judge(
    claim: Claim,
    scores: Sequence[float],
    *,
    images: int | None = None,
    same_images: bool = True,
    level: float = LEVEL,
) -> Judgement:
    """Judges a claim by the scores of a cell; arguments and errors are those of `summarise`."""
    summary = summarise(scores, images=images, same_images=same_images, level=level)
    spread = _known_spread(_finite(scores), images)
    return _judgement(claim, summary, spread, _joined(summary.sampling_error, same_images))


def beats(
    first: Sequence[float],
    second: Sequence[float],
    *,
    margin: float = 0.0,
    images: int | None = None,
    level: float = LEVEL,
) -> Judgement:
    """Judges whether one cell beats another on the same test images, by Student's interval of paired differences.

    Args:
      first: scores of the cell that should be better, one for each seed.
      second: scores of the other cell, for the same seeds in the same order.
      margin: difference of the true means from which on the first beats the second.
      images: number of test images, whose step is the least spread, as in `summarise`.
      level: probability that the interval holds the true difference.

    Returns:
      The judgement, whose summary is that of the differences, first - second. Its verdict is never `BETTER`.

    Raises:
      ValueError: if the scores aren't pairs, or one isn't finite.
    """
    if len(first) != len(second):
        raise ValueError(f"paired differences need the same seeds of both cells; got {len(first)} and {len(second)}")
    differences = _finite(first) - _finite(second)
    spread = _known_spread(differences, images)
    return _judgement(Claim(margin, 0.0, "at_least"), _summary(differences, spread, None, 0.0, level), spread, 0.0)


def predict_run(
    published: float, scores: Sequence[float], *, images: int | None = None, level: float = LEVEL
) -> Prediction:
    """Predicts a new single run on the same test images, mean ± t s √(1 + 1/n), as a published number often is one.

    Args:
      published: score of that run.
      scores: those of the cell, one for each seed.
      images: number of test images, whose step is the least spread, as in `summarise`.
      level: probability that the interval holds the new run, if it is made like those of the cell.

    Raises:
      ValueError: if there is no score or one isn't finite.
    """
    values = _finite(scores)
    # That of the mean, times √n for a single run and √(1 + 1/n) for the mean's own error: √(n + 1) in all.
    half = float(half_width(_known_spread(values, images), len(values), level) * np.sqrt(len(values) + 1))
    if np.isinf(half):
        return Prediction(None, None, None)
    low, high = float(values.mean()) - half, float(values.mean()) + half
    return Prediction(low, high, low <= published <= high)


def chances(
    claim: Claim,
    seeds: int,
    spread: float,
    *,
    truth: float | None = None,
    images: int | None = None,
    same_images: bool = True,
    level: float = LEVEL,
) -> Chances:
    """Computes how probable each verdict is, so that a study that can't decide its claims needn't run.

    Given the spread that the seeds happen to show, each probability is the normal distribution's; they are integrated
    over the shown spread, whose distribution is χ. For a claim of one side that gives the noncentral t distribution.

    Args:
      claim: what will be judged.
      seeds: planned number of them.
      spread: assumed standard deviation over seeds.
      truth: assumed true mean; None takes the published value, for a claim that is exactly true.
      images: number of test images, if the scores are shares of them that are right.
      same_images: as in `summarise`.
      level: that at which the claim will be judged.

    Raises:
      ValueError: if the spread isn't positive or there is no seed; and as `summarise`, of images.
    """
    if not spread > 0 or seeds < 1:
        raise ValueError(f"chances need a spread > 0 and at least one seed; got {spread=} and {seeds=}")
    if seeds == 1:
        return Chances(0.0, 0.0, 0.0, 1.0)
    mean = claim.value if truth is None else truth
    own = None if images is None else sampling_error(mean, images, level)
    joined = _joined(own, same_images)
    error = np.hypot(spread / np.sqrt(seeds), joined / special.ndtri((1 + level) / 2))
    bottom, top = (np.array(claim.region) - mean) / error

    def given(quantile: float) -> Any:
        shown = spread * np.sqrt(special.chdtri(seeds - 1, 1 - quantile) / (seeds - 1))
        half = half_width(shown, seeds, level, joined) / error
        inside = max(special.ndtr(top - half) - special.ndtr(bottom + half), 0.0)
        return np.array([inside, special.ndtr(bottom - half), special.ndtr(-top - half)])

    # Cut near 0, since an interval that fits into a narrow region comes of the smallest spreads only.
    verdicts, _ = integrate.quad_vec(given, 0, 1, epsabs=1e-7, points=(1e-6, 1e-4, 1e-2))
    reproduced, not_reproduced, better = map(float, verdicts)
    return Chances(reproduced, not_reproduced, better, 1 - reproduced - not_reproduced - better)


def family_level(claims: int, error: float = 1 - LEVEL) -> float:
    """Returns the level for each of several claims that keeps the probability of any wrong verdict within an error.

    It is Bonferroni's, 1 - error / claims, and holds however the claims depend on one another.

    Args:
      claims: number of claims that are judged, times the number of looks at each.
      error: that of the whole family.
    """
    return 1 - error / claims


def decide(claim: Claim, low: Any, high: Any) -> Any:
    """Returns the verdicts on a claim that intervals give; arrays of ends give an array of verdicts."""
    bottom, top = claim.region
    inside = (low >= bottom) & (high <= top)
    return np.select([inside, high < bottom, low > top], [REPRODUCED, NOT_REPRODUCED, BETTER], UNDECIDED)


def half_width(spread: Any, seeds: Any, level: float = LEVEL, joined: float = 0.0) -> Any:
    """Computes half the width of the interval of a true mean; arrays give an array.

    Both parts keep their own degrees of freedom: seeds - 1 for the seeds, and infinitely many for the test set, whose
    error follows from the score. Joined like this, √(t² s²/n + z² e²), the interval holds the mean at least as often
    as it says, for any ratio of the two (Banerjee, "Approximate confidence interval for linear functions of means of k
    populations when the population variances are not equal", 1960). Welch's t holds it in only 87 % instead of 95 % of
    studies, for two seeds whose error is nine tenths of the variance.

    Args:
      spread: standard deviation over the seeds; infinite if it is unknown.
      seeds: number of them.
      level: that of the interval.
      joined: half the width of the test set's own interval, or 0.0.
    """
    degrees = np.maximum(seeds - 1, 1)  # one seed has an infinite spread anyway
    return np.hypot(special.stdtrit(degrees, (1 + level) / 2) * spread / np.sqrt(seeds), joined)


def sampling_error(score: float, images: int, level: float = LEVEL) -> float:
    """Computes half the width of the interval that a test set's size alone gives to a share of right images.

    It is that of a binomial share with two right and two wrong images added (Agresti and Coull, "Approximate is better
    than exact for interval estimation of binomial proportions", 1998), so that a score of 1.0 isn't certain. A mean
    over seeds has at most this error: all seeds meet the same images, so it doesn't shrink with their number.

    Args:
      score: share of the images that are right.
      images: number of them.
      level: that of the interval.

    Raises:
      ValueError: if the score isn't a share of 1, or there is no image.
    """
    if not 0 <= score <= 1 or images < 1:
        raise ValueError(f"a test set's error needs a share of 1 and its number of images; got {score=} and {images=}")
    share = (score * images + 2) / (images + 4)
    return float(special.ndtri((1 + level) / 2) * np.sqrt(share * (1 - share) / (images + 4)))


def _finite(scores: Sequence[float]) -> np.ndarray:
    """Returns the scores as an array, if there are some and all are numbers."""
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"a cell needs one finite score for each seed; got {scores}")
    return values


def _known_spread(values: np.ndarray, images: int | None) -> float:
    """Returns the spread that intervals are built on: at least one image's step; infinite if it is unknown."""
    if len(values) == 1:
        return np.inf
    spread = float(values.std(ddof=1))
    if images is not None:
        return max(spread, 1 / images)
    return spread if spread > ROUNDING else np.inf


def _joined(own: float | None, same_images: bool) -> float:
    """Returns the part of an interval that is the test set's."""
    if same_images:
        return 0.0
    if own is None:
        raise ValueError("other images than the claim's need their number, from which the sampling error follows")
    return own


def _summary(values: np.ndarray, known_spread: float, own: float | None, joined: float, level: float) -> Summary:
    mean, spread = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
    half = float(half_width(known_spread, len(values), level, joined))
    low, high = (None, None) if np.isinf(half) else (mean - half, mean + half)
    return Summary(len(values), mean, spread, level, low, high, own)


def _judgement(claim: Claim, summary: Summary, known_spread: float, joined: float) -> Judgement:
    """Judges by the interval of the seeds that there are, then of those that there could be."""
    seeds = np.arange(summary.seeds, max(summary.seeds, MOST_SEEDS) + 1)
    half = half_width(known_spread, seeds, summary.level, joined)
    verdicts = decide(claim, summary.mean - half, summary.mean + half)
    if verdicts[0] != UNDECIDED:
        return Judgement(str(verdicts[0]), summary, None, None)
    deciding = np.flatnonzero(verdicts != UNDECIDED)
    more = int(deciding[0]) if deciding.size else None
    if summary.seeds == 1:
        missing = "one seed has no spread; at least 2 are needed"
    elif np.isinf(known_spread):
        missing = "the scores are equal and their spread unknown; see that the seeds differ, or give the images' number"
    elif more is None:
        missing = f"the mean is too near a border of the claim's region to be told apart with {MOST_SEEDS} seeds"
    else:
        missing = f"a border of the claim's region lies in the interval; {more} more seeds would decide at this spread"
    return Judgement(UNDECIDED, summary, more, missing)
