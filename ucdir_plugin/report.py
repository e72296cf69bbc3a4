"""Tables and pictures of a run."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any, Optional

import numpy as np

from ucdir_plugin.files import write_atomically

Row = dict[str, Any]
"""{"image": key, "metrics": {stage: {metric: value or None}}}; stages are input, initial, restored."""


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


def markdown_table(rows: list[Row]) -> str:
    """One line per image and stage, and the means."""
    summary = means(rows)
    metrics = list(dict.fromkeys(m for values in summary.values() for m in values))
    lines = ["| image | stage | " + " | ".join(metrics) + " |", "|---" * (2 + len(metrics)) + "|"]
    for row in [*rows, {"image": "**mean**", "metrics": summary}]:
        for stage, values in row["metrics"].items():
            cells = [_cell(values[m]) if m in values else "-" for m in metrics]
            lines.append(f"| {row['image']} | {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_tables(rows: list[Row], stem: str, about: dict[str, Any]) -> None:
    """Write ``stem`` .json (per image and mean), .csv and .md."""
    write_text(json.dumps({"about": about, "mean": means(rows), "images": rows}, indent=1), f"{stem}.json")
    write_text(markdown_table(rows), f"{stem}.md")
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
