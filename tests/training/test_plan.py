"""The timetable of a training, in pure numbers."""

import pytest

from mnv2_jax.config import CheckpointConfig, Config, DataConfig, FinetuneConfig, LogConfig, OptimConfig, TrainConfig
from mnv2_jax.errors import UserError
from mnv2_jax.training.finetune import Stage
from mnv2_jax.training.plan import best_of, check_plan, make_plan

PARTS = ("stem", "block_1", "head", "classifier")


def planned(num_images=320, **sections):
    """Makes the plan of a config with 32 images per batch and 10 steps per epoch."""
    return make_plan(Config(data=DataConfig(batch_size=32), **sections), num_images, PARTS)


def test_epochs_are_not_rounded_and_a_training_has_a_step():
    plan = planned(336, train=TrainConfig(epochs=3))
    assert (plan.steps_per_epoch, plan.total_steps) == (10.5, 32)
    assert planned(train=TrainConfig(epochs=0.001)).total_steps == 1
    assert planned(train=TrainConfig(epochs=3, steps=7)).total_steps == 7


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (1.0, 30, [10, 20, 30]),
        (0.25, 10, [3, 5, 8, 10]),  # 2.5, 5, 7.5 and 10 steps
        (0.0, 30, [30]),
        (1.0, 25, [10, 20, 25]),
        (0.05, 4, [1, 2, 3, 4]),  # two evaluations are due per step
    ],
)
def test_evaluations_fall_due_with_epochs_and_at_the_end(every, steps, expected):
    plan = planned(train=TrainConfig(steps=steps, eval_every_epochs=every))
    assert [step for step in range(steps + 1) if plan.evaluates_at(step)] == expected


def test_what_is_evaluated_is_logged():
    train = TrainConfig(steps=10, eval_every_epochs=0.3)
    plan = planned(train=train, log=LogConfig(every_steps=4), checkpoint=CheckpointConfig(every_steps=5))
    assert [step for step in range(1, 11) if plan.logs_at(step)] == [3, 4, 6, 8, 9, 10]
    assert [step for step in range(1, 11) if plan.saves_at(step)] == [5, 10]


def test_stages_by_steps():
    plan = planned(336, finetune=FinetuneConfig(train_from=("classifier", "block_1"), unfreeze_epochs=(2.0,)))
    assert plan.stages == (Stage("classifier", 0), Stage("block_1", 21))
    assert [plan.stage_of(step) for step in (1, 21, 22, 99)] == [0, 0, 1, 1]


def test_patience_counts_evaluations_since_the_best():
    plan = planned(train=TrainConfig(patience=2, steps=100, eval_every_epochs=0.1))
    assert not plan.is_over(3, {})
    assert not plan.is_over(3, {1: 0.5, 2: 0.5, 3: 0.6})
    assert not plan.is_over(4, {1: 0.5, 2: 0.6, 3: 0.6})
    assert plan.is_over(4, {1: 0.5, 2: 0.6, 3: 0.6, 4: 0.1})
    assert plan.is_over(100, {})
    longer = planned(train=TrainConfig(patience=2, steps=100, eval_every_epochs=0.2))
    assert not longer.is_over(5, {2: 0.5, 4: 0.4, 5: 0.4})  # 5 was the end once
    assert not planned(train=TrainConfig(steps=100)).is_over(4, {1: 0.5, 2: 0.1, 3: 0.1, 4: 0.1})


def test_the_first_of_equals_is_the_best_and_a_score_may_be_negative():
    assert best_of({1: 0.5, 2: 0.6, 3: 0.6}) == (2, 0.6)
    assert best_of({1: -3.0, 2: -2.0}) == (2, -2.0)
    assert best_of({}) == (0, 0.0)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"finetune": FinetuneConfig(train_from=("head", "stem"), unfreeze_epochs=(1.0,))}, "finetune.unfreeze_epochs"),
        ({"train": TrainConfig(epochs=1e9)}, "train.epochs"),
        ({"optim": OptimConfig(warmup_steps=11)}, "optim.warmup_steps"),
        ({"optim": OptimConfig(warmup_epochs=1.1)}, "optim.warmup_epochs"),
    ],
)
def test_what_does_not_go_into_the_steps_is_one_line(sections, key):
    config = Config(data=DataConfig(batch_size=32), **{"train": TrainConfig(epochs=1), **sections})
    with pytest.raises(UserError, match=f"^{key}=") as error:
        check_plan(make_plan(config, 320, PARTS), config)
    assert "\n" not in str(error.value)


def test_a_warmup_may_be_as_long_as_the_training():
    for optim in (OptimConfig(warmup_steps=10), OptimConfig(warmup_epochs=1.0)):
        config = Config(data=DataConfig(batch_size=32), train=TrainConfig(epochs=1), optim=optim)
        check_plan(make_plan(config, 320, PARTS), config)
