"""Masks and the split into batches don't change a metric; the numbers are those of a slow, simple computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.ops import losses, metrics


def batch(seed, n, k):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(3 * rng.normal(size=(n, k)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, k, n), jnp.int32)
    return logits, labels


@jax.jit
def sums(logits, labels, mask):
    return metrics.classification_sums(logits, labels, losses.softmax_cross_entropy(logits, labels), mask)


@pytest.mark.parametrize("k", [3, 10])
def test_masked_rows_count_for_nothing_whatever_they_hold(k):
    logits, labels = batch(0, 16, k)
    mask = jnp.arange(16) % 3 > 0
    hostile = jnp.where(mask[:, None], logits, jnp.nan)
    wrong = jnp.where(mask, labels, 12345)
    rows = np.flatnonzero(mask)
    expected = sums(logits[rows], labels[rows], jnp.ones(len(rows), bool))
    actual = sums(hostile, wrong, mask)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6, err_msg=name)


def test_cuts_and_order_do_not_matter():
    logits, labels = batch(1, 24, 7)
    every = jnp.ones(24, bool)
    whole = sums(logits, labels, every)
    order = np.random.default_rng(0).permutation(24)
    parts = [sums(logits[i], labels[i], every[i]) for i in np.split(order, [5, 6, 17])]
    merged = parts[0]
    for part in parts[1:]:
        merged = metrics.merge(merged, part)
    for name, value in whole.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, err_msg=name)
    assert all(merged[name].dtype == jnp.int32 for name in ("count", "top5", "confusion", "bin_count"))


def test_summary_is_that_of_a_plain_computation():
    k, n = 7, 200
    logits, labels = batch(2, n, k)
    # For the ECE, some answers are overconfident and some are underconfident.
    labels = jnp.where(jax.nn.softmax(logits).max(axis=1) < 0.75, logits.argmax(axis=1), labels)
    summary = metrics.summarise_classification(sums(logits, labels, jnp.ones(n, bool)), tuple("abcdefg"))
    probabilities = np.exp(np.asarray(logits, np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order, labels = np.argsort(-probabilities, axis=1), np.asarray(labels)
    right = order[:, 0] == labels
    assert summary["top1"] == right.mean()
    assert summary["top5"] == (order[:, :5] == labels[:, None]).any(axis=1).mean()
    assert summary["loss"] == pytest.approx(-np.log(probabilities[np.arange(n), labels]).mean(), rel=1e-5)
    assert summary["count"] == n
    confidence, gaps = probabilities.max(axis=1), []
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gaps.append(inside.mean() * (confidence[inside].mean() - right[inside].mean()))
    assert min(gaps) < -0.02
    assert max(gaps) > 0.02
    assert summary["ece"] == pytest.approx(np.abs(gaps).sum(), abs=1e-5)
    assert np.array(summary["confusion"]).sum() == n
    assert [row["label"] for row in summary["per_class"]] == list("abcdefg")
    assert summary["per_class"][3]["accuracy"] == pytest.approx(right[labels == 3].mean())


def test_a_class_without_images_has_no_accuracy():
    logits, _ = batch(3, 4, 3)
    zeros = jnp.zeros(4, jnp.int32)
    summary = metrics.summarise_classification(sums(logits, zeros, jnp.ones(4, bool)), ("a", "b", "c"))
    assert summary["per_class"][1] == {"label": "b", "count": 0, "accuracy": None}
    assert summary["top5"] == 1.0  # of three classes


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_not_right(value):
    labels = jnp.arange(8)
    logits = 9 * jax.nn.one_hot(labels, 8)
    logits = logits.at[:, 3].set(-jnp.inf)  # which is a number's: a probability of 0
    logits = logits.at[jnp.asarray([0, 4, 5]), jnp.asarray([0, 0, 5])].set(value)
    summary = metrics.summarise_classification(sums(logits, labels, jnp.ones(8, bool)), tuple("abcdefgh"))
    assert metrics.predictions(logits).tolist() == [-1, 1, 2, 0, -1, -1, 6, 7]
    assert (summary["top1"], summary["top5"]) == (4 / 8, 4 / 8)
    assert [row["accuracy"] for row in summary["per_class"]] == [0, 1, 1, 0, 0, 0, 1, 1]
    assert all(row["count"] == 1 for row in summary["per_class"])
    assert np.sum(summary["confusion"]) == 5
    right = [row["accuracy"] * row["count"] for row in summary["calibration"]]
    assert sum(right) == pytest.approx(4)


def test_label_smoothing_is_cross_entropy_against_smoothed_labels():
    logits, labels = batch(4, 6, 5)
    target = 0.9 * jax.nn.one_hot(labels, 5) + 0.1 / 5
    expected = -(target * jax.nn.log_softmax(logits)).sum(axis=-1)
    np.testing.assert_allclose(losses.softmax_cross_entropy(logits, labels, 0.1), expected, rtol=1e-5)
