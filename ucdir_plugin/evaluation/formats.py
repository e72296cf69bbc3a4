"""A comparison of runs for papers and spreadsheets: LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from typing import Any, Mapping, Optional, Sequence

from ucdir_plugin.evaluation.tables import number
from ucdir_plugin.metrics import protocol

_LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
_LATEX.update({character: f"\\{character}" for character in "#$%&_{}"})


def latex_text(text: str) -> str:
    """Text as LaTeX sets it, on one line."""
    return re.sub(r"[\\^~#$%&_{}]", lambda found: _LATEX[found[0]], " ".join(text.split()))


def latex(found: Mapping[str, Any], published: Optional[Mapping[str, Sequence[Optional[float]]]] = None) -> str:
    """A ``tabular`` of means, a run a line, the best of each column bold; how each was measured, as comments.

    Args:
        found: of :func:`ucdir_plugin.evaluation.compare.compare`.
        published: row of a paper -> its values in the columns; they stand below a line, and none of them is bold.
    """
    columns = found["columns"]
    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$"}
    head = [latex_text(c["title"]) + arrows.get(c["better"], "") for c in columns]
    best = []
    for column in columns:
        values = [cell["value"] for cell in column["cells"] if cell and cell["value"] is not None]
        choose = max if column["better"] == "higher" else min
        best.append(choose(values) if len(values) > 1 else None)
    lines = [f"% {found['stage']}, {len(found['images'])} images"]
    lines += [f"% {c['title']}: {' '.join(protocol.describe(c['protocol']).split())}" for c in columns]
    lines += [f"% {' '.join(remark.split())}" for remark in found["remarks"]]
    lines += [
        r"\begin{tabular}{l" + "r" * len(columns) + "}",
        r"\hline",
        " & ".join(["Method", *head]) + r" \\",
        r"\hline",
    ]
    for i, run in enumerate(found["runs"]):
        cells = [latex_text(run)]
        for column, top in zip(columns, best):
            value = (column["cells"][i] or {}).get("value")
            text = "--" if column["cells"][i] is None else number(value)
            cells.append(rf"\textbf{{{text}}}" if value is not None and value == top else text)
        lines.append(" & ".join(cells) + r" \\")
    if published:
        lines += [r"\hline", rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{Published, measured otherwise}} \\"]
        for name, values in published.items():
            lines.append(" & ".join([latex_text(name), *("--" if v is None else f"{v:g}" for v in values)]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def comma_separated(found: Mapping[str, Any]) -> str:
    """A line for each run and metric: mean, its interval, images, and the difference from the first run with its own.

    Args:
        found: of :func:`ucdir_plugin.evaluation.compare.compare`.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    names = (
        "run",
        "metric",
        "better",
        "value",
        "low",
        "high",
        "images",
        "difference",
        "difference_low",
        "difference_high",
    )
    writer.writerow(names)
    for i, run in enumerate(found["runs"]):
        for column in found["columns"]:
            cell = column["cells"][i]
            if not cell:
                continue
            difference = cell.get("difference") or {}
            bounds, others = cell.get("interval") or ("", ""), difference.get("interval") or ("", "")
            values = (
                cell["value"],
                *bounds,
                cell.get("images", len(found["images"])),
                difference.get("mean", ""),
                *others,
            )
            writer.writerow([run, column["title"], column["better"], *("" if v is None else v for v in values)])
    return buffer.getvalue()
