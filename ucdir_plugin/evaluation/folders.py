"""Measuring images that are there already: folders of results, and of their truths and degraded inputs where known."""

from __future__ import annotations

import inspect
import os
from typing import Any, Iterable, NamedTuple, Optional, Sequence

import numpy as np
from tqdm import tqdm

from ucdir_plugin.evaluation import report, tables
from ucdir_plugin.evaluation.measure import Evaluation, for_dataset, needs
from ucdir_plugin.metrics.distances import SETS
from ucdir_plugin.options.calls import check_metric
from ucdir_plugin.options.check import load_options
from ucdir_plugin.options.reading import read_assignments
from ucdir_plugin.registry import lookup
from ucdir_plugin.restoration.jobs import main_output, read_record
from ucdir_plugin.utils.errors import UserError, did_you_mean
from ucdir_plugin.utils.image_reading import image_size, images_by_stem, read_uint8

WITH_TRUTH = ("lpips", "stlpips", "niqe", "fid", "kid", "psnr", "ssim")
WITH_INPUT = ("loe",)
WITHOUT = ("niqe",)
"""Metrics by default: with truths, besides with inputs, with neither."""


class Item(NamedTuple):
    """An image to measure: its key in tables, and stage or ``truth`` -> file."""

    key: str
    files: dict[str, str]


