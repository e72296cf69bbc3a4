"""Lay out the demo's photographs: python datasets/prepare_demo.py

They come with scikit-image, so nothing is downloaded. Training: six photographs and three
textures; test: two photographs that are never trained on.
"""

import argparse
import os
import shutil
import sys

from ucdir_plugin.errors import UserError, run_cli

TRAIN = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
TEST = ("chelsea.png", "coffee.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", default=os.path.join("datasets", "demo"), help="folder to write (default: %(default)s)"
    )
    args = parser.parse_args()
    import skimage

    source = os.path.join(os.path.dirname(skimage.__file__), "data")
    for part, names in (("train", TRAIN), ("test", TEST)):
        folder = os.path.join(args.out, part)
        os.makedirs(folder, exist_ok=True)
        for name in names:
            if not os.path.isfile(os.path.join(source, name)):
                raise UserError(
                    f"this scikit-image ({skimage.__version__}) lacks data/{name}; install scikit-image 0.19 or newer"
                )
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    print(f"{len(TRAIN)} training and {len(TEST)} test images in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
