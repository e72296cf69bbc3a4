"""Several runs side by side: means, paired differences, one grid of pictures."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from ucdir_plugin.evaluation import formats, intervals, tables
from ucdir_plugin.evaluation.report import part
from ucdir_plugin.metrics import protocol
from ucdir_plugin.utils import files
from ucdir_plugin.utils.errors import UserError, did_you_mean
from ucdir_plugin.utils.files import write_atomically
from ucdir_plugin.utils.image_reading import read_uint8

CELL = 320
"""Pixels of a picture's side in the grid."""


@dataclass
class Run:
    """A table that tools/test.py or tools/evaluate.py wrote.

    Attributes:
        rows: image, by its path without extension -> row.
    """

    name: str
    path: str
    results: tables.Results
    rows: dict[str, tables.Row]

    def value(self, image: str, stage: str, metric: Optional[str]) -> Optional[float]:
        """A metric's value for one image and stage; None where there is none."""
        return self.rows[image]["metrics"].get(stage, {}).get(metric)

    def file(self, image: str, stage: str) -> Optional[str]:
        """Where a picture is, if it is there."""
        path = self.rows[image].get("files", {}).get(stage)
        path = path and os.path.join(os.path.dirname(self.path), path)
        return path if path and os.path.isfile(path) else None


def read_runs(paths: Sequence[str], least: int = 2) -> list[Run]:
    """Read the tables of runs that are to be compared.

    Args:
        paths: of tables (.json), or of folders with one.
        least: how many there must be.

    Raises:
        UserError: for fewer, and what cannot be read.
    """
    if len(paths) < least:
        raise UserError("comparing takes two runs or more")
    runs: list[Run] = []
    found: list[tuple[str, str, str, tables.Results]] = []
    for given in paths:
        path = given
        if os.path.isdir(given):
            candidates = sorted(glob.glob(os.path.join(glob.escape(given), "metrics*.json")))
            if len(candidates) != 1:
                names = ", ".join(os.path.basename(t) for t in candidates)
                raise UserError(
                    f"{given} has {f'several tables ({names}): name one' if candidates else 'no metrics*.json'}"
                )
            path = candidates[0]
        results, about = tables.read_results(path)
        found.append((str(about.get("name") or given), given, path, results))
    # By the path without extension, in which results may differ; but not where two images differ in nothing else.
    ambiguous = any(len({_stem(row) for row in results.rows}) < len(results.rows) for *_, results in found)
    names = [name for name, *_ in found]
    for number, (name, given, path, results) in enumerate(found):
        if names.count(name) > 1 or name in ("input", "truth"):
            name = f"{name} ({given})"
        if name in (run.name for run in runs):
            name = f"{name} {number + 1}"
        rows = {row["image"] if ambiguous else _stem(row): row for row in results.rows}
        runs.append(Run(" ".join(name.split()), path, results, rows))
    return runs


def stage_as_run(run: Run, stage: str, name: str) -> Run:
    """Another stage of a run, its input or initial prediction, as a run of its own, whose results it is."""
    rows = {}
    for key, row in run.rows.items():
        files_of = row.get("files", {})
        rows[key] = {
            **row,
            "metrics": {"restored": row["metrics"].get(stage, {})},
            "files": {"restored": files_of[stage]} if stage in files_of else {},
        }
    sets = {"restored": run.results.sets.get(stage, {})}
    return Run(name, run.path, dataclasses.replace(run.results, rows=list(rows.values()), sets=sets), rows)


def _stem(row: tables.Row) -> str:
    return os.path.splitext(row["image"])[0]


