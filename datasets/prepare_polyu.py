"""Lay out PolyU's pairs of real camera noise in two halves that share no scene, to train on one and test on the other.

python datasets/prepare_polyu.py --source CroppedImages --out datasets/study/polyu

CAMERA_..._SCENE_NUMBER_real.JPG is a noisy shot, ..._mean.JPG the mean of many; links to them become OUT/{a,b}/{lq,gt}.
All photographs of what has one name (toy, classroom, ...) are in one half, whatever the camera.
"""

import argparse
import os
import sys

from ucdir_plugin.data.preparation import link_to
from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import list_images

KINDS = {"lq": "real", "gt": "mean"}


def scene_of(name: str) -> str:
    """The word behind camera, aperture, shutter and ISO.

    Raises:
        UserError: if the name has none.
    """
    parts = os.path.splitext(os.path.basename(name))[0].split("_")
    if len(parts) < 7 or parts[-1] not in KINDS.values():
        raise UserError(f"{name} is not called CAMERA_APERTURE_SHUTTER_ISO_SCENE_NUMBER_real.JPG or ..._mean.JPG")
    return parts[4]


def halves(pairs: dict) -> dict:
    """Scene -> a or b, so that both have about as many pairs: the largest scenes first, each to the smaller half."""
    sizes = {"a": 0, "b": 0}
    found = {}
    for scene in sorted(pairs, key=lambda s: (-len(pairs[s]), s)):
        half = min(sizes, key=sizes.get)
        found[scene] = half
        sizes[half] += len(pairs[scene])
    return found


def main() -> int:
    """Lay out the pairs as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of the pairs")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    names = list_images(args.source, "--source", skip=args.out)
    pairs: dict = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        scene = pairs.setdefault(scene_of(name), {})
        scene.setdefault(stem[: -len("_real")], {})[stem[-len("real") :]] = name
    for scene in pairs.values():
        for stem, files in scene.items():
            lacking = next((kind for kind in KINDS.values() if kind not in files), None)
            if lacking:
                raise UserError(f"{args.source}: {stem} has no {lacking} image")
    chosen = halves(pairs)
    counts = {"a": 0, "b": 0}
    links = {}
    for scene, half in chosen.items():
        counts[half] += len(pairs[scene])
        for stem, files in pairs[scene].items():
            for folder, kind in KINDS.items():
                target = os.path.join(args.out, half, folder, stem + os.path.splitext(files[kind])[1])
                links[target] = os.path.join(args.source, files[kind])
    for half in counts:
        for folder in KINDS:
            below = os.path.join(args.out, half, folder)
            for name in sorted(os.listdir(below)) if os.path.isdir(below) else ():
                if os.path.join(below, name) not in links:  # it could be in the other half now
                    raise UserError(
                        f"{os.path.join(below, name)} is of other pairs: remove {args.out}, or name another --out"
                    )
    for target, path in links.items():
        link_to(path, target)
    for half, count in counts.items():
        scenes = sorted(scene for scene, of in chosen.items() if of == half)
        print(f"{half}: {count} pairs of {len(scenes)} scenes ({', '.join(scenes)})")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
