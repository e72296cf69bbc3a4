"""Versions, for records and logs."""

from __future__ import annotations

import platform
from typing import Dict

import torch

__version__ = "0.1.0"


def versions() -> Dict[str, str]:
    """Versions of this package, torch and Python."""
    return {"ucdir_plugin": __version__, "torch": torch.__version__, "python": platform.python_version()}
