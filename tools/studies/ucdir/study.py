"""Trained systems on the same test images: restored, measured, in tables; what tools/study_ucdir.py runs.

A plan (YAML) says which runs there are; the sets of test images and the metrics are an option file's. Restored images
are kept one by one, and measured again only where what made them has changed.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Optional, Sequence

from tqdm import tqdm
from ucdir_cli.studies.figures import progress_figure
from ucdir_cli.studies.ucdir.images import Images, TestSet, known_sets, read_set
from ucdir_cli.studies.ucdir.plan import INPUT, Plan, Run
from ucdir_cli.studies.ucdir.tables import Measured, curves_of, differences_table, means_table

from ucdir_plugin.evaluation import tables
from ucdir_plugin.evaluation.measure import Evaluation
from ucdir_plugin.options.check import load_options
from ucdir_plugin.restoration import folder, load
from ucdir_plugin.utils import files
from ucdir_plugin.utils.errors import UserError, WriteError, did_you_mean, named
from ucdir_plugin.utils.files import write_atomically


def study(
    plan: Plan,
    output: str,
    *,
    parts: Optional[Sequence[str]] = None,
    sets: Optional[Sequence[str]] = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> str:
    """Run what is missing of a plan, write tables and curves; returns the path of the Markdown file.

    Args:
        output: folder for everything.
        parts, sets: only these; default: all.
        say: called with a line for each run that was measured.

    Raises:
        UserError: for wrong names, missing images or weights.
    """
    for name in parts or ():
        if name not in plan.parts:
            raise UserError(f"there is no part {name!r}; {did_you_mean(name, plan.parts)}")
    opt = load_options(plan.opt, is_train=False)
    chosen = {name: part for name, part in plan.parts.items() if parts is None or name in parts}
    known = known_sets(opt)
    for name in (*(sets or ()), *(name for part in chosen.values() for name in part.sets or ())):
        if name not in known:
            raise UserError(f"{plan.opt} has no test set {name}; {did_you_mean(name, known)}")
    wanted = {p: [n for n in part.sets or known if sets is None or n in sets] for p, part in chosen.items()}
    if not any(wanted.values()):
        raise UserError(f"no part has a test set{' of ' + ', '.join(sets) if sets else f': {plan.opt} has none'}")
    for part_name, part in chosen.items():  # what is missing is said before hours of work
        for run in part.runs:
            try:
                _load(run, device)
            except UserError as err:
                raise UserError(f"parts:{part_name}: {run.label}: {err}") from err
    loaded = {name: read_set(known[name]) for name in dict.fromkeys(n for names in wanted.values() for n in names)}
    evaluation = Evaluation(opt["val"].get("metrics") or {}, opt["val"].get("weights_dir"), without_each=True)
    text = [f"# Tables of tools/study_ucdir.py ({os.path.basename(plan.opt)})"]
    mark = "_".join([*(parts or ()), *(sets or ())])
    path = os.path.join(output, f"study_{mark}.md" if mark else "study.md")
    for part_name, part in chosen.items():
        text += [f"## {part.title}"] if wanted[part_name] else []
        for images in [loaded[name] for name in wanted[part_name]]:
            keys = images.chosen(part.images)
            measured = [_measured(run, images, keys, output, evaluation, device, say) for run in part.runs]
            text += [f"### {images.name}: {len(keys)} images", "\n".join(means_table(measured))]
            curves = curves_of(measured)
            if len(measured) > 1 and not curves:
                text.append("\n".join(differences_table(measured, part.against or part.runs[0].label)))
            if curves:
                picture = os.path.join(output, f"{part_name}_{images.name}.png")
                write_atomically(progress_figure(curves), picture)
                say(f"curves: {picture}")
            every = [line for item in measured for results in item.results for line in tables.remarks(results)]
            text += dict.fromkeys(every)
        files.write_text("\n\n".join(text) + "\n", path)  # what there is so far
    unavailable = [f"- {name}: not available: {reason}" for name, reason in evaluation.unavailable.items()]
    files.write_text("\n\n".join([*text, *unavailable]) + "\n", path)
    return path


def _load(run: Run, device: str) -> Any:
    """Load the model of a run.

    Raises:
        UserError: if it is not there, or cannot be used so.
    """
    if run.model == INPUT:
        return None
    model = load.load_model(run.model, run.weights, device=device, sampling=dict(run.sampling))
    model.check(run.samples, run.blend)
    return model


def _measured(
    run: Run,
    images: TestSet,
    keys: Sequence[str],
    output: str,
    evaluation: Evaluation,
    device: str,
    say: Callable[[str], None],
) -> Measured:
    # The input first: its folder holds the truths.
    original = Images(output, images, Run(INPUT, INPUT), 0, None)
    for key in keys:
        original.make(key)
    found = Measured(run, [], [])
    model = _load(run, device)
    for seed in range(run.seeds):
        made = Images(output, images, run, seed, model)
        fresh = 0
        for key in tqdm(keys, desc=f"{images.name}: {run.label}", unit="image", disable=None, leave=False):
            try:
                fresh += made.make(key)
            except WriteError:
                raise
            except (UserError, RuntimeError, MemoryError, ValueError) as err:
                raise UserError(f"{images.name}: {named(key, folder.reason_of(err))}") from err
        results, about = made.measured(keys, evaluation.empty())
        found.results.append(results)
        found.about.append(about)
        psnr = results.summary().get("restored", {}).get("psnr")
        value = "" if psnr is None else f"{psnr:.2f} dB, "
        say(f"{images.name}: {run.label}, seed {seed}: {value}{about['seconds']:.2f} s per image, {fresh} restored now")
    return found
