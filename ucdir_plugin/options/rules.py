"""What option files must fulfil beyond the types of their keys: a list of rules, each on one thing.

A rule looks at the options, completes or drops what it is about, and raises a UserError that names the option and the
cure. :data:`RULES` has them in the order in which they are applied.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import torch

from ucdir_plugin import registry
from ucdir_plugin.compat import lr_scheduler
from ucdir_plugin.diffusion.bird.tasks import preset, task_named
from ucdir_plugin.diffusion.conditions import check_ranges, declare
from ucdir_plugin.metrics import protocol
from ucdir_plugin.options.calls import check_call, check_metric, check_registered, check_values, is_own
from ucdir_plugin.options.model_rules import FOREIGN, MODELS, ModelRules
from ucdir_plugin.options.schema import (
    BirdOptions,
    DatasetOptions,
    MMEngineOptions,
    SamplingOptions,
    TrainOptions,
    check_sampling,
)
from ucdir_plugin.utils.degradations import chain
from ucdir_plugin.utils.errors import UserError, did_you_mean

_BASICSR_TRAIN = {"total_iter", "warmup_iter", "optim_g", "scheduler", "ema_decay"}
"""Keys of ``train`` that BasicSR's models know; the others are this package's."""

_BASICSR_DATASET = {"color", "mean", "std"}
"""Keys of BasicSR's data sets that none of this package's has."""


@dataclass
class Checked:
    """Options on their way through the rules.

    Attributes:
        opt: complete, with defaults; rules change it.
        raw: as they were given.
        is_train: for training, not for a test.
    """

    opt: Dict[str, Any]
    raw: Mapping[str, Any]
    is_train: bool

    @property
    def name(self) -> str:
        """The model's name."""
        return self.opt["model_type"]

    @property
    def model(self) -> ModelRules:
        """What the model makes of options."""
        return MODELS.get(self.name, FOREIGN)


def given(options: Mapping[str, Any], path: str) -> Any:
    """The value at ``a:b:c``, or None."""
    place: Any = options
    for key in path.split(":"):
        place = place.get(key) if isinstance(place, Mapping) else None
    return place


def registered_model(checked: Checked) -> None:
    """The model is registered."""
    registry.lookup("model", checked.name, "option model_type")


def network_or_bird(checked: Checked) -> None:
    """A network is there, or for BIR-D the section ``bird``; not the other."""
    for key, needed in (("network_g", not checked.model.blind), ("bird", checked.model.blind)):
        if needed and key == "network_g" and checked.opt[key] is None:
            raise UserError("option network_g is missing")
        if not needed and key == "bird" and checked.opt[key] is not None:
            raise UserError(f"option bird is for BIRDModel, not for {checked.name}")


def meaningless(checked: Checked) -> None:
    """No option is given that the model has no use for."""
    for path in checked.model.meaningless:
        value = given(checked.raw, path)
        if value is None or value is False or value == {}:
            continue
        fault = f"option {path} has no meaning for {checked.name}"
        if checked.model.blind and path == "val:sampling":
            raise UserError(f"{fault}: bird:settings says how it samples")
        raise UserError(f"{fault}{', which restores without training' if checked.model.blind else ''}; remove it")


def bird(checked: Checked) -> None:
    """Complete ``bird`` and look at what its keys say together; ``scale`` is the task's."""
    opt = checked.opt
    if not checked.model.blind:
        return
    opt["bird"] = opt["bird"] or BirdOptions().model_dump()
    options = opt["bird"]
    try:
        task = task_named(options["task"])
        preset(options["preset"])
    except UserError as err:
        raise UserError(f"option bird: {err}") from err
    if options["mask"] is not None and not task.holes:
        raise UserError(f"option bird:mask: only the task inpaint has holes, not {options['task']}; remove it")
    if options["network"] is not None:
        check_registered("arch", {"type": "ADMUNet", **options["network"]}, "bird:network")
    stage = options["first_stage"]
    if stage is not None and (stage["model"] is None) == (stage["images"] is None):
        raise UserError("option bird:first_stage: give model (an option or model file) or images (a folder)")
    if stage is not None and stage["weights"] is not None and stage["model"] is None:
        raise UserError("option bird:first_stage:weights go with model")
    if checked.raw.get("scale", task.factor) != task.factor:
        raise UserError(f"option scale: {options['task']} makes images {task.factor} times as large; remove scale")
    opt["scale"] = task.factor