def compare(runs: Sequence[Run], stage: str = "restored") -> dict[str, Any]:
    """Means of all runs over the images they share, and differences from the first run.

    Args:
        stage: what is compared.

    Returns:
        ``stage``; ``runs``: their names; ``images``: those shared; ``columns``; ``remarks``: what was left out.
        A column has ``title``, ``better``, ``protocol`` (the stamp), and for each run None or a cell: ``metric`` (its
        name in the run), ``value``, ``images`` that this is over; ``interval`` of a mean, or ``error`` of a set's KID;
        ``difference`` from the column's first run: ``from``, ``mean``, ``interval``, ``images``. A column's means are
        over the images measured in all its runs. Only values of one protocol share a column. Sets (FID, KID) have no
        differences, and are left out if the runs' images or patches differ.

    Raises:
        UserError: if the runs share no image, or none has the stage.
    """
    images = [image for image in runs[0].rows if all(image in run.rows for run in runs)]
    if not images:
        raise UserError(f"{' and '.join(run.path for run in runs)} have no image in common")
    stages = {s for run in runs for row in run.results.rows for s in row["metrics"]}
    if stage not in stages:
        raise UserError(f"no run has the stage {stage}; {did_you_mean(stage, stages)}")
    remarks = [
        f"{run.name}: {len(run.rows) - len(images)} of {len(run.rows)} images are not in all runs and are left out."
        for run in runs
        if len(run.rows) > len(images)
    ]
    same_images, columns = not remarks, []
    for title, names in tables.columns([run.results.protocols for run in runs]):
        of_set = [run.results.sets.get(stage, {}).get(name) for run, name in zip(runs, names)]
        if any(of_set):
            counts = {found.get("patches") for found in of_set if found}
            if not same_images or len(counts) > 1:
                remarks.append(f"{title} is of all images of a run, which differ: not comparable here.")
                continue
            cells = [
                found and {"metric": name, **{k: v for k, v in found.items() if k != "standard_error"},
                           "error": found.get("standard_error")}
                for found, name in zip(of_set, names)
            ]  # fmt: skip
            warnings = [w for found in of_set if found for w in found.get("warnings", ())]
            remarks += dict.fromkeys(f"{title}: {w}." for w in warnings)
        else:
            cells = _cells(runs, images, stage, names)
            for run, cell in zip(runs, cells):
                if cell and cell["images"] < len(images):
                    remarks.append(f"{title}, {run.name}: the mean is over {cell['images']} of {len(images)} images.")
                over = ((cell or {}).get("difference") or {}).get("images")
                if over is not None and over < cell["images"]:
                    remarks.append(f"{title}, {run.name}: the difference is over the {over} images with finite values.")
        if any(cells):
            stamp = next(run.results.protocols[name] for run, name in zip(runs, names) if name)
            kept = {"title": title, "type": stamp["type"], "better": stamp["better"], "protocol": stamp}
            columns.append({**kept, "cells": cells})
    columns.sort(key=tables.place)
    if not any(len([cell for cell in column["cells"] if cell]) > 1 for column in columns):
        remarks.append("No metric was measured in the same way in two runs.")
    names = [run.name for run in runs]
    return {"stage": stage, "runs": names, "images": images, "columns": columns, "remarks": remarks}


def _cells(
    runs: Sequence[Run], images: Sequence[str], stage: str, names: Sequence[Optional[str]]
) -> list[Optional[dict[str, Any]]]:
    """Cells of a metric of single images, for each run."""
    of_runs = [[run.value(image, stage, name) for image in images] for run, name in zip(runs, names)]
    having = [values for values in of_runs if any(v is not None for v in values)]
    common = [i for i in range(len(images)) if all(values[i] is not None for values in having)]
    cells: list[Optional[dict[str, Any]]] = []
    first: Optional[tuple[str, list[float]]] = None
    for run, name, of_run in zip(runs, names, of_runs):
        if not common or of_run not in having:
            cells.append(None)
            continue
        values = [of_run[i] for i in common]
        cell = {"metric": name, "value": float(np.mean(values)), "images": len(values)}
        cell.update(interval=intervals.interval(values), difference=None)
        if first is None:
            first = run.name, values
        else:
            found = intervals.paired(first[1], values)
            if found:
                cell["difference"] = {"from": first[0], **found}
        cells.append(cell)
    return cells


def verdict(difference: Mapping[str, Any], better: str) -> str:
    """'better' or 'worse' where the interval does not reach 0, else ''."""
    bounds = difference["interval"]
    if not bounds or bounds[0] <= 0 <= bounds[1]:
        return ""
    return "better" if (difference["mean"] > 0) == (better == "higher") else "worse"


def _mean_cell(cell: Optional[Mapping[str, Any]]) -> str:
    if not cell:
        return "-"
    error = cell.get("error")
    return tables.with_interval(cell["value"], cell.get("interval")) + ("" if error is None else f" ± {error:.4f}")


def _difference_cell(cell: Optional[Mapping[str, Any]], better: str, first: str) -> str:
    difference = (cell or {}).get("difference")
    if not difference:
        return "-"
    bounds = difference["interval"]
    text = f"{difference['mean']:+.4f}" + (f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else "")
    other = "" if difference["from"] == first else f" (minus {tables.escaped(difference['from'])})"
    return f"{text} {verdict(difference, better)}".rstrip() + other


def markdown(found: Mapping[str, Any]) -> str:
    """Two tables: means, and differences from the first run, with their intervals."""
    columns, names = found["columns"], [tables.escaped(name) for name in found["runs"]]
    titles = [tables.heading(c["title"], c) for c in columns]
    means = [[name, *(_mean_cell(c["cells"][i]) for c in columns)] for i, name in enumerate(names)]
    differences = [
        [name, *(_difference_cell(c["cells"][i], c["better"], found["runs"][0]) for c in columns)]
        for i, name in enumerate(names)
    ]
    lines = tables.markdown_rows([f"{found['stage']}, {len(found['images'])} images", *titles], means)
    lines += ["", *tables.markdown_rows([f"minus {names[0]}", *titles], differences[1:])]
    if any(cell and cell.get("interval") for c in columns for cell in c["cells"]):
        text = f"In brackets: {intervals.CONFIDENCE:.0%} intervals by the bootstrap over images, of means and of paired"
        lines += ["", f"{text} differences; better or worse stands where that of a difference does not reach 0."]
    for remark in found["remarks"]:
        lines += ["", remark]
    lines += ["", *(f"- {c['title']}: {protocol.describe(c['protocol'])}" for c in columns)]
    return "\n".join(lines) + "\n"


