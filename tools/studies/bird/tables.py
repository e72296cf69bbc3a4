"""Tables and pictures of cells."""

from __future__ import annotations

import os
import statistics
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from ucdir_cli.studies.bird.cases import CASES, SIZE, Images
from ucdir_cli.studies.bird.cells import COLUMNS, Cell
from ucdir_cli.studies.figures import trends_figure

from ucdir_plugin.evaluation import tables
from ucdir_plugin.utils import files, image_writing
from ucdir_plugin.utils.files import write_atomically
from ucdir_plugin.utils.image_reading import read_uint8
from ucdir_plugin.utils.image_writing import write_image

Measured = Tuple[Cell, tables.Results, Dict[str, Any]]


def _mean(values: Sequence[Optional[float]]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def rows_of(measured: Sequence[Measured]) -> List[Dict[str, Any]]:
    """A row for each system of one case: means over the images and seeds, and their deviation between the seeds."""
    groups: Dict[str, List[Measured]] = {}
    for item in measured:
        groups.setdefault(item[0].label, []).append(item)
    inputs = groups["input"][0][1].rows if "input" in groups else []
    base = {r["image"]: r["metrics"]["restored"].get("psnr") for r in inputs}
    rows = []
    for label, items in groups.items():
        row: Dict[str, Any] = {"system": label, "seeds": len(items)}
        for name in COLUMNS:
            means = [results.summary().get("restored", {}).get(name) for _, results, _ in items]
            row[name] = _mean(means)
            if len(items) > 1 and None not in means:
                row[f"{name}_sd"] = statistics.stdev(means)
        below = [
            value < base[r["image"]]
            for _, results, _ in items
            for r in results.rows
            if (value := r["metrics"]["restored"].get("psnr")) is not None and base.get(r["image"]) is not None
        ]
        row["below"] = f"{sum(below)} of {len(below)}" if below and label != "input" else ""
        row["failed"] = sum(len(results.failed) for _, results, _ in items)
        row["seconds"], row["nfe"] = _mean([about["seconds"] for *_, about in items]), items[0][2]["nfe"]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; columns that nobody has a value in are left out."""
    shown = {n: c for n, c in COLUMNS.items() if any(r[n] is not None for r in rows)}
    failed = any(r["failed"] for r in rows)
    heads = ["system", *(title for title, _ in shown.values()), "below input"]
    heads += [*(["failed"] if failed else []), "s", "NFE"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        cells = [r["system"]]
        for name, (_, digits) in shown.items():
            text = "" if r[name] is None else f"{r[name]:.{digits}f}"
            cells.append(text + (f" ± {r[f'{name}_sd']:.{digits}f}" if f"{name}_sd" in r else ""))
        seconds = "" if r["psnr"] is None else f"{r['seconds']:.2f}"  # nothing came of it
        cells += [r["below"], *([str(r["failed"])] if failed else []), seconds, str(r["nfe"] or "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_study(parts: Mapping[str, Sequence[Measured]], path: str, head: str) -> None:
    """All tables in one Markdown file."""
    titles = {
        "main": "All systems",
        "seeds": "All images, several seeds (mean ± deviation between seeds)",
        "sizes": "Size of the kernel",
        "first": "First stage",
    }
    text = [head]
    for part, measured in parts.items():
        text.append(f"## {titles[part]}")
        for case in dict.fromkeys(cell.case for cell, *_ in measured):
            rows = rows_of([item for item in measured if item[0].case == case])
            text += [f"### {CASES[case].title}", table(rows)]
    files.write_text("\n\n".join(text) + "\n", path)


def pictures(parts: Mapping[str, Sequence[Measured]], images: Images, names: Sequence[str]) -> List[str]:
    """For each case of the part main: of each image a row of truth and what every system made of it; and the trends."""
    written = []
    cases: Dict[str, List[Cell]] = {}
    restored = set()
    for cell, results, _ in parts.get("main", ()):
        cases.setdefault(cell.case, []).append(cell)
        if results.rows:
            restored.add(cell)
    for case, cells in cases.items():
        rows = []
        for name in names:
            paths = [images.truth(name), *(os.path.join(images.folder, cell.folder, name) for cell in cells)]
            blank = np.full((SIZE, SIZE, 3), 255, np.uint8)
            rows.append(image_writing.side_by_side([read_uint8(f) if os.path.isfile(f) else blank for f in paths], 4))
        path = os.path.join(images.folder, "pictures", f"{case}.png")
        gap = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
        write_image(np.concatenate([p for row in rows for p in (row, gap)][:-1], 0), path)
        legend = "\n".join(["truth", *(cell.label for cell in cells)])
        files.write_text(legend + "\n", os.path.join(images.folder, "pictures", f"{case}.txt"))
        written.append(path)
        kept = {c.label: os.path.join(images.folder, c.folder, "trends.npy") for c in cells if c in restored}
        trends = {label: np.load(file) for label, file in kept.items() if os.path.isfile(file)}
        if trends:
            path = os.path.join(images.folder, "pictures", f"{case}_trends.png")
            write_atomically(trends_figure(trends), path)
            written.append(path)
    return written
