"""The command that converts weights: tools/convert_weights.py once its arguments are parsed."""

from __future__ import annotations

import argparse

import torch

from ucdir_plugin.options.calls import check_registered
from ucdir_plugin.options.check import load_options
from ucdir_plugin.options.reading import read_yaml_file
from ucdir_plugin.zoo.convert import convert_adm, convert_ucdir
from ucdir_plugin.zoo.model_files import write_model

_DTYPES = {None: torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(args: argparse.Namespace) -> int:
    """Convert the weights that the arguments of tools/convert_weights.py name; returns the exit code."""
    dtype = _DTYPES[args.dtype]
    if args.kind == "adm":
        network = read_yaml_file(args.opt) if args.opt else {}
        check_registered("arch", {"type": "ADMUNet", **network}, args.opt or "network")
        done = convert_adm(args.source, args.target, network, dtype)
    elif args.kind == "ucdir":
        done = convert_ucdir(args.source, args.target)
        if done["dropped"]:
            print(f"dropped the schedule buffers {', '.join(done['dropped'])}")
    else:
        notes = {"licence": args.licence} if args.licence else {}
        done = write_model(
            args.source, load_options(args.opt, is_train=False, trust=args.trust_config), args.target, dtype, notes
        )
    print(f"{args.target}: {done['tensors']} tensors, {done['parameters'] / 1e6:.2f} M parameters")
    return 0
