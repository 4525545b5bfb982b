"""Distillation: a classification whose targets are the labels and what a teacher says of the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import Float

from mnv2_jax.config import DistillConfig
from mnv2_jax.models.registry import Model
from mnv2_jax.ops.metrics import predictions
from mnv2_jax.tasks.classification import Classification
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables

TEACHER_LOGITS = "teacher_logits"
"""Of a batch: float32 [b, k], what the teacher says of its images; see `training.teacher`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """A `tasks.base.Task` around another, which is evaluated as it would be alone."""

    student: Classification
    temperature: float
    weight: float
    """Of the teacher's targets, in [0, 1]; the labels' is what is left."""

    @property
    def model(self) -> Model:
        """The student's."""
        return self.student.model

    def training_from(self, part: str) -> Distillation:
        """With the parts of the student before this one frozen."""
        return dataclasses.replace(self, student=self.student.training_from(part))

    def init(self, key: Key) -> Variables:
        """The student's fresh variables."""
        return self.student.init(key)

    def loss(
        self, params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        """``(1 - weight) * hard + weight * soft`` of a batch with `TEACHER_LOGITS`.

        Metrics: loss; hard_loss, the mean of the student's `label_losses`; soft_loss, that of `soft_loss`; and top1.
        """
        images, targets = self.student.view(batch, key)
        logits, new_state = self.student.forward(params, model_state, images, batch, key)
        hard = self.student.label_losses(logits, targets).mean()
        soft = soft_loss(logits, jax.lax.stop_gradient(batch[TEACHER_LOGITS]), self.temperature).mean()
        loss = (1 - self.weight) * hard + self.weight * soft
        right = (predictions(logits) == targets.larger).astype(loss.dtype)
        return loss, (new_state, {"loss": loss, "hard_loss": hard, "soft_loss": soft, "top1": right.mean()})

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """The student's, by the labels alone."""
        return self.student.metrics(variables, batch)

    def summarise(self, sums: PyTree) -> Mapping[str, Any]:
        """The student's."""
        return self.student.summarise(sums)


def with_teacher(student: Classification, distill: DistillConfig) -> Classification | Distillation:
    """The task of a config: the student's own where no teacher is asked for."""
    if distill.teacher is None and distill.logits is None:
        return student
    return Distillation(student=student, temperature=distill.temperature, weight=distill.weight)


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
