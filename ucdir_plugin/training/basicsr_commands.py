"""Option files of this package under BasicSR's own commands, ``basicsr.train.train_pipeline`` and ``test_pipeline``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ucdir_plugin import registry
from ucdir_plugin.compat import take_over_option_files
from ucdir_plugin.evaluation.measure import for_basicsr_loop
from ucdir_plugin.options.calls import is_own
from ucdir_plugin.options.reading import read_yaml, read_yaml_file
from ucdir_plugin.training.setup import seed_everything, setup
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.zoo.model_files import find_weights


def _read(path: str) -> dict:
    """A file's options; what only tools/ know is refused.

    Raises:
        UserError: with the way that there is instead.
    """
    opt = read_yaml_file(path)
    if "_base_" in opt:
        raise UserError(
            f"{path}: BasicSR's own commands know no _base_: python tools/train.py -opt {path} --write FLAT.yml"
            " writes a file that they take"
        )
    if opt.get("imports") is not None:
        raise UserError(
            f"{path}: option imports is for tools/train.py and tools/test.py; under BasicSR's own commands import"
            f" {opt['imports']} beside ucdir_plugin, and remove it"
        )
    if opt.get("engine", "basicsr") != "basicsr":
        raise UserError(f"{path}: engine: {opt['engine']} is not BasicSR's: python tools/train.py -opt {path}")
    opt.setdefault("num_gpu", "auto")
    for section in ("datasets", "path"):
        if opt.get(section) is None:
            opt[section] = {}
    return opt


def _value(text: str) -> Any:
    """A value of ``--force_yml``; BasicSR writes nothing as None, too."""
    return None if text.lower() == "none" else read_yaml(text, "--force_yml")


def _uses_this_package(opt: dict) -> bool:
    kinds = [("model", opt.get("model_type")), *(("dataset", data.get("type")) for data in opt["datasets"].values())]
    return any(name in registry.names(kind) and is_own(registry.lookup(kind, name)) for kind, name in kinds)


def _complete(opt: dict, args: argparse.Namespace, root_path: str, is_train: bool) -> dict:
    """Check and complete options that use a model or data set of this package; others are left as they are.

    Raises:
        UserError: naming what is wrong.
    """
    if not _uses_this_package(opt):
        return opt
    ours = argparse.Namespace(**vars(args), trust_config=False, weights_dir=None, download=False)
    try:
        opt = setup(ours, is_train, root_path)
        seed_everything(opt["manual_seed"], "basicsr", opt["rank"])  # each rank crops and flips in its own way
        if not is_train and "network_g" in opt:
            find_weights(opt, args.force_yml or [])
    except UserError as err:
        if not str(err).startswith(("option ", "unknown option ")):
            raise
        raise UserError(f"{os.path.basename(args.opt)}: {err}") from err
    unused = ("test",) if is_train else ("train",)  # upstream would stop there, and test on what was trained on
    opt["datasets"] = {name: data for name, data in opt["datasets"].items() if data["phase"] not in unused}
    if not is_own(registry.lookup("model", opt["model_type"])):
        val = opt["val"]  # the log would start here, without its file
        val["metrics"] = for_basicsr_loop(val.get("metrics"), val.get("weights_dir"), print)
    return opt


take_over_option_files(_read, _value, _complete)
