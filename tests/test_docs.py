"""The documentation's commands run: blocks marked ``<!-- run -->``; blocks marked ``<!-- file: NAME -->`` are written.

The commands are those of the text, word for word. The option files are the real ones with small networks and two
iterations, and what the commands read is stand-in data.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import PHOTOS, ROOT, TINY, merged
from test_basicsr_commands import changes_for
from test_spandrel import model_file

from ucdir_plugin.options.reading import apply_overrides, read_options

DOCS = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^<!-- (run|file: (?P<name>[\w./]+)) -->\n```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(file: str) -> list[tuple[str, str, str]]:
    """(kind, name of a file or "", text) of each marked block."""
    text = (ROOT / file).read_text(encoding="utf-8")
    marks = len(re.findall(r"^<!-- (?:run|file:)", text, re.MULTILINE))
    found = [(m["kind"], m["name"] or "", m["text"]) for m in BLOCK.finditer(text)]
    assert len(found) == marks, f"{file}: a mark without a block behind it"
    return found


MARKED = [file for file in DOCS if blocks(file)]


def commands(text: str) -> list[str]:
    """The commands of a block of bash, without comments, a continued one in one line."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [" ".join(shlex.split(line, comments=True)) and line for line in lines]
    return [line for line in found if line]


def cut(path: Path, file: str) -> None:
    """Make an option file small, in place: networks, iterations, workers; its data stay where they are."""
    opt = read_options(str(path))
    changes = [change for change in changes_for(file) if "dataroot" not in change]
    apply_overrides(opt, changes)
    path.write_text(yaml.safe_dump(opt, sort_keys=False))


def crop(name: str, height: int = 48, width: int = 56) -> np.ndarray:
    return cv2.imread(str(PHOTOS / name))[100 : 100 + height, 100 : 100 + width]


@pytest.fixture
def reader(workplace):
    """A folder as the documentation's reader has it: a clone, photographs, pairs, something trained."""
    folder = workplace.folder
    (folder / "tools").symlink_to(ROOT / "tools")
    (folder / "datasets").mkdir()
    (folder / "datasets" / "prepare_demo.py").symlink_to(ROOT / "datasets" / "prepare_demo.py")
    shutil.copytree(ROOT / "options", folder / "options")
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples")
    for file in ("demo_ucdir.yml", "demo_regression.yml", "paired.yml"):
        cut(folder / "options" / file, file)
    small = folder / "options" / "mmengine" / "demo_ucdir.py"
    text = small.read_text().replace("iterations = 800", "iterations = 2").replace("gt_size=64", "gt_size=16")
    small.write_text(
        text.replace("inner_channel=16, channel_mults=[1, 2, 4, 4]", "inner_channel=8, channel_mults=[1, 2]")
    )
    drunet = folder / "docs" / "examples" / "drunet.yml"
    opt = yaml.safe_load(drunet.read_text())
    apply_overrides(opt, ["train:total_iter=2", "network_g:nc=[8, 8, 16, 16]", "datasets:train:gt_size=16"])
    drunet.write_text(yaml.safe_dump(opt, sort_keys=False))
    names = ("chelsea.png", "coffee.png", "astronaut.png")
    for part in (
        "demo/train",
        "demo/test",
        "photographs",
        *(f"mine/{phase}/{kind}" for phase in ("train", "val") for kind in ("lq", "gt")),
    ):
        (folder / "datasets" / part).mkdir(parents=True)
        for name in names[:2]:
            cv2.imwrite(str(folder / "datasets" / part / name), crop(name))
    for name in ("photo.jpg", "photo.png", "dark.jpg", "short.png", "medium.png", "long.png"):
        cv2.imwrite(str(folder / name), crop("coffee.png") // (4 if name in ("dark.jpg", "short.png") else 1))
    cv2.imwrite(str(folder / "small.png"), crop("coffee.png", 16, 16))
    cv2.imwrite(str(folder / "holes.png"), np.pad(np.full((8, 8), 255, np.uint8), ((20, 20), (24, 24))))
    for part in ("truths", "degraded", "archive"):
        shutil.copytree(folder / "datasets" / "demo" / "test", folder / part)
    tiny = merged(
        TINY, {"train": None, "datasets": None, "name": "mine", "val": {"metrics": None, "sampling": {"steps": 2}}}
    )
    model_file(tiny, folder)
    return workplace


# What a reader of the document has done before.
BEFORE = {
    "README.md": [
        "python tools/train.py -opt options/demo_ucdir.yml",
        "python tools/test.py -opt options/demo_ucdir.yml",
        "cp -r results/demo_ucdir results/mine",
        "cp -r truths theirs",
    ]
}


def run(reader, command: str) -> subprocess.CompletedProcess:
    """One command of the documentation; the tools in forked processes, which saves their import."""
    words = shlex.split(command, comments=True)
    environment = {}
    while re.fullmatch(r"[A-Z]+=\S*", words[0]):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    if words[0] == "python" and words[1].endswith(".py"):
        more = [str(reader.folder / part) for part in environment.pop("PYTHONPATH", "").split(":") if part]
        before = _with_path(more) if more else None
        return reader.fork(str(reader.folder / words[1]), *words[2:], before=before, **environment).wait()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-ec", command], cwd=reader.folder, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )


class _with_path:
    def __init__(self, paths):
        self.paths = paths

    def __call__(self):
        sys.path[:0] = self.paths


@pytest.mark.parametrize("file", MARKED)
def test_the_commands_of(file, reader, monkeypatch):
    monkeypatch.chdir(reader.folder)
    torch.manual_seed(0)
    for command in BEFORE.get(file, ()):
        assert run(reader, command).returncode == 0, command
    for kind, name, text in blocks(file):
        if name:
            path = reader.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif kind == "python":
            (reader.folder / "block.py").write_text(text)
            done = reader.run(str(reader.folder / "block.py"))
            assert done.returncode == 0, f"{text}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
        else:
            for command in commands(text):
                done = run(reader, command)
                assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"


def test_what_the_guide_promises(reader, monkeypatch):
    """Files that the text names after its commands."""
    monkeypatch.chdir(reader.folder)
    for kind, name, text in blocks("docs/ecosystem.md")[:4]:
        if name:
            Path(name).write_text(text)
            continue
        assert kind == "bash"
        for command in commands(text):
            assert run(reader, command).returncode == 0
    table = Path("results/mine/comparison.tex").read_text()
    assert r"my\_rival &" in table and r"my\_ucdir &" in table and "PSNR" in table
    assert Path("restored/photo.png").is_file()


def test_the_table_that_the_guide_promises(reader, monkeypatch):
    monkeypatch.chdir(reader.folder)
    for _, name, text in blocks("docs/ecosystem.md"):
        if name:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)
        elif "my_archs" in text or "mine.yaml" in text:
            for command in commands(text):
                assert run(reader, command).returncode == 0, command
    (folder,) = Path("results/tables/mine/mine").iterdir()
    rows = [line.split(" &")[0] for line in (folder / "comparison.tex").read_text().splitlines() if " &" in line]
    assert rows == ["Method", "TinyNAF", "UCDIR", "UCDIR, 5 steps", "input", "prediction"]


def test_which_documents_are_run():
    assert {"README.md", "docs/ecosystem.md"} <= set(MARKED)


def test_commands_are_read_as_a_shell_reads_them():
    text = "# all\npython a.py -x 1   # why\n\nX=1 b \\\n    --c 'd e'\n"
    assert [shlex.split(c, comments=True) for c in commands(text)] == [
        ["python", "a.py", "-x", "1"],
        ["X=1", "b", "--c", "d e"],
    ]
