"""Running a command: one line for an error, and exit codes."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from typing import Any, Callable

from ucdir_plugin.utils.errors import STORAGE, Stopped, UserError, free_space


def _stop(number: int, _frame: Any) -> None:
    raise Stopped(number)


def run_cli(main: Callable[[], int]) -> int:
    """Run a tool's ``main``; returns its exit code, 2 for a :class:`UserError`, 130 for Ctrl-C, 143 for SIGTERM.

    A process of a group ends here with that code: gloo's threads may still hold Python objects (torch PR 179291,
    never merged), and one that asks for the interpreter's lock while it shuts down aborts the whole process.
    """
    signal.signal(signal.SIGTERM, _stop)
    if hasattr(sys.stdout, "reconfigure"):  # names that the terminal's encoding has not; stderr does so by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except UserError as err:
        print(f"error: {err}", file=sys.stderr, flush=True)
        code = 2
    except OSError as err:
        if err.errno not in STORAGE:
            raise
        where = err.filename if isinstance(err.filename, str) else ""
        what = where or f"a file that is open (the output?), in {os.getcwd()} or elsewhere"
        print(f"error: {what}: {err.strerror} ({free_space(where)})", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except Stopped as err:
        print(err, file=sys.stderr, flush=True)
        code = 128 + err.number
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        threading._shutdown()  # the interpreter's own order: threads, atexit, streams
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