def engine(checked: Checked) -> None:
    """Complete the section ``mmengine``, and refuse what the engine cannot run."""
    opt = checked.opt
    if opt["engine"] == "basicsr":
        if opt.pop("mmengine") is not None:
            raise UserError("option mmengine has no meaning for engine: basicsr; set engine: mmengine, or remove it")
        return
    if not checked.model.own:
        known = ", ".join(sorted(MODELS))
        raise UserError(f"engine: mmengine runs {known}; {checked.name} is a loop of BasicSR: remove engine")
    opt["mmengine"] = opt["mmengine"] or MMEngineOptions().model_dump()
    own, train = opt["mmengine"], opt.get("train") or {}
    if any(own.values()):
        from ucdir_plugin.options.mmengine import check_settings  # it needs MMEngine's runner

        check_settings(own)
    if own["optim_wrapper"]:
        for key, instead in (("accumulate", "accumulative_counts"), ("amp", "its own precision")):
            if train.get(key) not in (None, 1):
                raise UserError(f"option train:{key} has no meaning for mmengine:optim_wrapper, which has {instead}")
    if own["param_scheduler"] and (train.get("scheduler") or train.get("warmup_iter", -1) > 0):
        raise UserError("option mmengine:param_scheduler: remove train:scheduler and train:warmup_iter")


def networks(checked: Checked) -> None:
    """Every network is registered and takes its arguments."""
    for key, cfg in checked.opt.items():
        if key.startswith("network_") and cfg is not None:
            check_registered("arch", cfg, key)


def phases(checked: Checked) -> None:
    """Data sets are for training, validation or test."""
    for phase in checked.opt["datasets"]:
        if not re.fullmatch(r"(train|val|test)(_\w+)?", phase):
            raise UserError(f"option datasets:{phase}: the phases are train, val, val_2, ..., test, test_2, ...")


def datasets(checked: Checked) -> None:
    """Look at each data set's keys: those that it says are its own (``options``), and BasicSR's."""
    classes = {name: registry.lookup("dataset", name) for name in registry.names("dataset")}
    own = {name: cls.options for name, cls in classes.items() if is_own(cls)}
    special = _BASICSR_DATASET.union(*own.values())
    fields = DatasetOptions.model_fields.items()
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields}
    for phase, dataset in checked.opt["datasets"].items():
        where, name = f"datasets:{phase}", dataset["type"]
        registry.lookup("dataset", name, f"option {where}:type")
        if name not in own:
            continue
        keys = {key: value for key, value in checked.raw["datasets"][phase].items() if value is not None}
        told = {k for k, v in keys.items() if v and not (k in defaults and v == defaults[k])}
        for key in sorted(special & told - own[name].keys()):
            raise UserError(f"option {where}:{key} has no meaning for {name}; remove it")
        known = {*DatasetOptions.model_fields, *own[name]}
        for key in keys:
            if key not in known | special:
                raise UserError(f"unknown option {where}:{key}; {did_you_mean(key, known)}")
        dataset.update(check_values({key: keys[key] for key in own[name] if key in keys}, own[name], where))


def batches(checked: Checked) -> None:
    """A total batch is for training, and given alone."""
    for phase, dataset in checked.opt["datasets"].items():
        if dataset.get("batch_size_total") is None:
            continue
        total = f"option datasets:{phase}:batch_size_total"
        if phase.split("_")[0] != "train":
            raise UserError(f"{total} is for training: images of {phase} are restored one by one; remove it")
        if checked.raw["datasets"][phase].get("batch_size_per_gpu") is not None:
            raise UserError(f"{total} and batch_size_per_gpu exclude each other: remove one, or give it as ~ (nothing)")


