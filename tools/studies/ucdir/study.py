"""Trained systems on the same test images: restored, measured, in tables; what tools/study_ucdir.py runs.

A plan (YAML) says which runs there are; the sets of test images and the metrics are an option file's. Restored images
are kept one by one, and measured again only where what made them has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import statistics
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from basicsr.data import build_dataset
from pydantic import ConfigDict, TypeAdapter, ValidationError
from tqdm import tqdm

import ucdir_plugin
from ucdir_plugin import pipeline, report, restorer
from ucdir_plugin.errors import UserError, WriteError, did_you_mean, named
from ucdir_plugin.evaluation import Evaluation
from ucdir_plugin.figure import progress_figure
from ucdir_plugin.files import write_atomically
from ucdir_plugin.folders import read_uint8
from ucdir_plugin.options import load_options, read_yaml_file
from ucdir_plugin.study.cells import COLUMNS
from ucdir_plugin.validation import sample_key, write_image

INPUT = "input"
"""``model`` of the run that restores nothing."""


_STRICT = ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True)
class Run:
    """A system, and how it is used.

    Attributes:
        name: in tables.
        model, weights, sampling: as of :func:`ucdir_plugin.load_model`; the model ``input`` is the degraded image.
        seeds: how many, from 0 on; what varies with them is a mean.
        samples: of which the mean is measured.
        blend: 0 is the initial prediction.
        iteration: of the training, for the curves; runs of one name then differ in it.
    """

    __pydantic_config__ = _STRICT

    name: str
    model: str
    weights: Optional[str] = None
    sampling: Dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int = 1
    samples: int = 1
    blend: float = 1.0
    iteration: Optional[int] = None

    @property
    def label(self) -> str:
        return self.name if self.iteration is None else f"{self.name}, {self.iteration} iterations"


@dataclasses.dataclass(frozen=True)
class Part:
    """Runs that stand in one table.

    Attributes:
        title: of the table.
        runs: the first is what the others are compared with, unless ``against`` names another one.
        images: how many of each set, evenly spread; all if left out.
        sets: only these of the option file's.
    """

    __pydantic_config__ = _STRICT

    title: str
    runs: List[Run]
    against: Optional[str] = None
    images: Optional[int] = None
    sets: Optional[List[str]] = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """``opt``: the option file of sets and metrics; ``parts``: name -> :class:`Part`."""

    __pydantic_config__ = _STRICT

    opt: str
    parts: Dict[str, Part]


def read_plan(path: str) -> Plan:
    """
    Raises:
        UserError: naming the first fault.
    """
    raw = read_yaml_file(path)
    try:
        plan = TypeAdapter(Plan).validate_python(raw)
    except ValidationError as err:
        error = err.errors()[0]
        where = ":".join(str(place) for place in error["loc"])
        raise UserError(f"{path}: {where}: {error['msg'][0].lower()}{error['msg'][1:]}") from err
    if not plan.parts:
        raise UserError(f"{path}: parts: there are none")
    for name, part in plan.parts.items():
        here = f"{path}: parts:{name}"
        if not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(f"{here}: a name of letters, digits, _ and - is expected")
        labels = [run.label for run in part.runs]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice or not labels:
            raise UserError(f"{here}: " + (f"two runs are called {twice}" if twice else "no runs"))
        if part.against is not None and part.against not in labels:
            raise UserError(f"{here}: against: {did_you_mean(part.against, labels)}")
        if any(min(run.seeds, run.samples) < 1 for run in part.runs) or (part.images is not None and part.images < 1):
            raise UserError(f"{here}: seeds, samples and images are 1 or more")
        idle = next((run for run in part.runs if run.model == INPUT and run != Run(run.name, INPUT)), None)
        if idle:
            raise UserError(f"{here}: {idle.name}: the input has a name and nothing else")
    return plan


@dataclasses.dataclass
class TestSet:
    """Test images of an option file: keys, evenly chosen, and what gives each of them."""

    name: str
    dataset: Any
    keys: List[str]
    index: Dict[str, int]
    paths: Dict[str, List[str]]

    def chosen(self, count: Optional[int]) -> List[str]:
        if count is None or count >= len(self.keys):
            return self.keys
        return [self.keys[i * len(self.keys) // count] for i in range(count)]

    def sample(self, key: str) -> Dict[str, Any]:
        """``lq`` and ``gt`` (3, H, W) RGB in [0, 1], and what else the dataset says.

        Raises:
            UserError: without a truth, there is nothing to measure.
        """
        sample = self.dataset[self.index[key]]
        for name in ("lq", "gt"):
            if name not in sample:
                raise UserError(f"test set {self.name} has no {name} images: name its dataroot_{name}")
        return sample

    def state(self, key: str) -> List[Tuple[int, int]]:
        """Sizes and times of an image's files."""
        paths = self.paths[key]
        return [_state(path) for path in paths if os.path.isfile(path)]


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) RGB in [0, 1] -> (H, W, 3) BGR."""
    return (image.numpy().transpose(1, 2, 0)[..., ::-1] * 255).round().astype(np.uint8)


def known_sets(opt: Mapping[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Name -> options of the test and validation sets of checked options."""
    phases = {phase: phase.split("_")[0] for phase in opt["datasets"]}
    return {
        data["name"]: {**data, "phase": phases[phase], "scale": opt["scale"]}
        for phase, data in opt["datasets"].items()
        if phases[phase] in ("val", "test")
    }


