"""Tables and curves of a study: means, paired differences, iterations."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from ucdir_cli.studies.bird.cells import COLUMNS
from ucdir_cli.studies.ucdir.plan import Run

from ucdir_plugin.evaluation import intervals, tables


@dataclasses.dataclass
class Measured:
    """A run on a set: the measurements of each seed."""

    run: Run
    results: List[tables.Results]
    about: List[Dict[str, Any]]

    def mean(self, metric: str) -> Optional[float]:
        """Over images and seeds."""
        values = [r.summary().get("restored", {}).get(metric) for r in self.results]
        return None if None in values else statistics.fmean(values)

    def deviation(self, metric: str) -> Optional[float]:
        """Between seeds."""
        values = [r.summary().get("restored", {}).get(metric) for r in self.results]
        return (
            statistics.stdev(values) if len(values) > 1 and None not in values and np.isfinite(values).all() else None
        )

    def error(self, metric: str) -> Optional[float]:
        """Standard error of the first seed's value, of a metric that gives one."""
        return self.results[0].sets.get("restored", {}).get(metric, {}).get("standard_error")

    def of_images(self, metric: str) -> Dict[str, float]:
        """Image -> mean over the seeds, where each measured it."""
        rows: Dict[str, List[Optional[float]]] = {}
        for results in self.results:
            for row in results.rows:
                rows.setdefault(row["image"], []).append(row["metrics"].get("restored", {}).get(metric))
        return {key: statistics.fmean(values) for key, values in rows.items() if None not in values}

    def without(self, metric: str) -> Dict[str, Optional[float]]:
        """Image -> mean over the seeds of the metric of all other images; for metrics of sets."""
        found = [r.sets.get("restored", {}).get(metric, {}).get("without", {}) for r in self.results]
        columns = {key: [values.get(key) for values in found] for key in found[0]}
        return {key: None if None in values else statistics.fmean(values) for key, values in columns.items()}


def difference(one: Measured, other: Measured, metric: str) -> Optional[Tuple[float, Optional[Tuple[float, float]]]]:
    """Mean of ``one`` minus ``other`` over the images that both have, and its 95% interval where there is one."""
    a, b = one.of_images(metric), other.of_images(metric)
    shared = sorted(a.keys() & b.keys())
    if shared:
        found = intervals.paired([b[key] for key in shared], [a[key] for key in shared])
        return found and (found["mean"], found["interval"])
    values = other.mean(metric), one.mean(metric)
    if None in values:
        return None
    found = intervals.paired_sets(values, other.without(metric), one.without(metric))
    return found["mean"], found["interval"]


TITLES = {**COLUMNS, "fid": ("FID", 2), "kid": ("KID", 3)}


def _columns(measured: Sequence[Measured]) -> Dict[str, str]:
    """Metric -> heading, of all that any run has a value of."""
    stamps: Dict[str, Any] = {}
    for item in measured:
        stamps.update({n: item.results[0].protocols.get(n) for n in item.results[0].metrics()})
    names = [
        n for n in sorted(stamps, key=lambda n: tables.place(stamps[n])) if any(m.mean(n) is not None for m in measured)
    ]
    return {n: tables.heading(TITLES.get(n, (n, 3))[0], stamps[n]) for n in names}


def means_table(measured: Sequence[Measured]) -> List[str]:
    """Markdown: a row each run, means over images and seeds, ± the deviation between seeds; SE: of KID, over images."""
    columns = _columns(measured)
    rows = []
    for item in measured:
        cells = []
        for name in columns:
            value, deviation, digits = item.mean(name), item.deviation(name), TITLES.get(name, ("", 3))[1]
            text = "-" if value is None else f"{value:.{digits}f}"
            error = item.error(name)
            if deviation is not None:
                text += f" ± {deviation:.{digits}f}"
            elif error is not None:
                text += f" (SE {error:.{digits}f})"
            cells.append(text)
        seconds, nfe = (statistics.fmean(a[k] for a in item.about) for k in ("seconds", "nfe"))
        rows.append([tables.escaped(item.run.label), *cells, f"{seconds:.2f}", f"{nfe:.0f}"])
    return tables.markdown_rows(["system", *columns.values(), "s / image", "NFE"], rows)


def differences_table(measured: Sequence[Measured], against: str) -> List[str]:
    """Markdown: relative differences from one run (PSNR: in dB), with 95% intervals over images.

    Of a value within two standard errors of zero, as KID's may be, a percentage means nothing: those as they are.
    """
    base = next(m for m in measured if m.run.label == against)
    columns = {name: title for name, title in _columns(measured).items() if base.mean(name) is not None}
    rows = []
    for item in measured:
        if item is base:
            continue
        cells = []
        for name in columns:
            found = difference(item, base, name)
            if found is None:
                cells.append("-")
                continue
            value, digits = abs(base.mean(name)), TITLES.get(name, ("", 3))[1]
            factor, unit = (1.0, " dB" if name == "psnr" else "")
            if name != "psnr" and value > 2 * (base.error(name) or 0):
                factor, unit, digits = 100 / value, " %", 1
            text = f"{found[0] * factor:+.{digits}f}{unit}"
            if found[1] is not None:
                low, high = (bound * factor for bound in found[1])
                text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(text)
        rows.append([tables.escaped(item.run.label), *cells])
    return tables.markdown_rows([f"minus {tables.escaped(against)}", *columns.values()], rows)


def curves_of(measured: Sequence[Measured]) -> Dict[str, Dict[str, List[Tuple[int, float]]]]:
    """Metric -> run's name -> (iteration, mean), of runs that say their iteration."""
    curves: Dict[str, Dict[str, List[Tuple[int, float]]]] = {}
    for item in measured:
        if item.run.iteration is None:
            continue
        for name in item.results[0].metrics():
            value = item.mean(name)
            if value is not None:
                curves.setdefault(name, {}).setdefault(item.run.name, []).append((item.run.iteration, value))
    return curves