def parse_metrics(entries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``NAME[:KEY=VALUE,...]`` entries as ``val: metrics:`` has them; NAME without ``calculate_``, too.

    Raises:
        UserError: for names and arguments that do not exist.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name, _, arguments = entry.partition(":")
        where = f"--metrics {name}"
        kind = name if name.startswith("calculate_") else f"calculate_{name}"
        cfg = {"type": kind, **read_assignments([a for a in arguments.split(",") if a], where)}
        parameters = inspect.signature(lookup("metric", kind, where)).parameters
        if "crop_border" in parameters:
            cfg.setdefault("crop_border", 0)
        check_metric(cfg, where)
        title, count = name, 1
        while title in metrics:
            count += 1
            title = f"{name}_{count}"
        metrics[title] = cfg
    return metrics


def _main_results(folder: str, found: dict[str, str]) -> dict[str, str]:
    """Choose the main one of tools/restore.py's files for an image (samples, mean, spread), under its name."""
    left = dict(found)
    for root, _, files in os.walk(folder):
        for file in files:
            stem, extension = os.path.splitext(os.path.relpath(os.path.join(root, file), folder).replace(os.sep, "/"))
            record = read_record(os.path.join(folder, stem)) if extension == ".json" else None
            if record:
                parent = os.path.dirname(stem)
                for name in record["outputs"]:
                    path = left.pop(os.path.join(parent, os.path.splitext(name)[0]), None)
                    if path and name == main_output(record):
                        left[stem] = path
    return left


def find_items(
    restored: str, truth: Optional[str] = None, degraded: Optional[str] = None, suffix: str = ""
) -> list[Item]:
    """Images of the folders that belong together: of one path below them, without extension and ``suffix``.

    Args:
        restored, truth, degraded: folders, or one image each.
        suffix: that results' names have and the others' have not.

    Raises:
        UserError: for missing folders, a folder and a file, images without a partner (which).
    """
    given = {"restored": restored, "truth": truth, "input": degraded}
    given = {stage: path for stage, path in given.items() if path}
    for path in given.values():
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist")
    if any(os.path.isfile(path) != os.path.isfile(restored) for path in given.values()):
        raise UserError("give either folders or single images, not both: " + ", ".join(given.values()))
    if os.path.isfile(restored):
        return [Item(os.path.basename(truth or restored), given)]
    found = {stage: images_by_stem(path, path) for stage, path in given.items()}
    results = _main_results(restored, found["restored"])
    if suffix:
        without: dict[str, str] = {}
        for stem, name in results.items():
            short = stem[: -len(suffix)] if stem.endswith(suffix) else stem
            if short in without:
                raise UserError(f"{restored}: {without[short]} and {name} are one without {suffix}: which one is it?")
            without[short] = name
        results = without
    found["restored"] = results
    for stage, path in list(given.items())[1:]:
        lonely = sorted(results.keys() - found[stage].keys())
        if lonely:
            names = _some([results[stem] for stem in lonely])
            raise UserError(f"{restored}: {names} no partner in {path}; {_hint(lonely[0], found[stage])}")
        missing = sorted(found[stage].keys() - results.keys())
        if missing:
            names = _some([found[stage][stem] for stem in missing])
            raise UserError(f"{path}: {names} no partner in {restored}; restore them too, or take them out")
    keys = found.get("truth") or found.get("input") or results
    return [
        Item(keys[stem], {stage: os.path.join(path, found[stage][stem]) for stage, path in given.items()})
        for stem in sorted(results)
    ]


def _some(names: Sequence[str]) -> str:
    first, rest = ", ".join(names[:5]), len(names) - 5
    return first + (f" and {rest} more" if rest > 0 else "") + (" has" if len(names) == 1 else " have")


def _hint(stem: str, known: Iterable[str]) -> str:
    start = max((k for k in known if stem.startswith(k)), key=len, default=None)
    return f"give --suffix {stem[len(start) :]}, if all results end so" if start else did_you_mean(stem, known)


def evaluate(
    items: Sequence[Item], evaluation: Evaluation, output: str, about: dict[str, Any]
) -> tuple[tables.Results, dict[str, str]]:
    """Measure all, write ``metrics.json``, ``.md``, ``.csv`` and ``report.html`` to the folder ``output``.

    Returns:
        the measurements, and key -> reason of images that could not be read or differ in size from their truth.

    Raises:
        UserError: if none could be measured, or the tables cannot be written.
    """
    failed: dict[str, str] = {}
    by_key = {item.key: item for item in items}
    for item in tqdm(items, unit="image", disable=None, leave=False):
        try:
            sizes = {stage: image_size(path) for stage, path in item.files.items()}
            if "truth" in sizes and sizes["truth"] != sizes["restored"]:
                texts = [f"{item.files[s]} ({sizes[s][1]}x{sizes[s][0]})" for s in ("restored", "truth")]
                raise UserError(" and ".join(texts) + " differ in size")
            images = {stage: read_uint8(path) for stage, path in item.files.items()}
        except UserError as err:
            failed[item.key] = str(err)
            continue
        stages = {stage: images[stage] for stage in ("input", "restored") if stage in images}
        files = {stage: os.path.abspath(path) for stage, path in item.files.items()}
        evaluation.add(item.key, stages, images.get("truth"), images.get("input"), files)
    if len(failed) == len(items):
        raise UserError(f"nothing could be measured: {next(iter(failed.values()))}")
    results = evaluation.results()

    def pictures(key: str) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        files = by_key[key].files
        images = {stage: read_uint8(files[stage]) for stage in ("input", "restored", "truth") if stage in files}
        return report.part(images), images["restored"].shape[:2]

    tables.write_tables(results, os.path.join(output, "metrics"), about)
    report.write_report(results, os.path.join(output, "report.html"), about, pictures)
    return results, failed


def measurable(
    metrics: dict[str, dict[str, Any]], truth: bool, degraded: bool, reference: bool = False
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Those metrics that need no images but what is given, and why the others cannot be measured.

    Raises:
        UserError: if there is none.
    """
    lacking = {}
    for name, cfg in metrics.items():
        asked = needs(cfg)
        if "img2" in asked and not (truth or (reference and cfg["type"] in SETS)):
            or_others = " (or --reference)" if cfg["type"] in SETS else ""
            lacking[name] = f"it compares with true images: give GT{or_others}"
        elif "lq" in asked and not degraded:
            lacking[name] = "it compares with the degraded images: give --input"
    left = {name: cfg for name, cfg in metrics.items() if name not in lacking}
    if not left:
        raise UserError("; ".join(f"metric {name}: {reason}" for name, reason in lacking.items()))
    return left, lacking


def default_metrics(truth: bool, degraded: bool, reference: bool = False) -> list[str]:
    """Names for :func:`parse_metrics`."""
    without = (*WITHOUT, "fid", "kid") if reference else WITHOUT
    return [*(WITH_TRUTH if truth else without), *(WITH_INPUT if degraded else ())]


class MetricOptions(NamedTuple):
    """What an option file says of measuring (section ``val``)."""

    metrics: dict[str, dict[str, Any]]
    weights_dir: Optional[str]
    reference: Optional[str]


def metrics_of(opt: str, trust: bool = False) -> MetricOptions:
    """What an option file says of measuring; the degradation ``own`` is that of its first test set.

    Args:
        trust: whether it may import modules (``imports``).

    Raises:
        UserError: if it has no metrics.
    """
    options = load_options(opt, is_train=False, trust=trust)
    val = options["val"]
    if not val.get("metrics"):
        raise UserError(f"{opt}: option val:metrics is missing: it says what to measure")
    sets = [dataset for phase, dataset in options["datasets"].items() if phase.split("_")[0] in ("val", "test")]
    metrics = for_dataset(val["metrics"], sets[0]) if sets else val["metrics"]
    return MetricOptions(metrics, val.get("weights_dir"), val.get("reference"))