def read_set(data: Mapping[str, Any]) -> TestSet:
    """
    Raises:
        UserError: for missing images, or two that differ in their extension only.
    """
    dataset, name = build_dataset(dict(data)), data["name"]
    texts = [{k: [v] for k, v in dataset[i].items() if isinstance(v, str)} for i in range(len(dataset))]
    keys = [sample_key(text, data) for text in texts]
    stems = [os.path.splitext(key)[0] for key in keys]
    twice = next((key for key, stem in zip(keys, stems) if stems.count(stem) > 1), None)
    if twice is not None:
        raise UserError(f"test set {name}: {twice} differs from another image in its extension only: rename one")
    paths = [[text[k][0] for k in ("lq_path", "gt_path") if k in text] for text in texts]
    return TestSet(name, dataset, keys, {key: i for i, key in enumerate(keys)}, dict(zip(keys, paths)))


def _state(path: str) -> Tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


class Images:
    """What one run with one seed makes of a set's images; those that are there are kept."""

    def __init__(self, output: str, images: TestSet, run: Run, seed: int, model: Any):
        self.set, self.run, self.seed, self.model = images, run, seed, model
        told = {} if model is None else model.record_settings(seed, run.samples, run.blend)
        data = {k: v for k, v in images.dataset.opt.items() if k != "name"}
        told = json.dumps([told, run.samples, run.blend, data, ucdir_plugin.__version__], sort_keys=True, default=str)
        self.digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9]+", "_", run.label).strip("_")
        self.folder = os.path.join(output, images.name, f"{name}_{self.digest}" if model else INPUT)

    def file(self, key: str) -> str:
        return os.path.join(self.folder, f"{os.path.splitext(key)[0]}.png")

    def about(self, key: str) -> Dict[str, Any]:
        """Seconds and network passes of an image; empty if it is not restored yet."""
        path = f"{os.path.splitext(self.file(key))[0]}.json"
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            return {}
        files = [self.file(key), *([self.truth(key)] if self.model is None else [])]
        fits = all(map(os.path.isfile, files)) and isinstance(found, dict) and found.get("made") == self._made(key)
        return found if fits else {}

    def _made(self, key: str) -> List[Any]:
        """What an image was made of."""
        return json.loads(json.dumps([self.digest, self.set.state(key)]))

    def make(self, key: str) -> bool:
        """Restore an image; whether it was not there."""
        if self.about(key):
            return False
        sample = self.set.sample(key)
        if self.model is None:
            image, about = to_uint8(sample["lq"]), {"seconds": 0.0, "nfe": 0}
            write_image(to_uint8(sample["gt"]), self.truth(key))
        else:
            told = {c.name: sample.get("condition", {}).get(c.name) for c in getattr(self.model, "conditions", ())}
            done = restorer.restore(
                np.ascontiguousarray(sample["lq"].numpy().transpose(1, 2, 0)),
                self.model,
                seed=self.seed,
                samples=self.run.samples,
                blend=self.run.blend,
                condition={name: value for name, value in told.items() if value is not None},
                key=key,
            )
            if not np.isfinite(done.image).all():
                raise UserError("the result holds NaN or infinite values: the weights are damaged")
            image = (done.image[..., ::-1] * 255).round().astype(np.uint8)
            about = {name: done.info[name] for name in ("seconds", "nfe")}
        write_image(image, self.file(key))
        about.update(threads=torch.get_num_threads(), made=self._made(key))
        write_atomically(json.dumps(about).encode(), f"{os.path.splitext(self.file(key))[0]}.json")
        return True

    def truth(self, key: str) -> str:
        return os.path.join(os.path.dirname(self.folder), "truth", f"{os.path.splitext(key)[0]}.png")

    def measured(self, keys: Sequence[str], evaluation: Evaluation) -> Tuple[report.Results, Dict[str, Any]]:
        """By an empty evaluation, or what was measured before on the same files."""
        files = [(key, *_state(self.file(key)), *_state(self.truth(key))) for key in keys]
        stamp = [evaluation.protocols, evaluation.without_each, files]
        digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()
        path = os.path.join(self.folder, f"metrics_{len(keys)}.json")
        with contextlib.suppress(UserError):  # not there yet, or damaged: it is measured again
            results, about = report.read_results(path)
            if about.get("fingerprint") == digest:
                return results, about
        source = os.path.join(os.path.dirname(self.folder), INPUT)
        for key in keys:
            files = {"restored": self.file(key), "truth": self.truth(key)}
            files["input"] = os.path.join(source, os.path.relpath(self.file(key), self.folder))
            files = {kind: os.path.relpath(file, self.folder) for kind, file in files.items()}
            evaluation.add(key, {"restored": _read(self.file(key))}, _read(self.truth(key)), None, files)
        results = evaluation.results()
        of_images = [self.about(key) for key in keys]
        about = {
            "name": self.run.label,
            "dataset": self.set.name,
            "fingerprint": digest,
            "seed": self.seed,
            "seconds": statistics.fmean(a["seconds"] for a in of_images),
            "nfe": statistics.fmean(a["nfe"] for a in of_images),
            "settings": {}
            if self.model is None
            else self.model.record_settings(self.seed, self.run.samples, self.run.blend),
        }
        report.write_tables(results, path[: -len(".json")], about)
        return results, about


