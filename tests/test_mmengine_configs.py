"""MMEngine as its users write it: its own runner on plain configurations, samplers, evaluators, default_scope."""

import logging

import pytest
import torch
from conftest import ROOT, TINY
from mmengine.evaluator import Evaluator
from mmengine.logging import MessageHub
from mmengine.registry import EVALUATOR, METRICS, MODELS

import ucdir_plugin.mm.metrics
import ucdir_plugin.mm.models  # noqa: F401
from ucdir_plugin.registry import SCOPE
from ucdir_plugin.utils.errors import UserError

FILE = ROOT / "options" / "mmengine" / "demo_ucdir.py"
RUN = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner

cfg = Config.fromfile({file!r})
cfg.merge_from_dict({changes!r})
runner = Runner.from_cfg(cfg)
runner.train()
runner.test()
"""
CHANGES = {
    "train_cfg": {"max_iters": 2, "val_interval": 2},
    "model.opt.val.sampling.steps": 2,
    "model.opt.network_g": TINY["network_g"],
    "photographs": None,
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "train_dataloader.dataset.opt.dataroot_gt": "photos",
    "train_dataloader.dataset.opt.gt_size": 16,
    "val_dataloader.dataset.opt.dataroot_gt": "photos",
    "test_dataloader.dataset.opt.dataroot_gt": "photos",
    "custom_hooks.2.interval": 1,
    "default_hooks.logger.interval": 1,
}
SAMPLERS = {
    "InfiniteSampler": {},
    "DefaultSampler": {"train_dataloader.sampler": {"type": "DefaultSampler", "shuffle": True}},
    "KeyedSampler": {"train_dataloader.sampler": {"type": "KeyedSampler", "batch": 2, "_delete_": True}},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_configuration_under_mmengines_own_runner(sampler, workplace):
    script = workplace.folder / "run.py"
    script.write_text(RUN.format(file=str(FILE), changes={**CHANGES, **SAMPLERS[sampler]}))
    done = workplace.run(str(script))
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert "Failed to search registry" not in log
    assert log.count("the sampler gives no sample_number") == (sampler != "KeyedSampler")
    text = next((workplace.folder / "experiments" / "mm_demo_ucdir").glob("*/*.log")).read_text()
    assert text.count("the sampler gives no sample_number") == (sampler != "KeyedSampler")
    assert "Iter(val) [3/3]" in text and "restoration/psnr" in text and "restoration/input/ssim" in text
    assert "Iter(test) [3/3]" in text


def test_the_configuration_under_tools_train(workplace):
    changes = [f"{key}={value}" for key, value in CHANGES.items() if key not in ("train_cfg", "model.opt.network_g")]
    changes += ["train_cfg.max_iters=1", "train_cfg.val_interval=1"]
    changes += ["model.opt.network_g.predictor.width=4", "model.opt.network_g.denoiser.inner_channel=8"]
    done = workplace.run("train.py", "-opt", str(FILE), "--trust-config", "--force_yml", *changes)
    assert done.returncode == 0, done.stderr[-3000:]


METRIC = {"type": f"{SCOPE}.RestorationMetrics", "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 0}}}


def measured(evaluator: Evaluator) -> dict:
    image = torch.rand(3, 16, 16)
    evaluator.process([{"key": "a", "output": image, "gt": image.flip(-1), "lq": image}])
    return evaluator.evaluate(1)


def test_an_evaluator_is_a_dict_a_list_or_a_metric():
    """As Runner.build_evaluator builds them."""
    of_dict = EVALUATOR.build(dict(METRIC))
    assert isinstance(of_dict, Evaluator) and [type(m).__name__ for m in of_dict.metrics] == ["RestorationMetrics"]
    of_list, of_metric = Evaluator([dict(METRIC)]), Evaluator(METRICS.build(dict(METRIC)))
    results = []
    for evaluator in (of_dict, of_list, of_metric):
        torch.manual_seed(0)
        results.append(measured(evaluator))
    assert results[0] == results[1] == results[2] and results[0]["restoration/psnr"] > 0
    with_prefix = EVALUATOR.build({**METRIC, "prefix": "mine"})
    assert set(measured(with_prefix)) == {"mine/psnr", "mine/input/psnr"}
    with pytest.raises(UserError, match="unknown option metrics:psnr:crop"):
        EVALUATOR.build({"type": METRIC["type"], "metrics": {"psnr": {"type": "calculate_psnr", "crop": 0}}})


def test_every_registry_of_mmengine_has_the_scope():
    """Else a configuration with ``default_scope = "ucdir_plugin"`` warns wherever something is built."""
    from mmengine import registry as mm

    roots = [value for value in vars(mm).values() if isinstance(value, mm.Registry)]
    assert len(roots) > 15 and all(SCOPE in root.children for root in roots)
    for root, name in ((MODELS, "UCDIRModel"), (mm.PARAM_SCHEDULERS, "CosineAnnealingLR"), (mm.HOOKS, "LoggerHook")):
        with root.switch_scope_and_registry(SCOPE) as found:
            assert found.scope == SCOPE and found.get(name) is not None, name


def test_positions_are_numbers_of_the_training(caplog):
    """Without sample numbers: of each iteration other ones, the same after a resume, each once over the processes."""
    opt = {"network_g": TINY["network_g"], "train": TINY["train"], "val": {"sampling": {"steps": 2}}}
    model = MODELS.build({"type": f"{SCOPE}.UCDIRModel", "opt": opt})
    batch = [{"lq": torch.rand(3, 16, 16), "gt": torch.rand(3, 16, 16)} for _ in range(3)]
    hub = MessageHub.get_current_instance()
    numbers = []
    with caplog.at_level(logging.WARNING):
        for iteration in (0, 1, 7):
            hub.update_info("iter", iteration)
            numbers.append(model.data_preprocessor(batch, training=True)["samples"])
    assert numbers == [[0, 1, 2], [3, 4, 5], [21, 22, 23]]
    assert model.data_preprocessor.told
    keyed = [{**sample, "sample_number": 40 + i} for i, sample in enumerate(batch)]
    assert model.data_preprocessor(keyed, training=True)["samples"] == [40, 41, 42]
