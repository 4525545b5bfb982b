"""Distillation: a classification whose targets are the labels and a teacher's logits for the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax
from jaxtyping import Float

from mnv2_jax.data.views.classification import EvalView, TrainView
from mnv2_jax.models.registry import Model
from mnv2_jax.nn.forms import Forms
from mnv2_jax.ops.metrics import predictions
from mnv2_jax.tasks.base import Aux, Evaluation
from mnv2_jax.tasks.classification import Classification
from mnv2_jax.tasks.teacher import TEACHER_LOGITS, Teacher
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """A `tasks.base.Task` that trains a student with a teacher. It is evaluated like the student's task."""

    student: Classification
    teacher: Teacher
    temperature: float
    weight: float
    """Weight of the teacher's targets, in [0, 1]; the labels have weight 1 - `weight`."""

    @property
    def model(self) -> Model:
        """The student's network."""
        return self.student.model

    @property
    def score(self) -> str:
        """The student's score."""
        return self.student.score

    @property
    def train_view(self) -> TrainView:
        """The student's view for training."""
        return self.student.train_view

    @property
    def eval_view(self) -> EvalView:
        """The student's view for evaluation."""
        return self.student.eval_view

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """The teacher's stored logits; empty for a live teacher."""
        return self.teacher.columns

    @property
    def frozen(self) -> PyTree:
        """The teacher's variables; empty for stored logits."""
        return self.teacher.variables

    @property
    def notes(self) -> Sequence[str]:
        """The student's notes."""
        return self.student.notes

    def with_forms(self, forms: Forms) -> Distillation:
        """Returns the same task, in which the student computes its convolutions by these `nn.forms`."""
        return dataclasses.replace(self, student=self.student.with_forms(forms))

    def training_from(self, part: str) -> Distillation:
        """Returns the same task, in which only this part of the student and the parts after it are trained."""
        return dataclasses.replace(self, student=self.student.training_from(part))

    def init(self, key: Key) -> Variables:
        """Initialises the student's variables."""
        return self.student.init(key)

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Key) -> tuple[Array, Aux]:
        """``(1 - weight) * hard + weight * soft``. A live teacher gets the same images as the student.

        Metrics: loss; hard_loss, the mean of the student's `label_losses`; soft_loss, the mean of `soft_loss`; top1.
        """
        images, targets = self.student.view(batch, key)
        logits, new_state = self.student.forward(params, model_state, images, batch, key)
        hard = self.student.label_losses(logits, targets).mean()
        teacher_logits = batch[TEACHER_LOGITS] if self.teacher.answer is None else self.teacher.answer(frozen, images)
        soft = soft_loss(logits, jax.lax.stop_gradient(teacher_logits), self.temperature).mean()
        loss = (1 - self.weight) * hard + self.weight * soft
        right = (predictions(logits) == targets.larger).astype(loss.dtype)
        return loss, Aux(new_state, {"loss": loss, "hard_loss": hard, "soft_loss": soft, "top1": right.mean()})

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """The student's metrics, which use the labels only."""
        return self.student.metrics(variables, batch)

    def summarise(self, sums: PyTree, rows: Mapping[str, np.ndarray]) -> Evaluation:
        """The student's results."""
        return self.student.summarise(sums, rows)

    def headline(self, scalars: Mapping[str, float]) -> str:
        """The student's headline."""
        return self.student.headline(scalars)

    def details(self, evaluation: Evaluation) -> list[str]:
        """The student's details."""
        return self.student.details(evaluation)


def soft_loss(
    logits: Float[Array, "b k"], teacher_logits: Float[Array, "b k"], temperature: float
) -> Float[Array, " b"]:
    """``T² KL(teacher || student)`` between the softmaxes of logits / T (Hinton et al., arXiv:1503.02531, section 2).

    The factor T² keeps the size of the gradient. The gradient is T times the difference of the softmaxes, student minus
    teacher; for a high temperature that is (z - mean z - (v - mean v)) / k, with the student's logits z and the
    teacher's logits v.

    Args:
      logits: the student's logits, float32 or wider.
      teacher_logits: the teacher's logits, finite.
      temperature: T, above 0.
    """
    student, teacher = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher)
