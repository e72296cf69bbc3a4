"""Convert weights.

The authors' released weights, for path:pretrain_network_g:
    python tools/convert_weights.py --from ucdir IN.pth OUT.pth
OpenAI's diffusion U-Net, such as 256x256_diffusion_uncond.pt, as a prior of BIR-D:
    python tools/convert_weights.py --from adm IN.pt OUT.safetensors
What was trained here, as one file for restore.py --model:
    python tools/convert_weights.py --from training -opt FILE.yml net_g_ITER.pth OUT.safetensors
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Optional

from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError

if TYPE_CHECKING:  # argument errors come before the long import
    import torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="kind", choices=["ucdir", "adm", "training"], required=True, help="who made the file"
    )
    parser.add_argument("source", help="the file to convert")
    parser.add_argument("target", help="the file to write: for path:pretrain_network_g, or for restore.py --model")
    parser.add_argument(
        "-opt", help="training: the option file of the weights; adm: a YAML file of ADMUNet's arguments"
    )
    parser.add_argument(
        "--dtype", choices=["fp32", "fp16", "bf16"], help="training, adm: store weights so (default: fp32)"
    )
    parser.add_argument("--licence", help="training: shown to whoever uses the file")
    args = parser.parse_args()
    if args.licence and args.kind != "training":
        raise UserError("--licence is for --from training")
    if args.kind == "adm":
        import ucdir_plugin  # noqa: F401  (registers the network)
        from ucdir_plugin.options.calls import check_registered
        from ucdir_plugin.options.reading import read_yaml_file
        from ucdir_plugin.zoo.convert import convert_adm

        network = read_yaml_file(args.opt) if args.opt else {}
        check_registered("arch", {"type": "ADMUNet", **network}, args.opt or "network")
        done = convert_adm(args.source, args.target, network, _dtype(args.dtype))
    elif args.kind == "ucdir":
        if args.opt or args.dtype:
            raise UserError("-opt and --dtype are for --from training and adm")
        from ucdir_plugin.zoo.convert import convert_ucdir

        done = convert_ucdir(args.source, args.target)
        if done["dropped"]:
            print(f"dropped the schedule buffers {', '.join(done['dropped'])}")
    else:
        if not args.opt:
            raise UserError("--from training needs the option file: -opt FILE.yml")
        from ucdir_plugin.options.check import load_options
        from ucdir_plugin.zoo.model_files import write_model

        notes = {"licence": args.licence} if args.licence else {}
        done = write_model(args.source, load_options(args.opt, is_train=False), args.target, _dtype(args.dtype), notes)
    print(f"{args.target}: {done['tensors']} tensors, {done['parameters'] / 1e6:.2f} M parameters")
    return 0


def _dtype(name: Optional[str]) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name or "fp32"]


if __name__ == "__main__":
    sys.exit(run_cli(main))
