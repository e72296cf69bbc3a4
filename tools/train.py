"""Train any registered BasicSR model.

python tools/train.py -opt options/demo_ucdir.yml
"""

import sys

from ucdir_cli.command_line import parse_run_arguments, run

if __name__ == "__main__":
    sys.exit(run("ucdir_plugin.cli.run:train", parse_run_arguments(__doc__)))
