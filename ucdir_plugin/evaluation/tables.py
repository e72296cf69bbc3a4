"""Tables and pictures of a run."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from ucdir_plugin.evaluation.intervals import CONFIDENCE, interval
from ucdir_plugin.metrics import protocol
from ucdir_plugin.utils.errors import UserError, named
from ucdir_plugin.utils.files import write_text

Row = dict[str, Any]
"""{"image": key, "metrics": {stage: {metric: value or None}}, "files": {stage or truth: path}}; stages are input,
initial, restored; paths are absolute or relative to the table; there need be no files."""

# UCDIR's, then what BIR-D has besides.
_ORDER = ["lpips", "stlpips", "niqe", "fid", "kid", "psnr", "ssim", "consistency", "loe", "pi", "nrqm", "seam_score"]
COLUMN_ORDER = [f"calculate_{name}" for name in _ORDER]


def place(stamp: Optional[Mapping[str, Any]]) -> int:
    """Place of a metric's column among others."""
    kind = (stamp or {}).get("type")
    return COLUMN_ORDER.index(kind) if kind in COLUMN_ORDER else len(COLUMN_ORDER)


@dataclass
class Results:
    """What was measured on a set of images, and how.

    Args:
        rows: one per image, in the order of their keys.
        protocols: metric -> stamp (:mod:`ucdir_plugin.metrics.protocol`).
        sets: stage -> metric of a set (FID, KID) -> :func:`ucdir_plugin.metrics.distances.summary`.
        unavailable: metric -> why it is not available, and what to do.
        failed: image -> why it could not be restored.
    """

    rows: list[Row]
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    sets: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, Optional[float]]]:
        """Stage -> metric -> mean over the images, or the value of the set; None where it cannot be measured."""
        found = means(self.rows)
        return {
            stage: {**found.get(stage, {}), **{m: r["value"] for m, r in self.sets.get(stage, {}).items()}}
            for stage in dict.fromkeys((s for row in self.rows for s in row["metrics"]), None)
            | dict.fromkeys(self.sets)
        }

    def measured(self) -> dict[str, dict[str, int]]:
        """Stage -> metric -> number of images that the mean is over."""
        return self._each(lambda values: sum(value is not None for value in values))

    def intervals(self) -> dict[str, dict[str, Optional[tuple[float, float]]]]:
        """Stage -> metric -> :func:`interval` of the mean."""
        return self._each(interval)

    def _each(self, function: Callable[[list[Optional[float]]], Any]) -> dict[str, dict[str, Any]]:
        return {
            stage: {m: function([row["metrics"].get(stage, {}).get(m) for row in self.rows]) for m in values}
            for stage, values in means(self.rows).items()
        }

    def metrics(self) -> list[str]:
        """Names of all metrics of images and of the set, in the columns' order: the papers', then the others."""
        found = dict.fromkeys(m for values in self.summary().values() for m in values)
        return sorted(found, key=lambda metric: place(self.protocols.get(metric)))


def means(rows: list[Row]) -> dict[str, dict[str, Optional[float]]]:
    """Mean of each stage and metric over the images where it could be measured; None where on no image."""
    result: dict[str, dict[str, Optional[float]]] = {}
    for row in rows:
        for stage, values in row["metrics"].items():
            for metric in values:
                result.setdefault(stage, {})[metric] = None
    for stage, metrics in result.items():
        for metric in metrics:
            values = [row["metrics"].get(stage, {}).get(metric) for row in rows]
            measured = [v for v in values if v is not None]
            metrics[metric] = math.fsum(measured) / len(measured) if measured else None
    return result


def number(value: Optional[float]) -> str:
    """A value with four digits behind the point, or the words that it could not be measured."""
    return "not measurable" if value is None else f"{value:.4f}"


def with_interval(value: Optional[float], bounds: Optional[Sequence[float]]) -> str:
    """A value with its interval in brackets, where there is one."""
    return number(value) + (f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "")


def heading(metric: str, stamp: Optional[Mapping[str, Any]]) -> str:
    """The metric with an arrow that says which way is better."""
    return metric + {"higher": " ↑", "lower": " ↓"}.get((stamp or {}).get("better", ""), "")


def markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def escaped(name: str) -> str:
    """A file's name as Markdown text: it may hold what ends a cell or a line, or begins markup."""
    return re.sub(r"([|*`<&\[\\])", r"\\\1", " ".join(name.split()))


def remarks(results: Results) -> list[str]:
    """What to know of the numbers: means over fewer images than there are, warnings of sets."""
    lines = [
        f"{metric}, {stage}: the mean is over {count} of {len(results.rows)} images."
        for stage, counts in results.measured().items()
        for metric, count in counts.items()
        if count < len(results.rows)
    ]
    lines += [f"failed, in no mean: {escaped(named(key, reason))}" for key, reason in results.failed.items()]
    for found in results.sets.values():
        for metric, result in found.items():
            lines += [f"{metric}: {w}." for w in [*result["warnings"], *filter(None, [result.get("reason")])]]
    return list(dict.fromkeys(lines))


