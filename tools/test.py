"""Test any registered BasicSR model: pictures, tables and a report.

python tools/test.py -opt options/demo_ucdir.yml
"""

import sys

from ucdir_cli.command_line import parse_run_arguments, run

if __name__ == "__main__":
    sys.exit(run("ucdir_plugin.cli.run:test", parse_run_arguments(__doc__)))