def telling_images(runs: Sequence[Run], found: dict[str, Any], count: int) -> list[str]:
    """From the image where the last run loses most against the first to the one where it gains most, evenly spread."""
    for column in found["columns"]:
        first, last = (cell and cell["metric"] for cell in (column["cells"][0], column["cells"][-1]))
        if not (first and last):
            continue
        sign = 1 if column["better"] == "higher" else -1
        pairs = {}
        for image in found["images"]:
            a, b = runs[0].value(image, found["stage"], first), runs[-1].value(image, found["stage"], last)
            if a is not None and b is not None and np.isfinite(b - a):
                pairs[image] = sign * (b - a)
        if pairs:
            ranked = sorted(pairs, key=pairs.get)
            return [ranked[i] for i in np.unique(np.linspace(0, len(ranked) - 1, count).round().astype(int))]
    return found["images"][:count]


def grid(runs: Sequence[Run], images: Sequence[str], stage: str) -> Optional[np.ndarray]:
    """Pictures in rows: input, the runs' results, truth; of large ones the part where the last two differ most.

    Returns:
        (H, W, 3) BGR uint8, or None if no picture is to be found.

    Raises:
        UserError: for an image that the runs do not share.
    """
    for image in images:
        if any(image not in run.rows for run in runs):
            raise UserError(f"image {image} is not in all runs; {did_you_mean(image, runs[0].rows)}")

    def anywhere(image: str, kind: str) -> Optional[str]:
        return next(filter(None, (run.file(image, kind) for run in runs)), None)

    rows, used = [], set()
    for image in images:
        paths = {"input": anywhere(image, "input")}
        paths.update({run.name: run.file(image, stage) for run in runs})
        paths["truth"] = anywhere(image, "truth")
        pictures = {name: read_uint8(path) for name, path in paths.items() if path}
        if pictures:
            rows.append((image, part(pictures, CELL)))
            used.update(pictures)
    if not rows:
        return None
    columns = [name for name in ["input", *(run.name for run in runs), "truth"] if name in used]
    gap, line = 6, 18
    heights = [max(p.shape[0] for p in parts.values()) for _, parts in rows]
    canvas = Image.new(
        "RGB", (len(columns) * (CELL + gap) - gap, sum(heights) + (line + gap) * len(rows) + line), "white"
    )
    draw = ImageDraw.Draw(canvas)

    def write(text: str, x: int, y: int) -> None:
        while draw.textlength(text) > CELL:
            text = text[:-2] + "…" if len(text) > 2 else ""
        draw.text((x, y + 2), text, fill="black")

    for number, name in enumerate(columns):
        write(name, number * (CELL + gap), 0)
    top = line
    for (image, parts), height in zip(rows, heights):
        for number, name in enumerate(columns):
            if name in parts:
                rgb = cv2.cvtColor(parts[name], cv2.COLOR_BGR2RGB)
                canvas.paste(Image.fromarray(rgb), (number * (CELL + gap), top))
        draw.text((0, top + height + 2), image, fill="black")
        top += height + line + gap
    return np.ascontiguousarray(np.asarray(canvas)[..., ::-1])


def write_comparison(
    runs: Sequence[Run], output: str, stage: str, images: Sequence[str], count: int
) -> tuple[str, bool]:
    """Write ``comparison.json``, ``.md``, ``.csv``, ``.tex`` to a folder, and ``.png`` if there are pictures.

    Returns:
        the Markdown, and whether there is a grid.
    """
    return write_found(runs, compare(runs, stage), output, images, count)


def write_found(
    runs: Sequence[Run],
    found: dict[str, Any],
    output: str,
    images: Sequence[str],
    count: int,
    published: Optional[Mapping[str, Sequence[Optional[float]]]] = None,
) -> tuple[str, bool]:
    """Write what :func:`compare` found, with a grid of ``runs``, as :func:`write_comparison` does.

    Args:
        published: row of a paper -> its values in the columns, which the LaTeX table and the JSON have besides.
    """
    stage = found["stage"]
    chosen = [i if i in runs[0].rows else os.path.splitext(i)[0] for i in images] or telling_images(runs, found, count)
    picture = grid(runs, chosen, stage)
    text = markdown(found)
    stem, extra = os.path.join(output, "comparison"), {"published": dict(published)} if published else {}
    files.write_text(json.dumps(tables.finite({**found, **extra}), indent=1, allow_nan=False), f"{stem}.json")
    files.write_text(text, f"{stem}.md")
    files.write_text(formats.comma_separated(found), f"{stem}.csv")
    files.write_text(formats.latex(found, published), f"{stem}.tex")
    if picture is not None:
        write_atomically(cv2.imencode(".png", picture)[1].tobytes(), f"{stem}.png")
    return text, picture is not None
