"""Test sets of a study, and images that are restored once and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import statistics
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch

from ucdir_plugin import compat  # noqa: F401  (BasicSR can be imported only after it)

# isort: split
from basicsr.data import build_dataset
from ucdir_cli.studies.ucdir.plan import INPUT, Run

import ucdir_plugin
from ucdir_plugin.data.samples import sample_key
from ucdir_plugin.evaluation import tables
from ucdir_plugin.evaluation.measure import Evaluation
from ucdir_plugin.restoration import restore
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import write_atomically
from ucdir_plugin.utils.image_reading import read_uint8
from ucdir_plugin.utils.image_writing import write_image


@dataclasses.dataclass
class TestSet:
    """Test images of an option file: keys, evenly chosen, and what gives each of them."""

    name: str
    dataset: Any
    keys: List[str]
    index: Dict[str, int]
    paths: Dict[str, List[str]]

    def chosen(self, count: Optional[int]) -> List[str]:
        """The names of the first ``count`` images, spread over the set; all for None."""
        if count is None or count >= len(self.keys):
            return self.keys
        return [self.keys[i * len(self.keys) // count] for i in range(count)]

    def sample(self, key: str) -> Dict[str, Any]:
        """``lq`` and ``gt`` (3, H, W) RGB in [0, 1], and what else the dataset says.

        Raises:
            UserError: without a truth, there is nothing to measure.
        """
        sample = self.dataset[self.index[key]]
        for name in ("lq", "gt"):
            if name not in sample:
                raise UserError(f"test set {self.name} has no {name} images: name its dataroot_{name}")
        return sample

    def state(self, key: str) -> List[Tuple[int, int]]:
        """Sizes and times of an image's files."""
        paths = self.paths[key]
        return [_state(path) for path in paths if os.path.isfile(path)]


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) RGB in [0, 1] -> (H, W, 3) BGR."""
    return (image.numpy().transpose(1, 2, 0)[..., ::-1] * 255).round().astype(np.uint8)


def known_sets(opt: Mapping[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Name -> options of the test and validation sets of checked options."""
    phases = {phase: phase.split("_")[0] for phase in opt["datasets"]}
    return {
        data["name"]: {**data, "phase": phases[phase], "scale": opt["scale"]}
        for phase, data in opt["datasets"].items()
        if phases[phase] in ("val", "test")
    }


def read_set(data: Mapping[str, Any]) -> TestSet:
    """Read which images a test set has.

    Raises:
        UserError: for missing images, or two that differ in their extension only.
    """
    dataset, name = build_dataset(dict(data)), data["name"]
    texts = [{k: [v] for k, v in dataset[i].items() if isinstance(v, str)} for i in range(len(dataset))]
    keys = [sample_key(text, data) for text in texts]
    stems = [os.path.splitext(key)[0] for key in keys]
    twice = next((key for key, stem in zip(keys, stems) if stems.count(stem) > 1), None)
    if twice is not None:
        raise UserError(f"test set {name}: {twice} differs from another image in its extension only: rename one")
    paths = [[text[k][0] for k in ("lq_path", "gt_path") if k in text] for text in texts]
    return TestSet(name, dataset, keys, {key: i for i, key in enumerate(keys)}, dict(zip(keys, paths)))


def _state(path: str) -> Tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


