"""Tables and pictures of a run."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Sequence

import numpy as np

from ucdir_plugin.files import write_atomically
from ucdir_plugin.metrics import protocol

Row = dict[str, Any]
"""{"image": key, "metrics": {stage: {metric: value or None}}}; stages are input, initial, restored."""


@dataclass
class Results:
    """What was measured on a set of images, and how.

    Args:
        rows: one per image, in the order of their keys.
        protocols: metric -> stamp (:mod:`ucdir_plugin.metrics.protocol`).
        sets: stage -> metric of a set (FID, KID) -> :func:`ucdir_plugin.metrics.distances.summary`.
        unavailable: metric -> why it is not available, and what to do.
    """

    rows: list[Row]
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    sets: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, Optional[float]]]:
        """Stage -> metric -> mean over the images, or the value of the set; None where it cannot be measured."""
        found = means(self.rows)
        return {s: {**v, **{m: r["value"] for m, r in self.sets.get(s, {}).items()}} for s, v in found.items()}

    def measured(self) -> dict[str, dict[str, int]]:
        """Stage -> metric -> number of images that the mean is over."""
        return {
            stage: {
                metric: sum(row["metrics"].get(stage, {}).get(metric) is not None for row in self.rows)
                for metric in values
            }
            for stage, values in means(self.rows).items()
        }


def write_text(text: str, path: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    write_atomically(text.encode("utf-8"), path)


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


def _cell(value: Optional[float]) -> str:
    return "not measurable" if value is None else f"{value:.4f}"


def markdown_table(results: Results) -> str:
    """One line per image and stage, and the means; then metrics of the whole set; then how each was measured."""
    rows, summary = results.rows, means(results.rows)
    measured = results.measured()
    metrics = list(dict.fromkeys(m for values in summary.values() for m in values))
    lines = ["| image | stage | " + " | ".join(metrics) + " |", "|---" * (2 + len(metrics)) + "|"]
    for row in [*rows, {"image": "**mean**", "metrics": summary}]:
        for stage, values in row["metrics"].items():
            cells = [_cell(values[m]) if m in values else "-" for m in metrics]
            lines.append(f"| {row['image']} | {stage} | " + " | ".join(cells) + " |")
    for stage, counts in measured.items():
        for metric, count in counts.items():
            if count < len(rows):
                lines += ["", f"{metric}, {stage}: the mean is over {count} of {len(rows)} images."]
    if results.sets:
        lines += ["", "| set | stage | value | standard error | patches | images |", "|---" * 6 + "|"]
        warnings = {}
        for stage, found in results.sets.items():
            for metric, result in found.items():
                error = result.get("standard_error")
                cells = (metric, stage, _cell(result["value"]), "-" if error is None else f"{error:.4f}")
                lines.append("| " + " | ".join(cells) + f" | {result['patches']} | {result['images']} |")
                said = [*result["warnings"], *([result["reason"]] if "reason" in result else [])]
                warnings.update(dict.fromkeys(f"{metric}: {warning}." for warning in said))
        for warning in warnings:
            lines += ["", warning]
    if results.protocols or results.unavailable:
        lines.append("")
    lines += [f"- {metric}: {protocol.describe(stamp)}" for metric, stamp in results.protocols.items()]
    lines += [f"- {metric}: not available: {reason}" for metric, reason in results.unavailable.items()]
    return "\n".join(lines) + "\n"


def as_data(results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """What metrics_*.json holds; infinities (PSNR of equal images) as the text 'inf', since JSON has none.

    ``about``: given; ``protocols``, ``sets``, ``unavailable``: as in :class:`Results`; ``mean``: stage -> metric ->
    mean over the images; ``measured``: stage -> metric -> number of images in that mean; ``images``: the rows.
    """
    return _finite(
        {
            "about": dict(about),
            "protocols": results.protocols,
            "mean": means(results.rows),
            "measured": results.measured(),
            "sets": results.sets,
            "unavailable": results.unavailable,
            "images": results.rows,
        }
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


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
    metrics = list(dict.fromkeys(m for row in rows for values in row["metrics"].values() for m in values))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["image", "stage", *metrics])
    for row in rows:
        for stage, values in row["metrics"].items():
            writer.writerow([row["image"], stage, *("" if values.get(m) is None else repr(values[m]) for m in metrics)])
    write_text(buffer.getvalue(), f"{stem}.csv")


def side_by_side(images: list[np.ndarray], gap: int = 8) -> np.ndarray:
    """Images (H, W, 3) uint8 of one height in a row with white gaps."""
    white = np.full((images[0].shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, white)][:-1], 1)
