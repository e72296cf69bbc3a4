"""Restore a photograph, or all of a folder.

python tools/restore.py --model jpeg_any_fast -i photo.jpg -o restored/
python tools/restore.py -opt options/demo_ucdir.yml -i photo.jpg -o restored/
python tools/restore.py --model mine.safetensors -i photos/ -o restored/ --sampler ddim --steps 20
python tools/restore.py --model bird --task deblur -i blurred.jpg -o restored/

Any size works: images larger than --tile are restored in patches, in little more memory than the image itself takes.
Beside each result NAME.png, NAME.json says how it was made. Results that are there already are kept (--overwrite).
BIR-D (--model bird) restores without training, with an image prior; NAME.learned.png shows the degradation it found.
Under torchrun or slurm's srun each process restores its share of the folder; what a lost one left, the next run does.
"""

import argparse
import sys

from ucdir_cli.command_line import Parser, add_imports, option_file, run, source


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "-opt", metavar="FILE.yml", type=option_file, help="option file; what it trained last is used, or --weights"
    )
    which.add_argument(
        "--model",
        metavar="NAME",
        help="jpeg_any_fast or another of the package, a file (.safetensors) of tools/convert_weights.py, or bird",
    )
    add("-i", "--input", type=source, help="image, or folder with images in it and below")
    add("-o", "--output", required=True, help="folder for the results; for one image also a .png or .jpg file")
    add("--weights", metavar="FILE", help="weights for -opt (.pth, .safetensors)")
    add("--sampler", help="ddpm, ddim, dpmpp_2m, dpmpp_2m_sde or heun")
    add("--steps", type=int, help="sampling steps")
    add("--spacing", help="of the steps: respace (uniform), trailing, quadratic")
    add(
        "--tile",
        type=int,
        help="longest side of a patch (default: the option file's, else 1024, of BIR-D the prior's); 0: whole",
    )
    add("--overlap", type=int, help="pixels dropped at each inner border of a patch (default: the file's, else 64)")
    add(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        default=[],
        help="other keys of val:sampling, or of bird:settings",
    )
    add("--seed", type=int, help="the same seed gives the same results (default: the option file's manual_seed)")
    add("--samples", type=int, default=1, metavar="K", help="K results, their mean, and a map of their spread")
    add(
        "--blend",
        type=float,
        default=1,
        metavar="L",
        help="prediction + L * residual: 0 smooth .. 1 detailed (default)",
    )
    add(
        "--condition",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        default=[],
        help="what the network is told of the images (the quality of a JPEG: what its file shows)",
    )
    bird = parser.add_argument_group("BIR-D")
    bird.add_argument("--task", help="blind, deblur, motion, sr4, inpaint, colorize, lowlight, hdr or multi")
    bird.add_argument("--prior", help="ffdnet (default), natural64, natural64+ffdnet, a folder of diffusers, or a file")
    bird.add_argument("--preset", help="default (goes beyond the paper), guided, paper, released or gdp: docs/bird.md")
    bird.add_argument("--noise", type=float, metavar="SIGMA", help="of the input, of 255 (default: 2)")
    bird.add_argument(
        "--observations", nargs="+", metavar="FILE", help="of one scene, instead of -i or beside it; or folders of them"
    )
    bird.add_argument("--mask", metavar="FILE", help="picture of the holes (white), for inpaint; or a folder of them")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add(
        "--dtype",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="in which the networks compute (default: auto, bf16 where it is faster); fp16 on CUDA only",
    )
    add("--overwrite", action="store_true", help="restore also what has been restored before")
    add("--max-pixels", type=float, help="refuse larger images, by their header (default: 250e6)")
    add("--scratch", metavar="DIR", help="keep image-sized data in files there: for images too large for the memory")
    add_imports(parser)
    args = parser.parse_args()
    if args.weights and not args.opt:
        parser.error("--weights goes with -opt; a model file has its weights in it")
    if not args.input and not args.observations:
        parser.error("-i is missing: an image, or a folder with images in it")
    if args.max_pixels is not None and not 1 <= args.max_pixels < 2**63:
        parser.error(f"--max-pixels: a number of pixels is expected, got {args.max_pixels}")
    return args


if __name__ == "__main__":
    sys.exit(run("ucdir_plugin.cli.restore:run", parse_args()))
