"""The diffusion tasks, and BIR-D, as models of MMEngine: modes loss, predict and tensor."""

from __future__ import annotations

import logging
from abc import abstractmethod
from copy import deepcopy
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Union

import torch
from mmengine.device import get_device
from mmengine.dist import get_dist_info
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch.utils.data import default_collate

from ucdir_plugin.registry import MODELS
from ucdir_plugin.restoration import bird, load
from ucdir_plugin.training.prior_task import PriorTask
from ucdir_plugin.training.student_task import StudentTask
from ucdir_plugin.training.task import Batch, DiffusionTask, unsigned
from ucdir_plugin.training.ucdir_task import UCDIRTask
from ucdir_plugin.utils import checkpoints
from ucdir_plugin.utils.errors import UserError

Sample = Dict[str, Any]
"""``key`` (its name), ``output``, and where they are known ``initial``, ``lq``, ``gt``: (3, H, W) in [0, 1]."""


def _collated(data: Union[Mapping, Sequence]) -> Mapping[str, Any]:
    """A batch as torch's default collate function makes it, also of MMEngine's lists."""
    if isinstance(data, Mapping):
        return {key: _collated(value) if isinstance(value, (Mapping, list)) else value for key, value in data.items()}
    return default_collate(list(data))


def _keys(data: Mapping[str, Any], count: int) -> List[str]:
    return list(data["key"]) if "key" in data else [str(p) for p in data.get("lq_path", [""] * count)]


class DiffusionPreprocessor(BaseDataPreprocessor):
    """Batches to the device, and from [0, 1] to the [-1, 1] of diffusion, as the task does under BasicSR too."""

    def __init__(self, task: DiffusionTask):
        super().__init__()
        self.task, self.told = task, False

    def forward(self, data: Union[Mapping, Sequence], training: bool = False) -> Dict[str, Any]:
        """A batch of images in [0, 1], with their ``sample_number`` (training) or ``key``, for the model's forward."""
        data = _collated(data)
        inputs = self.task.batch(data)
        if not training:
            size = len(inputs["lq"] if "lq" in inputs else inputs["gt"])
            return {"inputs": inputs, "samples": _keys(data, size)}
        if "sample_number" in data:
            return {"inputs": inputs, "samples": data["sample_number"].tolist()}
        return {"inputs": inputs, "samples": self._positions(len(inputs["gt"]))}

    def _positions(self, size: int) -> List[int]:
        """Where samples without a number stand in the training, counted over its iterations and processes."""
        if not self.told:
            self.told = True
            print_log(
                "the sampler gives no sample_number (ucdir_plugin.KeyedSampler does): noise is a function of a sample's"
                " position in the training, but order, crops and flips after a resume are MMEngine's, and not the same",
                logger="current",
                level=logging.WARNING,
            )
        rank, world = get_dist_info()
        first = (MessageHub.get_current_instance().get_info("iter", 0) * world + rank) * size
        return list(range(first, first + size))


class MMDiffusionModel(BaseModel):
    """A task's network, and its average, as a model of MMEngine.

    Args:
        opt: what an option file says, complete or not: ``network_g``, ``diffusion``, ``train: diffusion_opt, ...``,
            ``val: sampling``, ``path: pretrain_network_g, ...``, ``manual_seed``, ``compile``.

    Attributes:
        net_g, net_g_ema: the network and, with ``train: ema_decay``, its average, which predicts.
        averaged: whether there is an average.
        seen: losses, noise levels and errors of the batches since the hooks last took them.

    Raises:
        UserError: for options that do not go together.
    """

    task_class: ClassVar[type]

    def __init__(self, opt: Dict[str, Any]):
        opt = deepcopy(opt.to_dict() if hasattr(opt, "to_dict") else opt)
        rank, world = get_dist_info()
        opt = {"rank": rank, "world_size": world, "dist": world > 1, "is_train": bool(opt.get("train")), **opt}
        task = self.task_class(opt, torch.device(get_device()))
        super().__init__(data_preprocessor=DiffusionPreprocessor(task))
        self.task, self.seen = task, []
        self.net_g = task.compiled(task.network())
        task.load_first(self.net_g, checkpoints.load_into)
        self.averaged = opt["is_train"] and bool(opt["train"].get("ema_decay"))
        if opt["is_train"]:
            if self.averaged:
                self.net_g_ema = task.compiled(deepcopy(self.net_g)).eval().requires_grad_(False)
                path = opt.get("path") or {}
                if path.get("pretrain_network_g"):
                    strict = path.get("strict_load_g", True)
                    checkpoints.load_into(self.net_g_ema, path["pretrain_network_g"], strict, "params_ema")
            task.prepare_training()
        self.train(opt["is_train"])

    @property
    def net(self) -> torch.nn.Module:
        """The averaged network if there is one."""
        return self.net_g_ema if self.averaged else self.net_g

    def losses(self) -> Dict[str, torch.Tensor]:
        """Means by name over what was ``seen``."""
        names = self.seen[0][0] if self.seen else ()
        return {name: torch.stack([terms[name] for terms, _, _ in self.seen]).mean() for name in names}

    def init_weights(self) -> None:
        """Nothing: networks initialise themselves, and weights may be loaded by now."""

    def train(self, mode: bool = True) -> MMDiffusionModel:
        super().train(mode)
        self.task.train_mode(self.net_g, mode)
        self.net.train(mode and self.net is self.net_g)
        if mode and self.net is self.net_g:
            self.task.train_mode(self.net_g)
        return self

    def forward(self, inputs: Batch, samples: Optional[list] = None, mode: str = "tensor") -> Any:
        """Losses of a batch, or restored images, as ``mode`` says.

        Args:
            inputs: as the preprocessor makes them, images in [-1, 1].
            samples: their numbers (loss) or keys (predict, tensor).
            mode: loss: losses by name; predict: a :data:`Sample` of each; tensor: what the network makes, in [-1, 1].

        Raises:
            ValueError: for another mode.
        """
        if mode == "loss":
            drawn = self.task.draw(inputs, samples)
            terms, errors = self.task.terms(self.net_g, drawn)
            self.seen.append(({k: v.detach() for k, v in terms.items()}, drawn["noise_level"], errors))
            return {f"loss_{name.removeprefix('l_')}": term for name, term in terms.items()}
        if mode not in ("predict", "tensor"):
            raise ValueError(f"mode {mode!r}: loss, predict or tensor")
        return self.predict(inputs, samples) if mode == "predict" else self.tensor(inputs, samples)

    @abstractmethod
    def predict(self, inputs: Batch, keys: List[str]) -> List[Sample]:
        """What mode predict gives, of each image."""

    @abstractmethod
    def tensor(self, inputs: Batch, keys: Optional[List[str]]) -> Any:
        """What the network makes, in [-1, 1]."""


