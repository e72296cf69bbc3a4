"""Train any registered BasicSR model: python tools/train.py -opt options/demo_ucdir.yml"""

import sys

from ucdir_plugin.training import setup
from ucdir_plugin.utils.cli import run_cli


def main() -> int:
    from ucdir_plugin.training import loop

    return loop.train(setup.parse_args(__doc__))


if __name__ == "__main__":
    sys.exit(run_cli(main))
