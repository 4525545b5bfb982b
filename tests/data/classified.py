"""Streams and arrays of labelled images, as a classification sees them: what most tests of the data go through."""

from mnv2_jax.config import AugmentConfig
from mnv2_jax.data import streams
from mnv2_jax.data.views.classification import EvalView, TrainView

_PLAIN = AugmentConfig()


def train_batches(data, split, seed, start_step=0, augment=_PLAIN, **more):
    """`streams.train_batches` by a `TrainView`."""
    view = TrainView(data, augment)
    return streams.train_batches(data, view, split, seed, start_step, repeats=augment.repeats, **more)


def eval_batches(data, split, *arguments, **more):
    """`streams.eval_batches` by an `EvalView`."""
    return streams.eval_batches(data, EvalView(data), split, *arguments, **more)


def load_arrays(data, split, **more):
    """Images and labels of `streams.load_arrays`."""
    arrays = streams.load_arrays(data, EvalView(data), split, **more)
    return arrays["image"], arrays["label"]


def without_damaged(data, split, batches, found):
    """`streams.without_damaged` by an `EvalView`."""
    return streams.without_damaged(EvalView(data), split, batches, found)


def fits(data, split, training, augment=_PLAIN):
    """`streams.fits_training` or `streams.fits`."""
    return (
        streams.fits_training(data, TrainView(data, augment), split)
        if training
        else streams.fits(EvalView(data), split)
    )
