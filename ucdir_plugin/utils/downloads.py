"""Files of weights that others publish: where they are looked for, and how they are got."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ucdir_plugin.utils.errors import NotAvailable, UserError
from ucdir_plugin.utils.files import sha256_of


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that others publish.

    Args:
        name: of the file.
        url: where it can be had.
        sha256: of its content, 64 hexadecimal digits; None if its publishers' is not known.
    """

    name: str
    url: str
    sha256: str | None = None

    def find(self, weights_dir: str | None = None) -> tuple[str, str]:
        """Path and SHA-256 of the first such file in ``weights_dir``, ``$UCDIR_WEIGHTS`` and the torch hub cache.

        Raises:
            NotAvailable: if there is none, or only ones of other content; says which file to put where.
        """
        folders = [weights_dir, os.environ.get("UCDIR_WEIGHTS"), os.path.join(torch.hub.get_dir(), "checkpoints")]
        paths = [os.path.join(os.path.expanduser(folder), self.name) for folder in folders if folder]
        wrong = []
        for path in filter(os.path.isfile, paths):
            found = sha256_of(path)
            if self.sha256 in (None, found):
                return path, found
            wrong.append(f"{path} has SHA-256 {found}, not {self.sha256}: it is damaged or another file")
        raise NotAvailable(wrong[0] if wrong else f"put {self.name} ({self.url}) at {' or '.join(paths)}", self)

    def download(self, weights_dir: str | None = None) -> str:
        """Download the file into the first of the folders that :meth:`find` looks in; returns its path.

        Raises:
            UserError: if it cannot be had or written, or is not what was expected.
        """
        folder = weights_dir or os.environ.get("UCDIR_WEIGHTS") or os.path.join(torch.hub.get_dir(), "checkpoints")
        path = os.path.join(os.path.expanduser(folder), self.name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(self.url, path, hash_prefix=self.sha256)
        except (OSError, RuntimeError) as err:  # RuntimeError: another hash
            raise UserError(f"cannot download {self.url} to {path}: {err}") from err
        return path
