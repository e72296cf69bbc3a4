"""Set up a virtual environment and run the demo or the tests in it; nothing is needed before but Python 3.9 to 3.12.

    python3 tools/quickstart.py demo     trains and tests UCDIR on JPEG artefacts with photographs of scikit-image
    python3 tools/quickstart.py test     runs the tests, on up to four cores (further arguments go to pytest)
    python3 tools/quickstart.py install  only sets up

The environment is .venv in this repository (--venv DIR for another); a second run uses it as it is.
"""

import argparse
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# BasicSR 1.4.2 is an sdist that imports torch, numpy and cython while it builds: they come first.
FIRST = ["torch>=2.6", "torchvision>=0.21", "numpy", "setuptools", "wheel", "cython"]


def python_of(folder: Path) -> str:
    """Path of an environment's interpreter."""
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def set_up(folder: Path) -> str:
    """Create the environment if it is not complete, and return its interpreter."""
    python, done = python_of(folder), folder / "ucdir_plugin_installed"
    if not done.exists():
        if not (3, 9) <= sys.version_info < (3, 13):
            sys.exit(f"error: Python 3.9 to 3.12 is needed, this is {sys.version.split()[0]}")
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        for what in (["-U", "pip"], FIRST, ["--no-build-isolation", "-e", f"{ROOT}[dev]"]):
            subprocess.run([*pip, *what], check=True)
        done.touch()
    return python


def main() -> int:
    """Set up the environment and run the job; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["demo", "test", "install"])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is (default: .venv)")
    args, rest = parser.parse_known_args()
    start = time.time()
    try:
        python = set_up(args.venv.absolute())
        ready = time.time()
        commands = {
            "demo": [
                ["datasets/prepare_demo.py"],
                ["tools/train.py", "-opt", "options/demo_ucdir.yml"],
                ["tools/test.py", "-opt", "options/demo_ucdir.yml"],
            ],
            "test": [["-m", "pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", *rest]],
            "install": [],
        }[args.job]
        for command in commands:
            subprocess.run([python, *command], check=True, cwd=ROOT)
    except subprocess.CalledProcessError as err:
        print(f"error: {' '.join(map(str, err.cmd))} ended with {err.returncode}", file=sys.stderr)
        return err.returncode
    print(f"set-up (with downloads): {ready - start:.0f} s; {args.job}: {time.time() - ready:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
