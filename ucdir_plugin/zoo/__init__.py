"""Weights that come with the package: NAME.safetensors, its card NAME.md, and in index.json kind and both SHA-256."""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List, Optional

from ucdir_plugin.utils.errors import NotAvailable, UserError
from ucdir_plugin.utils.files import sha256_of

FOLDER = os.path.dirname(os.path.abspath(__file__))


def index() -> Dict[str, Dict[str, Any]]:
    """Name -> ``kind`` (``prior`` of BIR-D, or ``model`` that restores), ``sha256`` of the file, ``card_sha256``.

    Of a prior also ``size``, the side of the patches that it serves best in, where that is not its training's; of a
    model for JPEGs ``jpeg_quality``, lowest and highest.
    """
    with open(os.path.join(FOLDER, "index.json"), encoding="utf-8") as file:
        return json.load(file)


def names(kind: str) -> List[str]:
    """Names of the shipped weights of a kind: ``model`` or ``prior``."""
    return sorted(name for name, entry in index().items() if entry["kind"] == kind)


def for_jpeg(quality: int) -> Optional[str]:
    """A model that was trained on JPEGs of this quality, if there is one."""
    for name, entry in index().items():
        low, high = entry.get("jpeg_quality", (1, 0))
        if low <= quality <= high:
            return name
    return None


def find(name: str) -> str:
    """Path of the weights called ``name``, of which the content, and the card's, is what was shipped.

    Raises:
        NotAvailable: if one of the files is not there.
        UserError: if one is another; both say which SHA-256 is expected, and where the file can be had.
    """
    entry = index()[name]
    for kind, key in ((".md", "card_sha256"), (".safetensors", "sha256")):
        path, expected = os.path.join(FOLDER, f"{name}{kind}"), entry[key]
        cure = f"install ucdir-plugin again, or in its repository: git checkout -- ucdir_plugin/zoo/{name}{kind}"
        if not os.path.isfile(path):
            raise NotAvailable(f"{name}: {path} (SHA-256 {expected}) is not there; {cure}")
        found = sha256_of(path)
        if found != expected:
            raise UserError(
                f"{name}: {path} has SHA-256 {found}, not {expected}: it is damaged or another file; {cure}"
            )
    return path