def _read(path: str) -> np.ndarray:
    try:
        return read_uint8(path)
    except UserError as err:
        raise UserError(f"{path} is damaged: delete it, and it is made again") from err


@dataclasses.dataclass
class Measured:
    """A run on a set: the measurements of each seed."""

    run: Run
    results: List[report.Results]
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
        found = report.paired([b[key] for key in shared], [a[key] for key in shared])
        return found and (found["mean"], found["interval"])
    values = other.mean(metric), one.mean(metric)
    if None in values:
        return None
    found = report.paired_sets(values, other.without(metric), one.without(metric))
    return found["mean"], found["interval"]


TITLES = {**COLUMNS, "fid": ("FID", 2), "kid": ("KID", 3)}


def _columns(measured: Sequence[Measured]) -> Dict[str, str]:
    """Metric -> heading, of all that any run has a value of."""
    stamps: Dict[str, Any] = {}
    for item in measured:
        stamps.update({n: item.results[0].protocols.get(n) for n in item.results[0].metrics()})
    names = [
        n for n in sorted(stamps, key=lambda n: report.place(stamps[n])) if any(m.mean(n) is not None for m in measured)
    ]
    return {n: report.heading(TITLES.get(n, (n, 3))[0], stamps[n]) for n in names}


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
        rows.append([report.escaped(item.run.label), *cells, f"{seconds:.2f}", f"{nfe:.0f}"])
    return report.markdown_rows(["system", *columns.values(), "s / image", "NFE"], rows)


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
        rows.append([report.escaped(item.run.label), *cells])
    return report.markdown_rows([f"minus {report.escaped(against)}", *columns.values()], rows)


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
            curves = _curves(measured)
            if len(measured) > 1 and not curves:
                text.append("\n".join(differences_table(measured, part.against or part.runs[0].label)))
            if curves:
                picture = os.path.join(output, f"{part_name}_{images.name}.png")
                write_atomically(progress_figure(curves), picture)
                say(f"curves: {picture}")
            every = [line for item in measured for results in item.results for line in report.remarks(results)]
            text += dict.fromkeys(every)
        report.write_text("\n\n".join(text) + "\n", path)  # what there is so far
    unavailable = [f"- {name}: not available: {reason}" for name, reason in evaluation.unavailable.items()]
    report.write_text("\n\n".join([*text, *unavailable]) + "\n", path)
    return path


def _load(run: Run, device: str) -> Any:
    """
    Raises:
        UserError: if it is not there, or cannot be used so.
    """
    if run.model == INPUT:
        return None
    model = restorer.load_model(run.model, run.weights, device=device, sampling=dict(run.sampling))
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
                raise UserError(f"{images.name}: {named(key, pipeline.reason_of(err))}") from err
        results, about = made.measured(keys, evaluation.empty())
        found.results.append(results)
        found.about.append(about)
        psnr = results.summary().get("restored", {}).get("psnr")
        value = "" if psnr is None else f"{psnr:.2f} dB, "
        say(f"{images.name}: {run.label}, seed {seed}: {value}{about['seconds']:.2f} s per image, {fresh} restored now")
    return found


def _curves(measured: Sequence[Measured]) -> Dict[str, Dict[str, List[Tuple[int, float]]]]:
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
