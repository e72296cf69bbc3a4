"""Restoring and measuring whole data sets, in training and in tests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from typing import Any, Optional

from ucdir_plugin.compat import build_dataloader
from ucdir_plugin.evaluation import report, tables
from ucdir_plugin.evaluation.measure import for_basicsr_loop
from ucdir_plugin.training.stops import Stop
from ucdir_plugin.training.validation import bare_networks, handles, validate
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import sha256_of
from ucdir_plugin.utils.protocols import HasRestorer, NamesWeights
from ucdir_plugin.utils.versions import versions


def own_validation(
    model: Any, dataset: Any, current_iter: Any, tb_logger: Any, save_img: bool, stop: Optional[Stop] = None
) -> None:
    """Validation of a model that has its own (video, padded windows): on rank 0, as in BasicSR."""
    opt = model.opt
    opt["val"]["metrics"] = for_basicsr_loop(opt["val"].get("metrics"), opt["val"].get("weights_dir"))
    loader = build_dataloader(dataset, {**dataset.opt, "persistent_workers": False}, opt["num_gpu"], opt["dist"])
    # Of several ranks nobody knows here where they wait for each other.
    with bare_networks(model), stop.at_once() if stop and not opt["dist"] else contextlib.nullcontext():
        model.validation(loader, current_iter, tb_logger, save_img)
    if stop:
        stop.agree(opt, model.device)


_IRRELEVANT = {
    "path",
    "rank",
    "world_size",
    "dist",
    "dist_params",
    "num_gpu",
    "auto_resume",
    "root_path",
    "logger",
    "datasets",
}
"""Options that restored images do not depend on, or that are looked at apart."""


def _what_decides(opt: dict, model: Any, dataset: dict, weights: Optional[str]) -> str:
    """All that decides what comes out of an image, in short; of its files, see :func:`validate`.

    Args:
        weights: their SHA-256.
    """
    files = [os.stat(v) for v in dataset.values() if isinstance(v, str) and os.path.isfile(v)]
    used = [
        {key: value for key, value in opt.items() if key not in {*_IRRELEVANT, "val"}},
        opt["val"].get("sampling"),
        {key: value for key, value in opt["path"].items() if key.startswith(("param_key", "strict_load"))},
        dataset,
        [(file.st_size, file.st_mtime_ns) for file in files],
        weights,
        model.restorer.record_settings() if isinstance(model, HasRestorer) else None,
        versions(),
    ]
    return hashlib.sha256(json.dumps(used, sort_keys=True, default=str).encode()).hexdigest()


def weights_of(opt: dict, model: Any) -> Optional[str]:
    """The file that a model's weights are from."""
    return model.weights if isinstance(model, NamesWeights) else opt["path"]["pretrain_network_g"]


def validate_set(
    opt: dict, model: Any, val_set: Any, iteration: int, tb_logger: Any, stop: Optional[Stop]
) -> Optional[tables.Results]:
    """Validate on a data set in training and write its table; None for a model with a validation of its own.

    Raises:
        Stopped: on all ranks, if one was asked to stop.
    """
    name, save_img = val_set.opt["name"], opt["val"]["save_img"]
    if not handles(model):
        own_validation(model, val_set, iteration, tb_logger, save_img, stop)
        return None
    results = validate(model, val_set, iteration, tb_logger, save_img, stop=stop)
    if opt["rank"] == 0:
        about = {"name": opt["name"], "dataset": name, "iteration": iteration}
        tables.write_tables(results, os.path.join(opt["path"]["experiments_root"], f"metrics_{name}"), about)
    return results


def test_sets(opt: dict, model: Any, sets: list[Any]) -> int:
    """Restore and measure data sets, write pictures and tables; returns the exit code.

    Raises:
        UserError: if no image of a set could be restored.
    """
    weights, failed, lost = weights_of(opt, model), 0, []
    digest = sha256_of(weights) if weights else None
    # Outside of results/NAME, which the next run moves away.
    unfinished = os.path.join(os.path.dirname(opt["path"]["results_root"]), f".unfinished_{opt['name']}")
    for test_set in sets:
        name = test_set.opt["name"]
        if not handles(model):
            own_validation(model, test_set, opt["name"], None, opt["val"]["save_img"])
            continue
        root = opt["path"]["results_root"]
        pictures = report.Store(os.path.join(unfinished, name))
        settings = _what_decides(opt, model, test_set.opt, digest)
        results = validate(model, test_set, opt["name"], None, opt["val"]["save_img"], pictures, settings)
        failed += len(results.failed)
        if not results.rows:
            lost.append(f"none of the {len(test_set)} images of {name}")
        elif opt["rank"] == 0:
            stem, page = os.path.join(root, f"metrics_{name}"), os.path.join(root, f"report_{name}.html")
            about = {"name": opt["name"], "dataset": name, "weights": weights, "weights_sha256": digest}
            tables.write_tables(results, stem, about)
            report.write_report(results, page, about, pictures.part)
            print(tables.markdown_table(results))
            print(f"weights: {weights}")
            print(f"table: {stem}.md .csv .json; report: {page}; pictures: {opt['path']['visualization']}", flush=True)
    if opt["rank"] == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    if lost:
        raise UserError(f"{' and '.join(lost)} could be restored: the log says why")
    return 1 if failed else 0
