"""Which cells the study has, and running them."""

from __future__ import annotations

import os
from typing import Callable, Dict, List, Optional, Sequence

from tqdm import tqdm
from ucdir_cli.studies.bird.cases import CASES, SIZE, chosen, prepare
from ucdir_cli.studies.bird.cells import GENERATING, METRICS, SYSTEMS, Cell, applies, run_cell
from ucdir_cli.studies.bird.classical import CLASSICAL
from ucdir_cli.studies.bird.tables import Measured, pictures, write_study

from ucdir_plugin.evaluation.measure import Evaluation
from ucdir_plugin.utils.errors import UserError, did_you_mean


def main_part(priors: Sequence[str], cases: Sequence[str], images: int) -> List[Cell]:
    """Every system on every case."""
    cells = []
    for case in cases:
        cells += [Cell(case, name, images=images) for name in ("input", *CLASSICAL) if _runs(name, case)]
        for prior in priors:
            for system in SYSTEMS:
                if _runs(system, case) and (prior != "ffdnet" or system not in GENERATING):
                    cells.append(Cell(case, system, prior, images=images))
    return cells


def _runs(system: str, case: str) -> bool:
    return system == "input" or applies(system, CASES[case])


def seeds_part(priors: Sequence[str], cases: Sequence[str], images: int, seeds: int) -> List[Cell]:
    """Blur, holes and low light on all images, several seeds."""
    cells = []
    for case in (c for c in ("gaussian2.5", "holes", "lowlight") if c in cases):
        cells.append(Cell(case, "input", images=images))
        cells += [Cell(case, name, images=images) for name in CLASSICAL if _runs(name, case)]
        for prior in priors:
            systems = ("default",) if prior == "ffdnet" else ("gdp", "C", "BIR-D (paper)", "default")
            cells += [Cell(case, s, prior, seed, images=images) for s in systems for seed in range(seeds)]
    return cells


def sizes_part(priors: Sequence[str], cases: Sequence[str], images: int) -> List[Cell]:
    """The kernel's size against the true one (Tables 6 and 7)."""
    cells = []
    for case in (c for c in ("gaussian1.5", "motion", "lowlight", "sr4") if c in cases):
        for prior in priors:
            for system in ("default",) if prior == "ffdnet" else ("default", "guided"):
                for size in (1, 3, 5, 7, 9, 15, 21):
                    cells.append(Cell(case, system, prior, settings=(("kernel_size", size),), images=images))
    return cells


def first_part(priors: Sequence[str], cases: Sequence[str], images: int, folder: str) -> List[Cell]:
    """A first stage on and off, for random and for biased starts of the kernel (Table 8).

    It is ``default`` with FFDNet; what it restored is the start, the target, or both, of the second stage.
    """
    cells = []
    for case in (c for c in ("gaussian2.5",) if c in cases):
        stage = Cell(case, "default", "ffdnet", images=images)
        cells.append(stage)
        for prior in (p for p in priors if p != "ffdnet"):
            for start in ("random", "gaussian"):
                for use in (None, "start", "target", "both"):
                    first = {"images": os.path.join(folder, stage.folder), "use": use}
                    keys = (("first_stage", first),) if use else ()
                    changed = (("kernel_start", start), *((("start", "warm"),) if use in ("start", "both") else ()))
                    cells.append(Cell(case, "guided", prior, bird=keys, settings=changed, images=images))
    return cells


PARTS = ("main", "seeds", "sizes", "first")


def cells_of(part: str, priors: Sequence[str], cases: Sequence[str], count: int, total: int, seeds: int, folder: str):
    """List the cells of a part of the study.

    Raises:
        UserError: for an unknown part.
    """
    if part not in PARTS:
        raise UserError(f"there is no part {part!r}; {did_you_mean(part, PARTS)}")
    if part == "main":
        return main_part(priors, cases, count)
    if part == "seeds":
        return seeds_part(priors, cases, total, seeds)
    return sizes_part(priors, cases, count) if part == "sizes" else first_part(priors, cases, count, folder)


def study(
    source: str,
    output: str,
    *,
    parts: Sequence[str] = ("main",),
    priors: Sequence[str] = ("ffdnet",),
    cases: Sequence[str] = tuple(CASES),
    systems: Optional[Sequence[str]] = None,
    only: Optional[str] = None,
    without: Optional[str] = None,
    count: int = 16,
    steps: int = 100,
    seeds: int = 3,
    batch: int = 16,
    say: Callable[[str], None] = print,
) -> str:
    """Run what is missing, write the tables; returns the path of the Markdown file.

    Args:
        source: folder of photographs.
        output: folder for everything.
        systems: of all parts only these, by name; default: all.
        only, without: text files of names, see :func:`chosen`.
        count: images of all parts but ``seeds``, evenly among all.
        steps: of the systems that start from noise.
        say: called with a line for each cell that was run.

    Raises:
        UserError: for wrong names, or too few images.
    """
    for case in cases:
        if case not in CASES:
            raise UserError(f"there is no case {case!r}; {did_you_mean(case, CASES)}")
    found = chosen(source, only, without)
    if len(found) < count:
        raise UserError(f"{source}: {len(found)} images are there, {count} are wanted (--images)")
    evenly = [found[i * len(found) // count] for i in range(count)]
    ordered = evenly + [name for name in found if name not in evenly]
    total = len(ordered) if "seeds" in parts else count
    images = prepare(source, ordered[:total], output, cases)
    measured: Dict[str, List[Measured]] = {}
    evaluation = Evaluation(METRICS)
    known = ["input", *CLASSICAL, *SYSTEMS]
    for system in systems or ():
        if system not in known:
            raise UserError(f"there is no system {system!r}; {did_you_mean(system, known)}")
    planned = {part: cells_of(part, priors, cases, count, total, seeds, output) for part in parts}
    planned = {part: [c for c in cells if systems is None or c.system in systems] for part, cells in planned.items()}
    bar = tqdm(total=sum(map(len, planned.values())), unit="cell", disable=None)
    for part, cells in planned.items():
        for cell in cells:
            results, about, now = run_cell(cell, images, steps, batch, evaluation.empty())
            measured.setdefault(part, []).append((cell, results, about))
            bar.update()
            if now:
                psnr = results.summary().get("restored", {}).get("psnr")
                value = "all failed" if psnr is None else f"{psnr:.2f} dB"
                say(f"{cell.case}: {cell.label}, seed {cell.seed}: {value}, {about['seconds']:.2f} s per image")
    bar.close()
    head = f"{count} centre crops of {SIZE}x{SIZE} pixels; systems that start from noise: {steps} steps."
    head = f"# Tables of tools/study_bird.py\n\n{head}"
    path = os.path.join(output, "study.md")
    write_study(measured, path, head)
    for picture in pictures(measured, images, images.names[: min(4, count)]):
        say(f"picture: {picture}")
    return path
