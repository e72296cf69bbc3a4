"""The command that restores photographs: tools/restore.py once its arguments are parsed."""

from __future__ import annotations

import argparse
import sys

from ucdir_plugin.options.reading import read_assignments
from ucdir_plugin.restoration.folder import restore_files
from ucdir_plugin.restoration.load import load_model
from ucdir_plugin.utils import image_reading, memory, ranks
from ucdir_plugin.utils.errors import printable

BIRD = ("task", "prior", "preset", "noise", "mask")
"""Arguments that are keys of ``bird:``."""

SAMPLING = ("sampler", "steps", "spacing", "tile", "overlap")
"""Arguments that are keys of ``val: sampling:``."""


def run(args: argparse.Namespace) -> int:
    """Restore what the arguments of tools/restore.py name; returns the exit code."""
    source, bird = args.input, {k: v for k in BIRD if (v := getattr(args, k)) is not None}
    if args.observations:
        first, *others = [source, *args.observations] if source else args.observations
        source, bird["observations"] = first, others or None
    memory.keep_freed_memory()
    share = ranks.own_share()
    sampling = read_assignments(args.set, "--set")
    sampling.update({k: v for k in SAMPLING if (v := getattr(args, k)) is not None})
    model = load_model(
        args.opt or args.model,
        args.weights,
        device=args.device,
        dtype=args.dtype,
        sampling=sampling,
        bird=bird,
        trust=args.trust_config,
    )
    for name, text in model.notes.items() if share.rank == 0 else ():
        of_machine = name in ("dtype", "warning")
        print(printable(f"{model.about['model']}: {name}: {text}"), file=sys.stderr if of_machine else sys.stdout)
    return restore_files(
        model,
        source,
        args.output,
        seed=args.seed,
        samples=args.samples,
        blend=args.blend,
        condition=read_assignments(args.condition, "--condition"),
        overwrite=args.overwrite,
        max_pixels=int(args.max_pixels or image_reading.MAX_PIXELS),
        scratch=args.scratch,
        share=share,
    )
