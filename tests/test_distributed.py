"""Two gloo processes against one process with the same global batch."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import TINY, merged
from test_tools import TORCHRUN

SCRIPT = """
import os, sys, json, torch
torch.set_num_threads(1)
from ucdir_plugin.utils.cli import run_cli
from basicsr.models import build_model
from basicsr.utils.dist_util import get_dist_info
from ucdir_plugin import compat
from ucdir_plugin.training.loop import seed_everything
from ucdir_plugin.options.check import check_options

options, out, distributed = json.load(open(sys.argv[1])), sys.argv[2], "RANK" in os.environ
if distributed:
    compat.init_dist("pytorch")
rank, world = get_dist_info()
opt = check_options(options, True)
opt.update(dist=distributed, rank=rank, world_size=world, num_gpu=0, is_train=True)
seed_everything(0)
model = build_model(opt)
share = 4 // world
for step in range(5):
    torch.manual_seed(step)
    gt = torch.rand(4, 3, 16, 16)
    lq = (gt + 0.1 * torch.randn_like(gt)).clamp(0, 1)
    mine = slice(rank * share, (rank + 1) * share)
    model.feed_data({"lq": lq[mine], "gt": gt[mine], "sample_number": torch.arange(4 * step, 4 * step + 4)[mine]})
    model.optimize_parameters(step + 1)
    gradients = {n: p.grad.clone() for n, p in model.get_bare_model(model.net_g).named_parameters()}
    log = model.get_current_log()
    if rank == 0:
        torch.save({"gradients": gradients, "loss": log["l_eps"]}, f"{out}_{step}.pth")
sys.exit(run_cli(lambda: 0))  # past the interpreter's shutdown
"""


def test_gradients_equal_one_process(workplace):
    """Relative to 1e-6 over five steps of SGD (Adam would turn rounding into full steps), dropout 0."""
    options = merged(
        TINY, {"train": {"optim_g": {"type": "SGD", "lr": 0.1}, "grad_clip": None, "accumulate": 2, "scheduler": None}}
    )
    (workplace.folder / "options.json").write_text(json.dumps(options))
    (workplace.folder / "steps.py").write_text(SCRIPT)
    script = "../" * 9 + str(workplace.folder / "steps.py").lstrip("/")  # seen from tools/
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        done = workplace.run(script, "options.json", name, launcher=launcher)
        assert done.returncode == 0, done.stderr[-3000:]
    for step in range(5):
        one, two = (torch.load(workplace.folder / f"{name}_{step}.pth", weights_only=True) for name in ("one", "two"))
        a, b = (torch.cat([g.double().flatten() for g in run["gradients"].values()]) for run in (one, two))
        assert a.norm() > 0
        assert (a - b).norm() / a.norm() < 1e-6, f"step {step}: {(a - b).norm() / a.norm()}"
        assert abs(one["loss"] - two["loss"]) < 1e-6


def test_bad_input_on_several_processes(workplace):
    path = workplace.write(merged(TINY, {"train": {"ema_deacy": 1}}))
    done = workplace.run("train.py", "-opt", path, "--launcher", "pytorch", launcher=TORCHRUN)
    assert done.returncode != 0
    assert "error: options.yml: unknown option train:ema_deacy; did you mean 'ema_decay'" in done.stderr


LEAVING = """
import atexit, os, sys, torch.distributed
from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError

class Late:
    def __del__(self):
        os.abort()  # as a thread of gloo that wants the lock of an interpreter that is shutting down

def main():
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/{sys.argv[1]}", rank=0, world_size=1)
    atexit.register(lambda: print("atexit"))
    print("main")
    if sys.argv[1] == "wrong":
        raise UserError("a wrong option")
    return 3

late = Late()
sys.exit(run_cli(main))
"""


@pytest.mark.parametrize("case, code", [("right", 3), ("wrong", 2)])
def test_a_process_of_a_group_ends_before_the_interpreter_shuts_down(tmp_path, case, code):
    done = subprocess.run([sys.executable, "-c", LEAVING, case], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    assert done.stdout.split() == ["main", "atexit"]  # buffered text is written, what was registered has run