def degradations(checked: Checked) -> None:
    """Chains of degradations are known and complete."""
    for phase, dataset in checked.opt["datasets"].items():
        if dataset.get("degradations") is not None:
            chain(dataset["degradations"], f"datasets:{phase}:degradations")


def conditions(checked: Checked) -> None:
    """Compare the conditions that the network takes with those that the data sets give, as far as they say."""
    if not (checked.is_train and checked.model.trains):
        return
    denoiser = checked.opt["network_g"].get("denoiser")
    declared = declare(denoiser.get("conditions")) if isinstance(denoiser, Mapping) else ()
    for phase, dataset in checked.opt["datasets"].items() if declared else ():
        ranges_of = getattr(registry.lookup("dataset", dataset["type"]), "condition_ranges", None)
        if ranges_of is not None and phase.split("_")[0] != "test":
            check_ranges(declared, ranges_of(dataset), phase == "train", f"option datasets:{phase}")


def metrics(checked: Checked) -> None:
    """Look at the metrics' arguments; ``better`` is completed."""
    for name, metric in (checked.opt["val"].get("metrics") or {}).items():
        check_metric(metric, f"val:metrics:{name}")
        metric.setdefault("better", protocol.better(metric))


def training_is_there(checked: Checked) -> None:
    """A training has its data set and its section."""
    if checked.is_train and "train" not in checked.opt["datasets"]:
        raise UserError("option datasets:train is missing")
    if checked.is_train and not checked.opt.get("train"):
        raise UserError("option train is missing")


def _train(checked: Checked) -> Optional[Dict[str, Any]]:
    return checked.opt.get("train") or None


def optimizer(checked: Checked) -> None:
    """The optimizer is one of torch's and takes its arguments."""
    if (train := _train(checked)) is None:
        return
    optim = train["optim_g"]
    found = getattr(torch.optim, optim["type"], None)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        known = [n for n, c in vars(torch.optim).items() if inspect.isclass(c)]
        raise UserError(
            f"option train:optim_g:type: there is no {optim['type']!r}; {did_you_mean(optim['type'], known)}"
        )
    check_call(found, {k: v for k, v in optim.items() if k != "type"}, "train:optim_g", given=1)


def scheduler(checked: Checked) -> None:
    """The schedule of learning rates is one of BasicSR's and takes its arguments."""
    if (train := _train(checked)) is None or train.get("scheduler") is None:
        return
    options = train["scheduler"]
    known = ("MultiStepLR", "MultiStepRestartLR", "CosineAnnealingRestartLR")
    if options["type"] not in known:
        hint = did_you_mean(options["type"], known)
        raise UserError(f"option train:scheduler:type: there is no {options['type']!r}; {hint}")
    found = getattr(lr_scheduler, options["type"].replace("MultiStepLR", "MultiStepRestartLR"))
    check_call(found, {k: v for k, v in options.items() if k != "type"}, "train:scheduler", given=1)


def losses(checked: Checked) -> None:
    """Every loss, a key that ends in ``_opt``, is registered and takes its arguments."""
    for key, value in (_train(checked) or {}).items():
        if key.endswith("_opt") and value is not None:
            check_registered("loss", value, f"train:{key}")


def predictor(checked: Checked) -> None:
    """Options of the initial predictor go with the network and with each other."""
    if (train := _train(checked)) is None:
        return
    options = train.get("predictor") or {}
    for key in ("lr", "frozen"):
        if options.get(key) and checked.model.trains and checked.opt["network_g"].get("predictor", {}) is None:
            raise UserError(f"option train:predictor:{key}: network_g has no predictor; remove it")
    if options.get("frozen") and (options.get("lr") or train.get("initial_opt")):
        other = "predictor:lr" if options.get("lr") else "initial_opt"
        raise UserError(f"option train:{other} has no meaning for a predictor that is frozen; remove one of them")


