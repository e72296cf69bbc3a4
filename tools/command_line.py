"""What the commands share: wrong arguments become one line, at once; then the work is imported and run.

Importing anything of ``ucdir_plugin`` registers its classes and so loads torch, which takes seconds: nothing here and
in the commands does so before the arguments are parsed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from typing import Any, Callable, List, NoReturn, Optional, Sequence


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, ``error: ...``, with exit code 2."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with exit code 2."""
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        print(f"error: {line} ({self.prog} -h lists the arguments)", file=sys.stderr)
        sys.exit(2)

    def parse_args(self, args: Optional[Sequence[str]] = None, namespace: Any = None) -> argparse.Namespace:
        """Parse; an unknown argument is named with the nearest known one."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self.flags(), n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return found

    def flags(self) -> List[str]:
        """All option strings, those of subcommands too."""
        found = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser.flags()]
        return found


def option_file(path: str) -> str:
    """The path of an option file that is there: an ``argparse`` type, so that a wrong name costs no long import."""
    if not os.path.exists(path):
        raise argparse.ArgumentTypeError(f"option file {path} cannot be read: No such file or directory")
    return path


def source(path: str) -> str:
    """The path of images that are there: an ``argparse`` type, as :func:`option_file`."""
    if not os.path.exists(path):
        raise argparse.ArgumentTypeError(f"-i {path} does not exist")
    return path


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Add ``--import`` and ``--trust-config``: code of others that a command may run."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        metavar="MODULE",
        default=[],
        help="a module that registers archs, losses, data sets, metrics or models of your own; may be repeated",
    )
    parser.add_argument(
        "--trust-config", action="store_true", help="run the code that the option file names (imports), or is (.py)"
    )


def parse_run_arguments(description: str, args: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """BasicSR's command line for training and testing, with what this package adds to it.

    Args:
        args: instead of ``sys.argv``.
    """
    parser = Parser(description=description)
    add = parser.add_argument
    add("-opt", required=True, type=option_file, help="option file (YAML)")
    add("--launcher", choices=["none", "pytorch", "slurm"], default="none", help="job launcher")
    add("--auto_resume", action="store_true", help="go on from the newest readable checkpoint")
    add("--debug", action="store_true", help="log, save and validate every few iterations")
    add("--force_yml", nargs="+", action="extend", metavar="KEY:SUBKEY=VALUE", help="override options; values are YAML")
    add("--weights-dir", metavar="DIR", help="where metrics' weights are looked for first")
    add("--download", action="store_true", help="get metrics' weights that are not there")
    add("--write", metavar="FLAT.yml", help="write the option file with its _base_ and --force_yml in it, and stop")
    add_imports(parser)
    return parser.parse_args(args)


def run(command: str, args: argparse.Namespace) -> int:
    """Import a command's function, then the modules of ``--import``, and run it; returns the exit code.

    Args:
        command: ``module:function``; the function takes the parsed arguments and returns the exit code.
        args: what the command line says.
    """
    module, _, name = command.partition(":")
    try:
        from ucdir_plugin.registry import import_modules
        from ucdir_plugin.utils.cli import run_cli

        function: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), name)
    except KeyboardInterrupt:  # the import takes seconds
        print("interrupted", file=sys.stderr)
        return 130

    def work() -> int:
        import_modules(getattr(args, "imports", []), "--import")
        return function(args)

    return run_cli(work)
