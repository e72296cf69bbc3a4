"""Validation of any BasicSR image model: shared out over ranks, each image on its own, every stage measured."""

from __future__ import annotations

import inspect
import os
from contextlib import contextmanager
from typing import Any, Iterator, Optional

import cv2
import numpy as np
import torch.distributed as dist
from basicsr.metrics import calculate_metric
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ucdir_plugin import report
from ucdir_plugin.files import write_atomically

STAGES = {"lq": "input", "initial": "initial", "result": "restored"}


def handles(model: Any) -> bool:
    """Whether the model validates images one by one as SRModel does; others (video) keep their own loop."""
    return isinstance(model, SRModel) and type(model).nondist_validation is SRModel.nondist_validation


@contextmanager
def bare_networks(model: Any) -> Iterator[None]:
    """The model's networks without their parallel wrappers.

    A wrapped network with buffers, called by one rank alone, waits for the others for ever.
    """
    wrapped = {k: v for k, v in vars(model).items() if isinstance(v, (DataParallel, DistributedDataParallel))}
    vars(model).update({k: v.module for k, v in wrapped.items()})
    try:
        yield
    finally:
        vars(model).update(wrapped)


def measure(image: np.ndarray, truth: Optional[np.ndarray], metrics: dict[str, dict]) -> dict[str, Optional[float]]:
    """BasicSR metrics of one image; None where one cannot be measured (NIQE of a constant or very small image).

    Args:
        image, truth: (H, W, 3) BGR uint8. Without a truth, only no-reference metrics are computed.
        metrics: name -> ``{type: ..., keyword arguments}``.
    """
    values: dict[str, Optional[float]] = {}
    for name, cfg in metrics.items():
        cfg = {k: v for k, v in cfg.items() if k != "better"}
        if "img2" in inspect.signature(METRIC_REGISTRY.get(cfg["type"])).parameters:
            if truth is None or image.shape != truth.shape:  # no truth, or an input of a lower resolution
                continue
            value = float(calculate_metric({"img": image, "img2": truth}, cfg))
        else:
            try:
                with np.errstate(all="ignore"):
                    value = float(calculate_metric({"img": image}, cfg))
            except (np.linalg.LinAlgError, ValueError, IndexError, RuntimeError, AssertionError):
                # NIQE fits statistics to blocks of 96x96: too small or constant an image has none.
                value = float("nan")
        values[name] = None if np.isnan(value) else value
    return values


def sample_key(data: dict[str, Any], dataset_opt: dict) -> str:
    """The image's relative path: its name in tables and the key of its noise."""
    if "key" in data:
        return data["key"][0]
    path, root = data["lq_path"][0], dataset_opt.get("dataroot_lq")
    if not os.path.exists(path):  # the key of an LMDB
        return path
    return os.path.relpath(path, root) if root else os.path.basename(path)


def write_image(image: np.ndarray, path: str) -> None:
    """Write a PNG, whole or not at all.

    Args:
        image: (H, W) or (H, W, 3) BGR, uint8 or uint16.

    Raises:
        UserError: if it cannot be written.
    """
    write_atomically(cv2.imencode(".png", image)[1].tobytes(), path)


def validate(
    model: Any, dataset: Dataset, current_iter: Any, tb_logger: Any = None, save_img: bool = True
) -> list[report.Row]:
    """Restore every image of ``dataset``, measure input, initial prediction and result, log and write them.

    Args:
        model: an SRModel or a relative of it.
        dataset: samples with ``lq``, ``lq_path`` and, where known, ``gt``.
        current_iter: the iteration, or the run's name in a test, as in BasicSR.
        save_img: write the results and, side by side, input | initial | restored | truth.

    Returns:
        one row per image, in the order of their keys, on every rank.
    """
    opt, dataset_opt = model.opt, dataset.opt
    metrics = opt["val"].get("metrics") or {}
    rank, world = opt["rank"], opt["world_size"]
    loader = DataLoader(Subset(dataset, range(rank, len(dataset), world)), batch_size=1, num_workers=0)
    rows = []
    quiet = rank != 0 or not opt["val"].get("pbar", True)
    bar = tqdm(loader, unit="image", desc=dataset_opt["name"], leave=False, disable=quiet or None)
    with bare_networks(model):
        for data in bar:
            key = sample_key(data, dataset_opt)
            model.feed_data({**data, "key": [key]})
            model.test()
            visuals = model.get_current_visuals()
            images = {name: tensor2img([visuals[name]]) for name in (*STAGES, "gt") if name in visuals}
            truth = images.pop("gt", None)
            rows.append({"image": key, "metrics": {STAGES[n]: measure(v, truth, metrics) for n, v in images.items()}})
            if save_img:
                _write_pictures(opt, dataset_opt["name"], key, images, truth, current_iter)
            for name in ("gt", "lq", "output", "initial"):
                vars(model).pop(name, None)
    if opt["dist"]:
        shares: list = [None] * world
        dist.all_gather_object(shares, rows)
        rows = [row for share in shares for row in share]
    rows.sort(key=lambda row: row["image"])
    if metrics:
        _log(model, dataset_opt["name"], report.means(rows), current_iter, tb_logger)
    return rows


def _write_pictures(opt: dict, dataset: str, key: str, images: dict, truth: Any, current_iter: Any) -> None:
    stem = os.path.splitext(key)[0]
    folder = opt["path"]["visualization"]
    if opt["is_train"]:
        strip = os.path.join(folder, stem, f"{os.path.basename(stem)}_{current_iter}.png")
    else:
        suffix = opt["val"].get("suffix") or opt["name"]
        write_image(images["result"], os.path.join(folder, dataset, f"{stem}_{suffix}.png"))
        strip = os.path.join(folder, dataset, "side_by_side", f"{stem}.png")
    parts = [*(images[n] for n in STAGES if n in images), *([truth] if truth is not None else [])]
    if all(part.shape == parts[0].shape for part in parts):
        write_image(report.side_by_side(parts), strip)
    elif opt["is_train"]:
        write_image(images["result"], strip)


def _log(model: Any, dataset: str, summary: dict, current_iter: Any, tb_logger: Any) -> None:
    restored = summary.get("restored", {})
    if isinstance(current_iter, int):
        model._initialize_best_metric_results(dataset)
        best_results = model.best_metric_results[dataset]
        for metric, cfg in model.opt["val"]["metrics"].items():  # one that a resumed run did not have
            worst = float("inf") if cfg.get("better") == "lower" else float("-inf")
            best_results.setdefault(metric, {"better": cfg.get("better", "higher"), "val": worst, "iter": -1})
    lines = [f"Validation {dataset}"]
    for metric in restored:
        line = f"\t # {metric}: " + ", ".join(
            f"{stage} {values[metric]:.4f}" for stage, values in summary.items() if values.get(metric) is not None
        )
        if isinstance(current_iter, int) and restored[metric] is not None:
            model._update_best_metric_result(dataset, metric, restored[metric], current_iter)
            best = best_results[metric]
            line += f"\tBest: {best['val']:.4f} @ {best['iter']} iter"
        lines.append(line)
        if tb_logger:
            for stage, values in summary.items():
                if values.get(metric) is not None:
                    tb_logger.add_scalar(f"metrics/{dataset}/{metric}/{stage}", values[metric], current_iter)
    get_root_logger().info("\n".join(lines))
