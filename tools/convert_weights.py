"""Convert weights.

The authors' released weights, for path:pretrain_network_g:
    python tools/convert_weights.py --from ucdir IN.pth OUT.pth
What was trained here, as one file for restore.py --model:
    python tools/convert_weights.py --from training -opt FILE.yml net_g_ITER.pth OUT.safetensors
"""

import argparse
import sys

from ucdir_plugin.errors import UserError, run_cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="kind", choices=["ucdir", "training"], required=True, help="who made the file")
    parser.add_argument("source", help="the file to convert")
    parser.add_argument("target", help="the file to write: for path:pretrain_network_g, or for restore.py --model")
    parser.add_argument("-opt", help="training: the option file that the weights were trained with")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="training: store weights so (default: fp32)")
    parser.add_argument("--licence", help="training: shown to whoever uses the file")
    args = parser.parse_args()
    if args.kind == "ucdir":
        if args.opt or args.dtype or args.licence:
            raise UserError("-opt, --dtype and --licence are for --from training")
        from ucdir_plugin.weights import convert_ucdir

        done = convert_ucdir(args.source, args.target)
        if done["dropped"]:
            print(f"dropped the schedule buffers {', '.join(done['dropped'])}")
    else:
        if not args.opt:
            raise UserError("--from training needs the option file: -opt FILE.yml")
        import torch

        from ucdir_plugin.options import load_options
        from ucdir_plugin.weights import write_model

        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype or "fp32"]
        notes = {"licence": args.licence} if args.licence else {}
        done = write_model(args.source, load_options(args.opt, is_train=False), args.target, dtype, notes)
    print(f"{args.target}: {done['tensors']} tensors, {done['parameters'] / 1e6:.2f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
