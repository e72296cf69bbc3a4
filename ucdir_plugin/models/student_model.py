"""Distillation under BasicSR: a UCDIR network that restores in one call."""

from __future__ import annotations

from ucdir_plugin.models.ucdir_model import UCDIRModel
from ucdir_plugin.registry import register
from ucdir_plugin.training.student_task import StudentTask


@register("model")
class UCDIRStudentModel(UCDIRModel):
    """Distils a UCDIR network that samples in many steps into one of a single step: a :class:`StudentTask`.

    Option keys besides those of :class:`UCDIRModel`: ``train: teacher, distillation_opt``; see
    options/study/jpeg_any_fast.yml.
    """

    task_class = StudentTask