@MODELS.register_module(name="UCDIRModel")
class MMUCDIRModel(MMDiffusionModel):
    """UCDIR, a :class:`~ucdir_plugin.training.ucdir_task.UCDIRTask`; arguments as of :class:`DiffusionModel`."""

    task_class = UCDIRTask

    def predict(self, inputs: Batch, keys: List[str]) -> List[Sample]:
        """Each image restored; its noise is a function of the seed and its key."""
        initial, output = self.tensor(inputs, keys)
        images = {"output": output, "lq": inputs["lq"]}
        if self.task.has_predictor:
            images["initial"] = initial
        if "gt" in inputs:
            images["gt"] = inputs["gt"]
        images = {name: unsigned(image) for name, image in images.items()}
        return [{"key": key, **{name: image[i] for name, image in images.items()}} for i, key in enumerate(keys)]

    def tensor(self, inputs: Batch, keys: Optional[List[str]]) -> Any:
        """Initial prediction and restored images, (B, 3, H, W) in [-1, 1]."""
        return self.task.restore(self.net, inputs, keys or [str(i) for i in range(len(inputs["lq"]))])


@MODELS.register_module(name="UCDIRStudentModel")
class MMUCDIRStudentModel(MMUCDIRModel):
    """A student of one step, a :class:`~ucdir_plugin.training.student_task.StudentTask`, under MMEngine."""

    task_class = StudentTask


@MODELS.register_module(name="DiffusionPriorModel")
class MMDiffusionPriorModel(MMDiffusionModel):
    """An unconditional prior: a :class:`~ucdir_plugin.training.prior_task.PriorTask` under MMEngine."""

    task_class = PriorTask

    def predict(self, inputs: Batch, keys: List[str]) -> List[Sample]:
        """As many images from pure noise as there are keys; the k-th is a function of the seed and k."""
        return [{"key": key, "output": image} for key, image in zip(keys, self.task.samples(self.net, len(keys)))]

    def tensor(self, inputs: Batch, keys: Optional[List[str]]) -> torch.Tensor:
        """What the network says of the images with the noise of the samples 0 ... B - 1."""
        drawn = self.task.draw(inputs, list(range(len(inputs["gt"]))))
        return self.net(drawn["x_t"], drawn["timestep"])


class BlindPreprocessor(BaseDataPreprocessor):
    """The loader's batch, as BIR-D takes it: images in [0, 1] on the device (its solver converts them)."""

    def forward(self, data: Union[Mapping, Sequence], training: bool = False) -> Dict[str, Any]:
        data = self.cast_data(dict(_collated(data)))
        return {"inputs": {k: data[k] for k in ("lq", "gt", "known") if k in data}, "samples": _keys(data, 1)}


@MODELS.register_module(name="BIRDModel")
class MMBIRDModel(BaseModel):
    """BIR-D under MMEngine; it cannot be trained. One image at a time.

    Args:
        opt: what an option file says: ``bird``, ``manual_seed``.
    """

    def __init__(self, opt: Dict[str, Any]):
        super().__init__(data_preprocessor=BlindPreprocessor())
        opt = deepcopy(opt.to_dict() if hasattr(opt, "to_dict") else opt)
        self.restorer = load.from_options(opt, torch.device(get_device()))

    def forward(self, inputs: Batch, samples: Optional[list] = None, mode: str = "tensor") -> Any:
        """Mode predict: a :data:`Sample` of each image, with ``files`` of what was learned; tensor: its output alone.

        Raises:
            UserError: for mode loss.
            ImageError: for an image that cannot be restored.
        """
        if mode == "loss":
            raise UserError("BIRDModel restores without training: use tools/test.py or tools/restore.py")
        found = bird.restore_sample(self.restorer, inputs["lq"], samples or [""], inputs.get("known"))
        if mode == "tensor":
            return found.output
        images = {"lq": inputs["lq"], "gt": inputs.get("gt"), "initial": found.initial, "output": found.output}
        sample = {name: image[0] for name, image in images.items() if image is not None}
        return [{"key": samples[0], "files": found.learned.files(), **sample}]