def needed_for_training(checked: Checked) -> None:
    """The loss on noise, or of a foreign model the scheduler, is there."""
    if (train := _train(checked)) is None:
        return
    key = checked.model.loss
    if checked.model.trains and not train.get(key):
        what = "the loss on the predicted noise" if key == "diffusion_opt" else "the loss on what the teacher gives"
        raise UserError(f"option train:{key} is missing ({what})")
    if not checked.model.trains and train.get("scheduler") is None:
        raise UserError("option train:scheduler is missing")


def student(checked: Checked) -> None:
    """A student has a teacher and samples in one step."""
    if checked.model.loss != "distillation_opt":
        return
    steps, sampler = (checked.opt["val"]["sampling"][key] for key in ("steps", "sampler"))
    if steps != 1 or sampler == "heun":
        raise UserError(f"option val:sampling: a student samples in one step, not {steps} of {sampler}: set steps: 1")
    if (train := _train(checked)) is not None and train.get("teacher") is None:
        raise UserError("option train:teacher is missing (model: the network that the student learns from)")


def predictor_weights(checked: Checked) -> None:
    """Weights of the predictor go with the network, and with its own weights."""
    path = checked.opt["path"]
    if _train(checked) is None or not path["pretrain_network_predictor"]:
        return
    if checked.opt["network_g"].get("predictor") is None:
        raise UserError("option path:pretrain_network_predictor: network_g has no predictor; remove it")
    if path["pretrain_network_g"] and checked.is_train:
        raise UserError(
            "option path:pretrain_network_predictor: pretrain_network_g holds the predictor too; remove one"
        )


def foreign_training(checked: Checked) -> None:
    """Keep what only this package's models understand away from others; BasicSR's own would ignore it."""
    if _train(checked) is None or checked.model.trains:
        return
    of_basicsr = registry.lookup("model", checked.name).__module__.startswith("basicsr.")
    for key in TrainOptions.model_fields.keys() - _BASICSR_TRAIN:
        if of_basicsr and checked.raw["train"].get(key) is not None:
            owner = "DiffusionPriorModel" if key == "variance_opt" else "UCDIRModel"
            raise UserError(f"option train:{key} is for {owner}; {checked.name} would ignore it")
        if checked.raw["train"].get(key) is None:
            del checked.opt["train"][key]


def sampling(checked: Checked) -> None:
    """The keys of ``val: sampling`` go together, and with the schedule."""
    opt = checked.opt
    check_sampling(SamplingOptions(**opt["val"]["sampling"]), checked.model.schedule(**opt["diffusion"]).schedule())


def foreign_network(checked: Checked) -> None:
    """A foreign model is not given what only this package's take."""
    if checked.model.own:
        return
    if checked.opt["network_g"].get("conditions"):
        raise UserError(f"option network_g:conditions is for UCDIRModel; {checked.name} gives none")
    if checked.opt["compile"]:
        raise UserError(f"option compile is for UCDIRModel; {checked.name} would ignore it")


def other_models_sections(checked: Checked) -> None:
    """Drop what only other models need."""
    for path in checked.model.sections:
        *above, key = path.split(":")
        place = checked.opt
        for name in above:
            place = place[name]
        del place[key]


Rule = Callable[[Checked], None]
BEFORE: Tuple[Rule, ...] = (meaningless,)
"""Rules on options as they were given, before the types of their keys are looked at."""

RULES: Tuple[Rule, ...] = (
    registered_model,
    network_or_bird,
    bird,
    engine,
    networks,
    phases,
    datasets,
    batches,
    degradations,
    conditions,
    metrics,
    training_is_there,
    optimizer,
    scheduler,
    losses,
    predictor,
    needed_for_training,
    student,
    predictor_weights,
    foreign_training,
    sampling,
    foreign_network,
    other_models_sections,
)
