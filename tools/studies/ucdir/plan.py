"""Plans: which trained systems a study restores and measures, read from YAML."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Optional

from ucdir_plugin.evaluation.plans import STRICT, check_part, read_as
from ucdir_plugin.utils.errors import UserError, did_you_mean

INPUT = "input"
"""``model`` of the run that restores nothing."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A system, and how it is used.

    Attributes:
        name: in tables.
        model, weights, sampling: as of :func:`ucdir_plugin.load_model`; the model ``input`` is the degraded image.
        seeds: how many, from 0 on; what varies with them is a mean.
        samples: of which the mean is measured.
        blend: 0 is the initial prediction.
        iteration: of the training, for the curves; runs of one name then differ in it.
    """

    __pydantic_config__ = STRICT

    name: str
    model: str
    weights: Optional[str] = None
    sampling: Dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int = 1
    samples: int = 1
    blend: float = 1.0
    iteration: Optional[int] = None

    @property
    def label(self) -> str:
        """The run's name in tables."""
        return self.name if self.iteration is None else f"{self.name}, {self.iteration} iterations"


@dataclasses.dataclass(frozen=True)
class Part:
    """Runs that stand in one table.

    Attributes:
        title: of the table.
        runs: the first is what the others are compared with, unless ``against`` names another one.
        images: how many of each set, evenly spread; all if left out.
        sets: only these of the option file's.
    """

    __pydantic_config__ = STRICT

    title: str
    runs: List[Run]
    against: Optional[str] = None
    images: Optional[int] = None
    sets: Optional[List[str]] = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """``opt``: the option file of sets and metrics; ``parts``: name -> :class:`Part`."""

    __pydantic_config__ = STRICT

    opt: str
    parts: Dict[str, Part]


def read_plan(path: str) -> Plan:
    """Read a plan from a YAML file.

    Raises:
        UserError: naming the first fault.
    """
    plan = read_as(Plan, path)
    if not plan.parts:
        raise UserError(f"{path}: parts: there are none")
    for name, part in plan.parts.items():
        labels = [run.label for run in part.runs]
        here = check_part(path, name, labels, "runs")
        if part.against is not None and part.against not in labels:
            raise UserError(f"{here}: against: {did_you_mean(part.against, labels)}")
        if any(min(run.seeds, run.samples) < 1 for run in part.runs) or (part.images is not None and part.images < 1):
            raise UserError(f"{here}: seeds, samples and images are 1 or more")
        idle = next((run for run in part.runs if run.model == INPUT and run != Run(run.name, INPUT)), None)
        if idle:
            raise UserError(f"{here}: {idle.name}: the input has a name and nothing else")
    return plan
