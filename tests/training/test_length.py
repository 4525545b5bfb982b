"""A run can be resumed with another length if its learning rates so far stay the same."""

import pathlib

import pytest

from mnv2_jax import config
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.length import why_not

RUN = pathlib.Path("runs/x")
COSINE = {"schedule": "cosine", "warmup_epochs": 0.2}  # 9 steps of 44.9


def refusal(optim, steps_done, scores=(), old=(), **train):
    """Returns the refusal of a run of one epoch with ``optim`` that is resumed with other values of ``train``."""
    tree = {
        "model": {"width": 0.25, "depth": 0.3},
        "data": {"name": "digits", "resolution": 16, "batch_size": 32, "crop": "none", "eval_crop_fraction": 1.0},
        "optim": {"peak_lr": 0.1, **optim},
    }
    old = {"epochs": 1.0, "eval_every_epochs": 0.1, **dict(old)}
    before, after = (config.build({**tree, "train": part}) for part in (old, old | train))
    return why_not(open_experiment(after), before, RUN, steps_done, dict(scores))


@pytest.mark.parametrize(
    ("optim", "steps_done"),
    [
        ({"schedule": "constant"}, 45),
        ({"schedule": "constant", "warmup_epochs": 0.5, "update_every": "epoch"}, 45),
        ({"schedule": "exponential", "decay_every_epochs": 0.1}, 45),
        ({"schedule": "exponential", "decay_every_epochs": 0.1, "update_every": "epoch", "warmup_steps": 3}, 45),
        ({"schedule": "step", "milestones_epochs": (0.5,)}, 45),
        (COSINE, 10),  # the 10th step has the peak rate; from the 11th on, after the warm-up, the rate differs
    ],
)
def test_schedules_that_go_by_the_step_alone_go_on(optim, steps_done):
    assert refusal(optim, steps_done, epochs=3.0) is None
    assert refusal(optim, steps_done, steps=steps_done + 1) is None


@pytest.mark.parametrize(
    ("optim", "steps_done", "epochs", "named"),
    [
        (COSINE, 11, 3.0, "step 11 "),
        ({"schedule": "constant", "lr_noise": (0.0, 0.8)}, 45, 1.0, None),  # the first epoch has its own noise
        ({"schedule": "constant", "lr_noise": (0.5, 0.9)}, 45, 1.5, None),
        ({"schedule": "constant", "lr_noise": (0.0, 0.8)}, 45, 0.5, "45 steps"),
        ({"schedule": "constant", "lr_noise": (0.4, 0.9), "warmup_steps": 3}, 90, 4.0, "optim.lr_noise"),
    ],
)
def test_those_that_go_by_the_length_are_refused_with_the_way(optim, steps_done, epochs, named):
    reason = refusal(optim, steps_done, old={"epochs": 2.0}, epochs=epochs)
    if named is None:
        assert reason is None
        return
    assert named in reason
    assert f"--config.init.weights={RUN} " in reason
    assert "\n" not in reason


def test_epochs_that_steps_overrule_are_refused_and_taken_without_them():
    constant, steps = {"schedule": "constant"}, {"steps": 12}
    assert "--config.train.steps=None" in refusal(constant, 12, old=steps, epochs=3.0)
    assert refusal(constant, 12, old=steps, epochs=3.0, steps=None) is None


def test_what_patience_has_ended_stays_ended():
    scores = {5: 0.5, 9: 0.4, 14: 0.4}
    constant, patience = {"schedule": "constant"}, {"patience": 2}
    assert "train.patience=2" in refusal(constant, 14, scores, patience, epochs=3.0)
    assert refusal(constant, 9, {5: 0.5, 9: 0.4}, patience, epochs=3.0) is None
