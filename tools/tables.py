"""Make a table of a paper: restore and measure what a plan lists, and set the results side by side.

python tools/tables.py options/tables/bird_3.yaml
python tools/tables.py options/tables/bird_2.yaml --parts sr4 deblur --force_yml bird:prior=256x256_diffusion_uncond.pt
python tools/tables.py options/tables/ucdir_1.yaml --processes 8

The images are the user's copy of the data, where the option files look for them; networks are those that the option
files trained. What is missing is said at the start and left out. Stopped, the same command goes on: finished runs whose
options, weights and images are the same are kept. Results lie in results/, the table in -o: table.md, and of each part
comparison.md, .csv, .tex, .json and .png.
"""

import argparse
import os
import sys

from ucdir_cli.command_line import Parser, add_imports, option_file, run


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("plan", metavar="PLAN.yaml", type=option_file, help="which systems stand in the table (options/tables/)")
    add("--parts", nargs="+", metavar="NAME", help="default: all of the plan")
    add("-o", "--output", metavar="DIR", help="default: results/tables/PLAN")
    add("--force_yml", nargs="+", action="extend", metavar="KEY:SUBKEY=VALUE", help="override options of all runs")
    add("--processes", type=int, default=1, metavar="N", help="for each run, one a GPU (default: %(default)s)")
    add("--weights-dir", metavar="DIR", help="where metrics' weights are looked for first")
    add("--download", action="store_true", help="get metrics' weights that are not there")
    add_imports(parser)
    parser.set_defaults(tools=os.path.dirname(os.path.abspath(__file__)))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run("ucdir_plugin.cli.tables:run", parse_args()))
