"""Auxiliary scalar conditions beside the noise level: JPEG quality, exposure ratio, ... (UCDIR, section 3.2).

Declared in the option file's denoiser, by name:

    conditions:
      quality: {range: [1, 100], drop: 0.1}
      blur: {encoding: class, classes: [none, motion, defocus]}

A value comes from the dataset's sample (``condition: {quality: 10}``) or from the command line. In training a
condition is left out of a share ``drop`` of the samples; only such a one can be left out at inference.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import torch

from ucdir_plugin.diffusion.noise import generator
from ucdir_plugin.utils.errors import UserError, did_you_mean

_KEYS = ("encoding", "range", "classes", "drop")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Condition:
    """A scalar that the network is given beside its images.

    Attributes:
        name: as the dataset and the command line call it.
        limits: smallest and largest value, in the condition's own unit; of a class, of its index.
        classes: names, for the encoding ``class``; else empty.
        drop: share of the training samples that it is left out of.
    """

    name: str
    limits: Tuple[float, float]
    classes: Tuple[str, ...] = ()
    drop: float = 0.0

    def number(self, value: Any) -> float:
        """A value as a number, of a class its index; NaN where it is left out (None, NaN, "").

        Raises:
            UserError: for a value out of range, an unknown class, or a condition left out that never was in training.
        """
        if value is None or value == "" or (isinstance(value, numbers.Real) and math.isnan(value)):
            if not self.drop:
                raise UserError(f"condition {self.name} is missing, and was not left out in training: give {self.give}")
            return math.nan
        if self.classes:
            value = f"{value:g}" if _is_number(value) else value  # a table of classes 1, 2, ... has numbers
            if value not in self.classes:
                hint = did_you_mean(value, self.classes)
                raise UserError(f"condition {self.name}: there is no class {value!r}; {hint}")
            return float(self.classes.index(value))
        low, high = self.limits
        if not _is_number(value) or not low <= value <= high:
            raise UserError(f"condition {self.name} is {value!r}, outside of its range: give {self.give}")
        return float(value)

    @property
    def give(self) -> str:
        """What to give, in words."""
        if self.classes:
            return f"one of {', '.join(self.classes)}"
        return "{:g} to {:g}".format(*self.limits)


def declare(declared: Optional[Mapping[str, Any]], where: str = "conditions") -> Tuple[Condition, ...]:
    """Conditions as the options declare them: name -> ``{encoding, range or classes, drop}``.

    Raises:
        UserError: naming the first fault.
    """
    return tuple(_declare_one(str(name), values, f"{where}:{name}") for name, values in (declared or {}).items())


def _declare_one(name: str, values: Any, where: str) -> Condition:
    if not name.isidentifier():
        raise UserError(f"option {where}: a condition's name is made of letters, digits and _")
    if not isinstance(values, Mapping):
        raise UserError(f"option {where}: a mapping such as {{range: [1, 100], drop: 0.1}} is expected, got {values!r}")
    for key in values:
        if key not in _KEYS:
            raise UserError(f"unknown option {where}:{key}; {did_you_mean(key, _KEYS)}")
    encoding, drop = values.get("encoding", "continuous"), values.get("drop", 0.0)
    if encoding not in ("continuous", "class"):
        raise UserError(
            f"option {where}:encoding: there is no {encoding!r}; {did_you_mean(encoding, ('continuous', 'class'))}"
        )
    if not _is_number(drop) or not 0 <= drop < 1:
        raise UserError(
            f"option {where}:drop: a share of the samples, 0 or more and below 1, is expected, got {drop!r}"
        )
    needed, other = ("range", "classes") if encoding == "continuous" else ("classes", "range")
    if other in values:
        raise UserError(f"option {where}:{other} has no meaning for encoding: {encoding}; remove it")
    given = values.get(needed)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(f"option {where}:{needed} is missing: a list is expected, got {given!r}")
    if encoding == "continuous":
        if len(given) != 2 or not all(_is_number(v) for v in given) or not given[0] < given[1]:
            raise UserError(f"option {where}:range: [smallest, largest] value are expected, got {list(given)!r}")
        return Condition(name, (float(given[0]), float(given[1])), drop=float(drop))
    if not all(isinstance(v, str) for v in given) or len(set(given)) != len(given) or len(given) < 2:
        raise UserError(f"option {where}:classes: two or more different names are expected, got {list(given)!r}")
    return Condition(name, (0.0, len(given) - 1.0), tuple(given), float(drop))


def check_ranges(conditions: Sequence[Condition], ranges: Mapping[str, Sequence[Any]], train: bool, where: str) -> None:
    """Whether a data set tells what a network declares, before hours of training.

    Args:
        ranges: name -> the smallest and largest value, or all; NaN or "" among them if some samples lack it.
        train: whether the network trains on it: what it never tells would never be learnt.

    Raises:
        UserError: for a condition that it does not tell, leaves out, or tells values of that are out of range.
    """
    for condition in conditions:
        if condition.name not in ranges:
            if train or not condition.drop:
                hint = did_you_mean(condition.name, ranges) if ranges else "it tells none"
                raise UserError(f"{where}: it does not tell {condition.name}, which network_g declares; {hint}")
            continue
        for value in ranges[condition.name]:
            left_out = value == "" or (isinstance(value, numbers.Real) and math.isnan(value))
            if left_out and not condition.drop:
                raise UserError(
                    f"{where}: some samples lack {condition.name}: its condition in network_g needs a drop above 0"
                )
            try:
                condition.number(value)
            except UserError as err:
                raise UserError(f"{where}: {err}") from err


def encode(conditions: Sequence[Condition], values: Mapping[str, Sequence[Any]], batch: int) -> Optional[torch.Tensor]:
    """Values of a batch as the networks take them.

    Args:
        conditions: the declared ones.
        values: name -> one value for each image (a tensor or a list). What is not declared is passed over.

    Returns:
        (batch, number of conditions) float32, NaN where one is left out; None if none is declared.

    Raises:
        UserError: as :meth:`Condition.number`.
    """
    if not conditions:
        return None
    columns = []
    for condition in conditions:
        column = values.get(condition.name)
        column = [None] * batch if column is None else column
        column = column.tolist() if isinstance(column, torch.Tensor) else list(column)
        columns.append([condition.number(value) for value in column])
    return torch.tensor(columns, dtype=torch.float32).t().contiguous()


def given(conditions: Sequence[Condition], values: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """What a user said of one image, checked.

    Raises:
        UserError: for a name that is not declared; as :meth:`Condition.number`.
    """
    values = dict(values or {})
    names = [condition.name for condition in conditions]
    for name in values:
        if name not in names:
            hint = did_you_mean(name, names) if names else "this network declares none"
            raise UserError(f"there is no condition {name!r}; {hint}")
    for condition in conditions:
        condition.number(values.get(condition.name))
    return values


def leave_out(
    conditions: Sequence[Condition], encoded: torch.Tensor, seed: int, numbers: Sequence[int]
) -> torch.Tensor:
    """In training: NaN in place of each condition with its probability ``drop``, by seed and sample number.

    Args:
        encoded: of :func:`encode`, (B, number of conditions).
        numbers: sample numbers of the batch.
    """
    share = torch.tensor([condition.drop for condition in conditions])
    drawn = [torch.rand(len(conditions), generator=generator(seed, "condition", number)) for number in numbers]
    return encoded.masked_fill((torch.stack(drawn) < share), math.nan)
