"""One HTML page of a run that needs nothing but itself: tables, sliders over pictures, histograms."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

import cv2
import numpy as np

from ucdir_plugin.evaluation import tables
from ucdir_plugin.evaluation.intervals import CONFIDENCE
from ucdir_plugin.metrics import protocol
from ucdir_plugin.utils.files import write_atomically

SIDE = 768
"""Of the part that is shown of a larger image."""

Pictures = Mapping[str, np.ndarray]
"""Stage or ``truth`` -> (H, W, 3) or (H, W) BGR uint8."""


def window(pictures: Pictures, side: int = SIDE) -> tuple[slice, slice]:
    """Rows and columns of the part, at most ``side`` pixels long and wide, where the last two pictures differ most."""
    sizes = [image.shape[:2] for image in pictures.values()]
    height, width = sizes[-1]
    h, w = min(height, side), min(width, side)
    top, left = (height - h) // 2, (width - w) // 2
    if (h, w) != (height, width) and len(sizes) > 1 and sizes[-1] == sizes[-2]:
        first, second = (image if image.ndim == 3 else image[..., None] for image in list(pictures.values())[-2:])
        difference = np.abs(first.astype(np.float32) - second).mean(2)
        sums = cv2.integral(difference, sdepth=cv2.CV_64F)
        step = max(1, side // 16)
        tops, lefts = (np.unique(np.r_[0 : n - m + 1 : step, n - m]) for n, m in ((height, h), (width, w)))
        y, x = tops[:, None], lefts[None]
        total = sums[y + h, x + w] - sums[y, x + w] - sums[y + h, x] + sums[y, x]
        best = np.unravel_index(total.argmax(), total.shape)
        top, left = int(tops[best[0]]), int(lefts[best[1]])
    return slice(top, top + h), slice(left, left + w)


def part(pictures: Pictures, side: int = SIDE) -> dict[str, np.ndarray]:
    """Cut one part out of all pictures (:func:`window`), those of another size (inputs of super-resolution) resized."""
    height, width = list(pictures.values())[-1].shape[:2]
    same = {
        name: image
        if image.shape[:2] == (height, width)
        else cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)
        for name, image in pictures.items()
    }
    rows, columns = window(same, side)
    return {name: image[rows, columns] for name, image in same.items()}


class Store:
    """Pictures of a run's images in a folder until its tables are written: what stopped before that goes on from them.

    Several processes may share the folder.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()[:32]}.npz"

    def keep(self, key: str, pictures: Pictures, files: Optional[Mapping[str, bytes]] = None, stamp: str = "") -> None:
        """Keep an image's pictures and files on the disk until the report is written.

        Args:
            files: what else was made of the image: name -> content.
            stamp: what all this was made from; :meth:`find` asks for it.
        """
        data = {f"image_{name}": cv2.imencode(".png", image)[1] for name, image in pictures.items()}
        data.update((f"file_{name}", np.frombuffer(content, np.uint8)) for name, content in (files or {}).items())
        buffer = io.BytesIO()
        np.savez(buffer, stamp=np.frombuffer(stamp.encode(errors="surrogatepass"), np.uint8), **data)
        write_atomically(buffer.getvalue(), self._path(key))

    def find(self, key: str, stamp: str = "") -> Optional[tuple[dict[str, np.ndarray], dict[str, bytes]]]:
        """Pictures and files of an image; None if there are none of this stamp that can be read."""
        if not self._path(key).exists():
            return None
        try:
            found, images, files = self._read(key)
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        return (images, files) if found == stamp else None

    def part(self, key: str) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """The shown part of an image's pictures, and the (height, width) of the whole."""
        _, images, _ = self._read(key)
        return part(images), list(images.values())[-1].shape[:2]

    def _read(self, key: str) -> tuple[str, dict[str, np.ndarray], dict[str, bytes]]:
        with np.load(self._path(key)) as file:
            images = {n[6:]: cv2.imdecode(file[n], cv2.IMREAD_UNCHANGED) for n in file.files if n.startswith("image_")}
            files = {n[5:]: file[n].tobytes() for n in file.files if n.startswith("file_")}
            return file["stamp"].tobytes().decode(errors="surrogatepass"), images, files

    def remove(self) -> None:
        """Delete what is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def ranking(results: tables.Results) -> Optional[tuple[str, str]]:
    """(stage, metric) that tells good images from bad: LPIPS, else PSNR, else the first measured, of the last stage."""
    for stage, counts in reversed(results.measured().items()):
        kinds: dict[Any, str] = {}
        for metric in results.metrics():
            if counts.get(metric):
                kinds.setdefault(results.protocols.get(metric, {}).get("type"), metric)
        for kind in ("calculate_lpips", "calculate_psnr", *kinds):
            if kind in kinds:
                return stage, kinds[kind]
    return None


def extremes(results: tables.Results) -> list[tuple[str, str, float]]:
    """(worst | median | best, key, value) by :func:`ranking`; fewer if there are fewer images."""
    by = ranking(results)
    if by is None:
        return []
    stage, metric = by
    values = [(row["metrics"].get(stage, {}).get(metric), row["image"]) for row in results.rows]
    better = results.protocols.get(metric, {}).get("better", "higher")
    ranked = sorted(((v, key) for v, key in values if v is not None), reverse=better == "lower")
    if len(ranked) < 3:
        labels = ["worst", "best"] if len(ranked) == 2 else ["the only one"]
        return [(label, key, value) for label, (value, key) in zip(labels, ranked)]
    places = {"worst": 0, "median": len(ranked) // 2, "best": -1}
    return [(label, ranked[i][1], ranked[i][0]) for label, i in places.items()]


def _picture(label: str, key: str, about: str, images: Pictures, size: Sequence[int]) -> dict[str, Any]:
    height, width = list(images.values())[-1].shape[:2]
    note = about
    if (height, width) != tuple(size):
        note += f"; a part of {width}x{height} pixels of {size[1]}x{size[0]}"
    lossless = [cv2.IMWRITE_WEBP_QUALITY, 101]
    encoded = {name: cv2.imencode(".webp", image, lossless)[1].tobytes() for name, image in images.items()}
    urls = {name: "data:image/webp;base64," + base64.b64encode(data).decode() for name, data in encoded.items()}
    return {"label": label, "image": key, "note": note, "size": [width, height], "images": urls}


def write_report(
    results: tables.Results,
    path: str | os.PathLike,
    about: Mapping[str, Any],
    pictures: Optional[Callable[[str], tuple[Pictures, Sequence[int]]]] = None,
) -> None:
    """Write the page.

    Args:
        about: as in :func:`report.as_data`; ``name`` and ``dataset`` make the title.
        pictures: an image's key -> its pictures, or parts of them (:func:`part`), and the (height, width) of the whole;
            called for the worst, median and best image. Without it the page has none.

    Raises:
        UserError: if it cannot be written.
    """
    stored = tables.as_data(results, about)
    summary, intervals = results.summary(), results.intervals()
    means: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, values in summary.items():
        for metric, value in values.items():
            bounds, found = intervals.get(stage, {}).get(metric), results.sets.get(stage, {}).get(metric, {})
            note = f"[{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else ""
            if found.get("standard_error") is not None:
                note = f"± {found['standard_error']:.4f}"
            means.setdefault(stage, {})[metric] = {"value": value, "note": note}
    notes = [f"{len(results.rows)} images."]
    if any(b for found in intervals.values() for b in found.values()):
        notes[0] += f" In brackets: {CONFIDENCE:.0%} intervals of the mean, by the bootstrap over images."
    if any("standard_error" in r for found in results.sets.values() for r in found.values()):
        notes[0] += " ±: standard error."
    notes += tables.remarks(results)
    chosen = extremes(results) if pictures is not None else []
    by = ranking(results)
    shown = [_picture(label, key, f"{by[1]} {value:.4f} ({by[0]})", *pictures(key)) for label, key, value in chosen]
    stages = list(summary)
    data = {
        "title": " on ".join(str(about[k]) for k in ("name", "dataset") if about.get(k)) or "Report",
        "about": "; ".join(
            f"{k} {os.path.basename(str(v).rstrip('/'))}"  # pages are passed on: no folders of this machine
            for k, v in about.items()
            if k not in ("name", "dataset") and v is not None
        ),
        "stages": stages,
        "metrics": [
            {
                "key": metric,
                "better": results.protocols.get(metric, {}).get("better"),
                "of_input": results.protocols.get(metric, {}).get("reference") == "input",
                "how": protocol.describe(results.protocols[metric]) if metric in results.protocols else "",
            }
            for metric in results.metrics()
        ],
        "means": means,
        "notes": notes,
        "rows": [
            {k: v for k, v in row.items() if k != "files"} for row in stored["images"]
        ],  # no paths of this machine
        "unavailable": results.unavailable,
        "ranking": f"Ranked by {by[1]} of {by[0]}. Move the slider to compare, zoom with the wheel, drag to move."
        if by
        else "",
        "pictures": shown,
    }
    text = json.dumps(tables.finite(data), allow_nan=False).replace("<", "\\u003c")
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    write_atomically(template.replace("/*DATA*/", text, 1).encode(), path)