class Images:
    """What one run with one seed makes of a set's images; those that are there are kept."""

    def __init__(self, output: str, images: TestSet, run: Run, seed: int, model: Any):
        self.set, self.run, self.seed, self.model = images, run, seed, model
        settings = {} if model is None else model.record_settings(seed, run.samples, run.blend)
        data = {k: v for k, v in images.dataset.opt.items() if k != "name"}
        content = json.dumps(
            [settings, run.samples, run.blend, data, ucdir_plugin.__version__], sort_keys=True, default=str
        )
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9]+", "_", run.label).strip("_")
        self.folder = os.path.join(output, images.name, f"{name}_{self.digest}" if model else INPUT)

    def file(self, key: str) -> str:
        """Path of an image's result."""
        return os.path.join(self.folder, f"{os.path.splitext(key)[0]}.png")

    def about(self, key: str) -> Dict[str, Any]:
        """Seconds and network passes of an image; empty if it is not restored yet."""
        path = f"{os.path.splitext(self.file(key))[0]}.json"
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            return {}
        files = [self.file(key), *([self.truth(key)] if self.model is None else [])]
        fits = all(map(os.path.isfile, files)) and isinstance(found, dict) and found.get("made") == self._made(key)
        return found if fits else {}

    def _made(self, key: str) -> List[Any]:
        """What an image was made of."""
        return json.loads(json.dumps([self.digest, self.set.state(key)]))

    def make(self, key: str) -> bool:
        """Restore an image; whether it was not there."""
        if self.about(key):
            return False
        sample = self.set.sample(key)
        if self.model is None:
            image, about = to_uint8(sample["lq"]), {"seconds": 0.0, "nfe": 0}
            write_image(to_uint8(sample["gt"]), self.truth(key))
        else:
            values = {c.name: sample.get("condition", {}).get(c.name) for c in getattr(self.model, "conditions", ())}
            done = restore.restore(
                np.ascontiguousarray(sample["lq"].numpy().transpose(1, 2, 0)),
                self.model,
                seed=self.seed,
                samples=self.run.samples,
                blend=self.run.blend,
                condition={name: value for name, value in values.items() if value is not None},
                key=key,
            )
            if not np.isfinite(done.image).all():
                raise UserError("the result holds NaN or infinite values: the weights are damaged")
            image = (done.image[..., ::-1] * 255).round().astype(np.uint8)
            about = {name: done.info[name] for name in ("seconds", "nfe")}
        write_image(image, self.file(key))
        about.update(threads=torch.get_num_threads(), made=self._made(key))
        write_atomically(json.dumps(about).encode(), f"{os.path.splitext(self.file(key))[0]}.json")
        return True

    def truth(self, key: str) -> str:
        """Path of the true image."""
        return os.path.join(os.path.dirname(self.folder), "truth", f"{os.path.splitext(key)[0]}.png")

    def measured(self, keys: Sequence[str], evaluation: Evaluation) -> Tuple[tables.Results, Dict[str, Any]]:
        """By an empty evaluation, or what was measured before on the same files."""
        files = [(key, *_state(self.file(key)), *_state(self.truth(key))) for key in keys]
        stamp = [evaluation.protocols, evaluation.without_each, files]
        digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()
        path = os.path.join(self.folder, f"metrics_{len(keys)}.json")
        with contextlib.suppress(UserError):  # not there yet, or damaged: it is measured again
            results, about = tables.read_results(path)
            if about.get("fingerprint") == digest:
                return results, about
        source = os.path.join(os.path.dirname(self.folder), INPUT)
        for key in keys:
            files = {"restored": self.file(key), "truth": self.truth(key)}
            files["input"] = os.path.join(source, os.path.relpath(self.file(key), self.folder))
            files = {kind: os.path.relpath(file, self.folder) for kind, file in files.items()}
            evaluation.add(key, {"restored": _read(self.file(key))}, _read(self.truth(key)), None, files)
        results = evaluation.results()
        of_images = [self.about(key) for key in keys]
        about = {
            "name": self.run.label,
            "dataset": self.set.name,
            "fingerprint": digest,
            "seed": self.seed,
            "seconds": statistics.fmean(a["seconds"] for a in of_images),
            "nfe": statistics.fmean(a["nfe"] for a in of_images),
            "settings": {}
            if self.model is None
            else self.model.record_settings(self.seed, self.run.samples, self.run.blend),
        }
        tables.write_tables(results, path[: -len(".json")], about)
        return results, about


def _read(path: str) -> np.ndarray:
    try:
        return read_uint8(path)
    except UserError as err:
        raise UserError(f"{path} is damaged: delete it, and it is made again") from err
