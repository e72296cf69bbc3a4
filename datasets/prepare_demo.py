"""Lay out the demo's photographs, for options/demo_*.yml (python datasets/prepare_demo.py).

They come with scikit-image, so nothing is downloaded. Training: six photographs and three
textures; test: two photographs that are never trained on; bird: their middles, 256x256, for BIR-D.
"""

import argparse
import os
import shutil
import sys

from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError

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
SIDE = 256


def main() -> int:
    """Lay out the photographs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", default=os.path.join("datasets", "demo"), help="folder to write (default: %(default)s)"
    )
    args = parser.parse_args()
    import cv2
    import skimage

    from ucdir_plugin.utils.files import write_atomically

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
    for name in TEST:
        image = cv2.imread(os.path.join(source, name))
        top, left = ((side - SIDE) // 2 for side in image.shape[:2])
        middle = cv2.imencode(".png", image[top : top + SIDE, left : left + SIDE])[1]
        write_atomically(middle.tobytes(), os.path.join(args.out, "bird", name))
    print(f"{len(TRAIN)} training and {len(TEST)} test images in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
