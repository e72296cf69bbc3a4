"""Convert weights.

The authors' released weights, for path:pretrain_network_g:
    python tools/convert_weights.py --from ucdir IN.pth OUT.pth
OpenAI's diffusion U-Net, such as 256x256_diffusion_uncond.pt, as a prior of BIR-D:
    python tools/convert_weights.py --from adm IN.pt OUT.safetensors
What was trained here, as one file for restore.py --model:
    python tools/convert_weights.py --from training -opt FILE.yml net_g_ITER.pth OUT.safetensors
"""

import argparse
import sys

from ucdir_cli.command_line import Parser, add_imports, option_file, run


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--from", dest="kind", choices=["ucdir", "adm", "training"], required=True, help="who made the file")
    add("source", help="the file to convert")
    add("target", help="the file to write: for path:pretrain_network_g, or for restore.py --model")
    add(
        "-opt",
        type=option_file,
        help="training: the option file of the weights; adm: a YAML file of ADMUNet's arguments",
    )
    add("--dtype", choices=["fp32", "fp16", "bf16"], help="training, adm: store weights so (default: fp32)")
    add("--licence", help="training: shown to whoever uses the file")
    add_imports(parser)
    args = parser.parse_args()
    if args.licence and args.kind != "training":
        parser.error("--licence is for --from training")
    if args.kind == "ucdir" and (args.opt or args.dtype):
        parser.error("-opt and --dtype are for --from training and adm")
    if args.kind == "training" and not args.opt:
        parser.error("--from training needs the option file: -opt FILE.yml")
    return args


if __name__ == "__main__":
    sys.exit(run("ucdir_plugin.cli.convert_weights:run", parse_args()))
