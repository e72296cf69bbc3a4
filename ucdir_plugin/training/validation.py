"""Validation of any BasicSR image model: shared out over ranks, each image on its own, every stage measured."""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Iterator, Optional

import numpy as np
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ucdir_plugin.compat import SRModel, get_root_logger, tensor2img
from ucdir_plugin.data.loader import PatientDataset
from ucdir_plugin.data.samples import sample_key
from ucdir_plugin.evaluation import tables
from ucdir_plugin.evaluation.measure import Evaluation, for_dataset, reference_images
from ucdir_plugin.evaluation.report import Store
from ucdir_plugin.utils import image_writing
from ucdir_plugin.utils.errors import ImageError, Stopped
from ucdir_plugin.utils.files import write_atomically
from ucdir_plugin.utils.image_writing import write_image
from ucdir_plugin.utils.protocols import GivesFiles

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


def validate(
    model: Any,
    dataset: Dataset,
    current_iter: Any,
    tb_logger: Any = None,
    save_img: bool = True,
    store: Optional[Store] = None,
    settings: str = "",
    stop: Any = None,
) -> tables.Results:
    """Restore every image of ``dataset``, measure input, initial prediction and result, log and write them.

    Args:
        model: an SRModel or a relative of it.
        dataset: samples with ``lq``, ``lq_path`` and, where known, ``gt``.
        current_iter: the iteration, or the run's name in a test, as in BasicSR.
        save_img: write the results and, side by side, input | initial | restored | truth.
        store: keeps each image's pictures, stage or ``truth`` -> (H, W, 3) BGR uint8; those that it has of the same
            ``settings`` and files are not made again.
        settings: all that decides what comes out.
        stop: of a training (:class:`ucdir_plugin.training.stops.Stop`).

    Returns:
        the measurements of all images, on every rank.

    Raises:
        Stopped: on all ranks, if one was asked to stop.
    """
    opt, dataset_opt = model.opt, dataset.opt
    metrics = opt["val"].get("metrics") or {}
    rank, world = opt["rank"], opt["world_size"]
    patient = PatientDataset(dataset, dataset_opt["wait_for_data"] if stop else 0)
    loader = DataLoader(Subset(patient, range(rank, len(dataset), world)), batch_size=1, num_workers=0)
    evaluation = _evaluation(opt, dataset_opt)
    quiet = rank != 0 or not opt["val"].get("pbar", True)
    bar = tqdm(loader, unit="image", desc=dataset_opt["name"], leave=False, disable=quiet or None)
    kept = 0
    # One that is stopped waits for the others below.
    with suppress(Stopped) if stop else nullcontext(), bare_networks(model), stop.at_once() if stop else nullcontext():
        for data in bar:
            key = sample_key(data, dataset_opt)
            stamp = f"{settings} {_state(data)}"
            found = store.find(key, stamp) if store else None
            if found is None:
                try:
                    found = _restored(model, {**data, "key": [key]})
                except ImageError as err:
                    evaluation.fail(key, str(err))
                    continue
                if store:
                    store.keep(key, *found, stamp)
            else:
                kept += 1
            stages, further = found
            truth = stages.pop("truth", None)
            images = {name: stages[stage] for name, stage in STAGES.items() if stage in stages}
            files = _files(data)
            if save_img:
                files.update(_write_pictures(opt, dataset_opt["name"], key, images, truth, current_iter))
                for suffix, content in further.items():
                    folder = os.path.join(opt["path"]["visualization"], f"{dataset_opt['name']}_learned")
                    write_atomically(content, os.path.join(folder, f"{os.path.splitext(key)[0]}{suffix}"))
            known = data["known"][0, 0].numpy() if "known" in data else None
            evaluation.add(key, stages, truth, images.get("lq"), files, known)
            for name in ("gt", "lq", "output", "initial"):
                vars(model).pop(name, None)
    if stop:
        stop.agree(opt, model.device)
    if kept:
        by = f"rank {rank}: " if world > 1 else ""
        print(f"{by}{kept} images of {dataset_opt['name']} were restored by a run that stopped: kept", flush=True)
    if opt["dist"]:
        # Features can be large: they go to rank 0 alone, and the numbers come back.
        shares = [None] * world if rank == 0 else None
        dist.gather_object(evaluation.share() if rank else None, shares)
        if rank == 0:
            evaluation.merge(shares[1:])
        results = [evaluation.results() if rank == 0 else None]
        dist.broadcast_object_list(results)
        results = results[0]
    else:
        results = evaluation.results()
    if metrics:
        _log(model, dataset_opt["name"], results.summary(), current_iter, tb_logger)
    return results


def _restored(model: Any, data: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    """Pictures of an image, stage or ``truth`` -> (H, W, 3) BGR uint8, and what else the model makes of it.

    Raises:
        ImageError: if it cannot be restored.
    """
    model.feed_data(data)
    model.test()
    visuals = model.get_current_visuals()
    names = {**STAGES, "gt": "truth"}
    pictures = {stage: tensor2img([visuals[name]]) for name, stage in names.items() if name in visuals}
    return pictures, model.result_files() if isinstance(model, GivesFiles) else {}


def _state(data: dict[str, Any]) -> list[list[int]]:
    """Whether the files of an image are still the same."""
    paths = [data[name][0] for name in ("lq_path", "gt_path") if name in data]
    states = [os.stat(path) for path in paths if os.path.isfile(path)]
    return [[state.st_size, state.st_mtime_ns] for state in states]


def _evaluation(opt: dict, dataset_opt: dict) -> Evaluation:
    """Rank 0 comes first: it alone downloads."""
    val, metrics = opt["val"], for_dataset(opt["val"].get("metrics") or {}, dataset_opt)
    reference = reference_images(val.get("reference"), "option val:reference")
    if opt["dist"] and opt["rank"]:
        dist.barrier()
    download = bool(val.get("download")) and opt["rank"] == 0
    evaluation = Evaluation(metrics, val.get("weights_dir"), download, reference=reference)
    if opt["dist"] and opt["rank"] == 0:
        dist.barrier()
    return evaluation


def _files(data: dict[str, Any]) -> dict[str, str]:
    """Where input and truth lie, if they are files; an input made from its truth is none."""
    paths = {name: data[f"{name}_path"][0] for name in ("lq", "gt") if f"{name}_path" in data}
    if paths.get("lq") == paths.get("gt"):
        paths.pop("lq", None)
    names = {"lq": STAGES["lq"], "gt": "truth"}
    return {names[name]: os.path.abspath(path) for name, path in paths.items() if os.path.isfile(path)}


def _write_pictures(opt: dict, dataset: str, key: str, images: dict, truth: Any, current_iter: Any) -> dict[str, str]:
    """Returns where a test's result is, relative to its tables."""
    stem, files = os.path.splitext(key)[0], {}
    folder = opt["path"]["visualization"]
    if opt["is_train"]:
        strip = os.path.join(folder, stem, f"{os.path.basename(stem)}_{current_iter}.png")
    else:
        suffix = opt["val"].get("suffix") or opt["name"]
        path = os.path.join(folder, dataset, f"{stem}_{suffix}.png")
        write_image(images["result"], path)
        files[STAGES["result"]] = os.path.relpath(path, opt["path"]["results_root"])
        strip = os.path.join(folder, f"{dataset}_side_by_side", f"{stem}.png")
    parts = [*(images[n] for n in STAGES if n in images), *([truth] if truth is not None else [])]
    if all(part.shape == parts[0].shape for part in parts):
        write_image(image_writing.side_by_side(parts), strip)
    elif opt["is_train"]:
        write_image(images["result"], strip)
    return files


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
