"""Plans of tables: which systems stand in them, and what a paper printed; what tools/tables.py runs."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Type, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ucdir_plugin.evaluation.tables import markdown_rows
from ucdir_plugin.options.reading import read_yaml_file
from ucdir_plugin.utils.errors import UserError

STRICT = ConfigDict(extra="forbid")
"""Of the dataclasses that a plan's YAML is read into: a key that they have not is an error."""

T = TypeVar("T")


def read_as(kind: Type[T], path: str) -> T:
    """Read a YAML file into a dataclass.

    Raises:
        UserError: for a file that cannot be read, and naming the first key or value that is wrong.
    """
    raw = read_yaml_file(path)
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as err:
        error = err.errors()[0]
        where = ":".join(str(place) for place in error["loc"])
        raise UserError(f"{path}: {where}: {error['msg'][0].lower()}{error['msg'][1:]}") from err


@dataclasses.dataclass(frozen=True)
class Run:
    """A system of a table.

    Attributes:
        name: in the table.
        opt: its option file, relative to the plan.
        options: ``KEY:SUBKEY=VALUE`` entries that change it.
        restored: folder of results that another program made, instead of running a model. ``opt``
            says the metrics, and by its first test set whose truths these are.
        truth, input: folders that belong to ``restored``.
    """

    __pydantic_config__ = STRICT

    name: str
    opt: str
    options: List[str] = dataclasses.field(default_factory=list)
    restored: Optional[str] = None
    truth: Optional[str] = None
    input: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Systems side by side on the same images.

    Attributes:
        title: of the part.
        runs: the first is what the others are compared with.
        options: of all its runs.
        stages: name in the table -> ``input`` or ``initial``: stages of the first run that has them, which stand
            beside the results.
        columns: metrics of the printed table, by their names in ``val: metrics:``.
        published: printed row -> its values in these columns, None where there is none.
    """

    __pydantic_config__ = STRICT

    title: str
    runs: List[Run]
    options: List[str] = dataclasses.field(default_factory=list)
    stages: Dict[str, str] = dataclasses.field(default_factory=dict)
    columns: List[str] = dataclasses.field(default_factory=list)
    published: Dict[str, List[Optional[float]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table of a paper.

    Attributes:
        title: of the table.
        parts: name -> :class:`Part`.
        source: where the published rows are from.
        options: of all runs.
        notes: lines that stand below the title.
    """

    __pydantic_config__ = STRICT

    title: str
    parts: Dict[str, Part]
    source: str = ""
    options: List[str] = dataclasses.field(default_factory=list)
    notes: List[str] = dataclasses.field(default_factory=list)


def check_part(path: str, name: str, labels: Sequence[str], what: str) -> str:
    """See that a part can be told from others, and its rows from each other; returns where it stands, for messages.

    Args:
        labels: names of its rows, at least one.
        what: the rows are called in messages.

    Raises:
        UserError: naming the fault.
    """
    here = f"{path}: parts:{name}"
    if not re.fullmatch(r"\w[\w-]*", name):
        raise UserError(f"{here}: a name of letters, digits, _ and - is expected")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None or not labels:
        raise UserError(f"{here}: " + ("no runs" if twice is None else f"two {what} are called {twice}"))
    return here


def read_plan(path: str) -> Plan:
    """Read a plan; its option files are then relative to the folder of the call.

    Raises:
        UserError: naming the first fault.
    """
    plan = read_as(Plan, path)
    if not plan.parts:
        raise UserError(f"{path}: parts: there are none")
    folder, parts = os.path.dirname(path), {}
    for name, part in plan.parts.items():
        names = [run.name for run in part.runs]
        here = check_part(path, name, names and [*names, *part.stages], "rows")
        wrong = next((stage for stage in part.stages.values() if stage not in ("input", "initial")), None)
        if wrong is not None:
            raise UserError(f"{here}: stages: {wrong!r} is not known: take input or initial")
        for row, values in part.published.items():
            if len(values) != len(part.columns):
                raise UserError(
                    f"{here}: published:{row}: {len(values)} values, {len(part.columns)} columns: they must agree"
                )
        alone = next((run.name for run in part.runs if run.restored is None and (run.truth or run.input)), None)
        if alone is not None:
            raise UserError(f"{here}: {alone}: truth and input belong to restored, which is missing")
        runs = [dataclasses.replace(run, opt=os.path.normpath(os.path.join(folder, run.opt))) for run in part.runs]
        parts[name] = dataclasses.replace(part, runs=runs)
    return dataclasses.replace(plan, parts=parts)


def published_table(part: Part, source: str) -> List[str]:
    """Lines of a Markdown table of the printed rows; none where there are none."""
    if not part.published:
        return []
    rows = [[name, *("-" if v is None else f"{v:g}" for v in values)] for name, values in part.published.items()]
    head = f"published{f' ({source})' if source else ''}"
    return [
        *markdown_rows([head, *part.columns], rows),
        "",
        "Published numbers are of other code, weights and images; they were not measured here.",
    ]


def published_cells(part: Part, columns: List[Mapping[str, Any]]) -> Dict[str, List[Optional[float]]]:
    """The printed rows in the columns of a comparison, None where the paper has no such metric.

    Args:
        columns: of :func:`ucdir_plugin.evaluation.compare.compare`.
    """
    names = [{cell["metric"] for cell in column["cells"] if cell} for column in columns]
    return {
        row: [next((v for name, v in zip(part.columns, values) if name in found), None) for found in names]
        for row, values in part.published.items()
    }
