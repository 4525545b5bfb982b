"""Distillation: a classification whose targets are the labels and what a teacher says of the same images."""

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
    """A `tasks.base.Task` around another, which is evaluated as it would be alone."""

    student: Classification
    teacher: Teacher
    temperature: float
    weight: float
    """Weight of the teacher's targets, in [0, 1]; the labels have the rest."""

    @property
    def model(self) -> Model:
        """The student's."""
        return self.student.model

    @property
    def score(self) -> str:
        """The student's."""
        return self.student.score

    @property
    def train_view(self) -> TrainView:
        """The student's."""
        return self.student.train_view

    @property
    def eval_view(self) -> EvalView:
        """The student's."""
        return self.student.eval_view

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """The teacher's stored logits."""
        return self.teacher.columns

    @property
    def frozen(self) -> PyTree:
        """The teacher's variables."""
        return self.teacher.variables

    @property
    def notes(self) -> Sequence[str]:
        """The student's."""
        return self.student.notes

    def with_forms(self, forms: Forms) -> Distillation:
        """With the student's layers computed in these forms."""
        return dataclasses.replace(self, student=self.student.with_forms(forms))

    def training_from(self, part: str) -> Distillation:
        """With the parts of the student before this one frozen."""
        return dataclasses.replace(self, student=self.student.training_from(part))

    def init(self, key: Key) -> Variables:
        """The student's fresh variables."""
        return self.student.init(key)

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Key) -> tuple[Array, Aux]:
        """``(1 - weight) * hard + weight * soft``; the teacher sees what the student does, or its logits are stored.

        Metrics: loss; hard_loss, the mean of the student's `label_losses`; soft_loss, that of `soft_loss`; and top1.
        """
        images, targets = self.student.view(batch, key)
        logits, new_state = self.student.forward(params, model_state, images, batch, key)
        hard = self.student.label_losses(logits, targets).mean()
        told = batch[TEACHER_LOGITS] if self.teacher.answer is None else self.teacher.answer(frozen, images)
        soft = soft_loss(logits, jax.lax.stop_gradient(told), self.temperature).mean()
        loss = (1 - self.weight) * hard + self.weight * soft
        right = (predictions(logits) == targets.larger).astype(loss.dtype)
        return loss, Aux(new_state, {"loss": loss, "hard_loss": hard, "soft_loss": soft, "top1": right.mean()})

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """The student's, by the labels alone."""
        return self.student.metrics(variables, batch)

    def summarise(self, sums: PyTree, rows: Mapping[str, np.ndarray]) -> Evaluation:
        """The student's."""
        return self.student.summarise(sums, rows)

    def headline(self, scalars: Mapping[str, float]) -> str:
        """The student's."""
        return self.student.headline(scalars)

    def details(self, evaluation: Evaluation) -> list[str]:
        """The student's."""
        return self.student.details(evaluation)


def soft_loss(
    logits: Float[Array, "b k"], teacher_logits: Float[Array, "b k"], temperature: float
) -> Float[Array, " b"]:
    """``T² KL(teacher || student)`` of the softmaxes of logits / T (Hinton et al., arXiv:1503.02531, section 2).

    T² keeps the gradient's size: it is T (student - teacher) of the two softmaxes, and for a high temperature
    (z - mean z - (v - mean v)) / k for logits z of the student and v of the teacher.

    Args:
      logits: the student's, float32 or wider.
      teacher_logits: finite.
      temperature: T, above 0.
    """
    student, teacher = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher)