def markdown_table(results: Results) -> str:
    """One line per image and stage; the means in the papers' column order; sets; how each was measured."""
    metrics = results.metrics()
    of_images = [m for m in metrics if any(m in values for values in means(results.rows).values())]
    rows = [
        [escaped(row["image"]), stage, *(number(values[m]) if m in values else "-" for m in of_images)]
        for row in results.rows
        for stage, values in row["metrics"].items()
    ]
    lines = [*markdown_rows(["image", "stage", *of_images], rows), ""]
    intervals, rows = results.intervals(), []
    for stage, values in results.summary().items():
        bounds = intervals.get(stage, {})
        rows.append([stage, *(with_interval(values[m], bounds.get(m)) if m in values else "-" for m in metrics)])
    lines += markdown_rows(["mean", *(heading(m, results.protocols.get(m)) for m in metrics)], rows)
    if any(bounds for found in intervals.values() for bounds in found.values()):
        lines += ["", f"In brackets: {CONFIDENCE:.0%} intervals of the mean, by the bootstrap over images."]
    if results.sets:
        rows = []
        for stage, found in results.sets.items():
            for metric, result in found.items():
                error = result.get("standard_error")
                cells = [metric, stage, number(result["value"]), "-" if error is None else f"{error:.4f}"]
                rows.append([*cells, str(result["patches"]), str(result["images"])])
        lines += ["", *markdown_rows(["set", "stage", "value", "standard error", "patches", "images"], rows)]
    for remark in remarks(results):
        lines += ["", remark]
    if results.protocols or results.unavailable:
        lines.append("")
    lines += [f"- {metric}: {protocol.describe(stamp)}" for metric, stamp in results.protocols.items()]
    lines += [f"- {metric}: not available: {reason}" for metric, reason in results.unavailable.items()]
    return "\n".join(lines) + "\n"


def as_data(results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """What metrics_*.json holds; infinities (PSNR of equal images) as the text 'inf', since JSON has none.

    ``about``: given; ``protocols``, ``sets``, ``unavailable``, ``failed``: as in :class:`Results`; ``mean``: stage ->
    metric -> mean over the images; ``interval``: of that mean, [low, high] or null; ``measured``: number of images in
    it; ``images``: the rows.
    """
    return finite(
        {
            "about": dict(about),
            "protocols": results.protocols,
            "mean": means(results.rows),
            "interval": results.intervals(),
            "measured": results.measured(),
            "sets": results.sets,
            "unavailable": results.unavailable,
            "failed": results.failed,
            "images": results.rows,
        }
    )


def finite(value: Any) -> Any:
    """With infinite numbers as text, for JSON."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def read_results(path: str | os.PathLike) -> tuple[Results, dict[str, Any]]:
    """The measurements in a file of :func:`as_data`, and its ``about``.

    Raises:
        UserError: if it cannot be read or is no such file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        rows = []
        for row in data["images"]:
            values = {s: {m: _number(v) for m, v in found.items()} for s, found in row["metrics"].items()}
            rows.append({"image": _text(row["image"]), "metrics": values})
            if row.get("files"):
                rows[-1]["files"] = {kind: _text(name) for kind, name in row["files"].items()}
        sets = {s: {m: {**r, "value": _number(r["value"])} for m, r in f.items()} for s, f in data["sets"].items()}
        for stamp in data["protocols"].values():
            for key in ("name", "type", "better"):
                _text(stamp[key])
        failed = dict(data.get("failed", {}))
        return Results(rows, dict(data["protocols"]), sets, dict(data["unavailable"]), failed), dict(data["about"])
    except OSError as err:
        raise UserError(f"{path} cannot be read: {err.strerror}") from err
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as err:
        raise UserError(f"{path} is no metrics_*.json of tools/test.py or tools/evaluate.py, or is damaged") from err


def _number(value: Any) -> Optional[float]:
    return None if value is None or math.isnan(float(value)) else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def columns(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, list[Optional[str]]]]:
    """The columns in which metrics of several runs may stand side by side: those of one protocol, whatever their names.

    Args:
        runs: the ``protocols`` of each.

    Returns:
        (title, for each run the metric's name in it or None); titles of which there would be two say where they differ.
    """
    groups: dict[str, tuple[dict, list[Optional[str]]]] = {}
    for number, protocols in enumerate(runs):
        for metric, stamp in protocols.items():
            compared = {k: v for k, v in stamp.items() if k != "better"}
            key = json.dumps(compared, sort_keys=True)
            while groups.get(key, ({}, [None] * len(runs)))[1][number] is not None:  # twice in one run
                key += " again"
            groups.setdefault(key, (compared, [None] * len(runs)))[1][number] = metric
    titles: dict[str, list[dict]] = {}
    for stamp, _ in groups.values():
        titles.setdefault(stamp["name"], []).append(stamp)
    result = []
    for stamp, names in groups.values():
        same = titles[stamp["name"]]
        varying = [k for k in dict.fromkeys(k for s in same for k in s) if any(s.get(k) != stamp.get(k) for s in same)]
        differences = ", ".join(f"{k} {stamp.get(k, '-')}" for k in varying)
        result.append((stamp["name"] + (f" ({differences})" if differences else ""), names))
    return result


def write_tables(results: Results, stem: str, about: Mapping[str, Any]) -> None:
    """Write ``stem`` .json (:func:`as_data`), .md, and .csv, where metrics of the set stand beside image ``*``."""
    write_text(json.dumps(as_data(results, about), indent=1, allow_nan=False), f"{stem}.json")
    write_text(markdown_table(results), f"{stem}.md")
    rows = list(results.rows)
    if results.sets:
        values = {stage: {m: r["value"] for m, r in found.items()} for stage, found in results.sets.items()}
        rows.append({"image": "*", "metrics": values})
    metrics = results.metrics()
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["image", "stage", *metrics])
    for row in rows:
        for stage, values in row["metrics"].items():
            writer.writerow([row["image"], stage, *("" if values.get(m) is None else repr(values[m]) for m in metrics)])
    write_text(buffer.getvalue(), f"{stem}.csv")
