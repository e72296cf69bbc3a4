"""The layout of the package (docs/architecture.md): layers, who may import BasicSR and MMEngine, sizes of files."""

import ast
import graphlib
import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import ucdir_plugin

LAYERS = """
utils
diffusion
compat
registry
archs data losses metrics
options
zoo
restoration
interop
evaluation
training
models mm
cli
__init__
"""
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
"""Each imports only what stands above it; those on one line do not know each other."""

LONGEST = 450
PATCHERS = ("compat", "registry")
ECOSYSTEMS = {"basicsr": (*PATCHERS, "models"), "mmengine": (*PATCHERS, "mm")}
EXCEPTIONS = {"ucdir_plugin/options/mmengine.py": "looks names up in MMEngine; imported for engine: mmengine alone"}
"""File -> why it imports what others may not."""
INSIDE = {
    "ucdir_plugin/archs/akgm/convolution.py:_triton": "Triton is there with CUDA alone",
    "ucdir_plugin/cli/run.py:_mmengine": "takes a second to import; not needed under BasicSR",
    "ucdir_plugin/options/rules.py:engine": "needs MMEngine",
}
"""Function that imports a part of the package -> why."""

FILES = {file.relative_to(ROOT).as_posix(): file for file in sorted((ROOT / "ucdir_plugin").rglob("*.py"))}


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(file) for file in FILES}


def imports(tree: ast.AST):
    """(module, line) of each import; ``from a import b`` is a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else node.module), node.lineno


def part_of(module: str) -> str:
    """The entry at the package's top that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def trees():
    return {file: ast.parse(path.read_text(encoding="utf-8")) for file, path in FILES.items()}


def test_imports_run_one_way():
    """No part imports one below it in the list, or its neighbour on the same line."""
    wrong = []
    for file, tree in trees().items():
        own = part_of(module_of(file))
        for module, line in imports(tree):
            if module.split(".")[0] == "ucdir_plugin":
                other = part_of(module)
                if other != own and RANK[other] >= RANK[own]:
                    wrong.append(f"{file}:{line} imports {module}")
    assert not wrong
    assert {part_of(module) for module in MODULES} <= RANK.keys()


def test_no_circle():
    graph = {}
    for file, tree in trees().items():
        found = {m for m, _ in imports(tree) if m in MODULES} - {module_of(file)}
        graph[module_of(file)] = {m for m in found if not module_of(file).startswith(f"{m}.")}
    graphlib.TopologicalSorter(graph).prepare()


def test_ecosystems_are_imported_where_they_belong():
    wrong = []
    for file, tree in trees().items():
        for module, line in imports(tree):
            places = ECOSYSTEMS.get(module.split(".")[0])
            if places and part_of(module_of(file)) not in places and file not in EXCEPTIONS:
                wrong.append(f"{file}:{line} imports {module}")
    assert not wrong


def test_imports_of_the_package_stand_at_the_top():
    wrong = []
    for file, tree in trees().items():
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = [m for m, _ in imports(function) if m.split(".")[0] == "ucdir_plugin"]
                if inner and f"{file}:{function.name}" not in INSIDE:
                    wrong.append(f"{file}:{function.lineno} {function.name} imports {inner}")
    assert not wrong


def test_no_file_is_too_long():
    files = [*(ROOT / "ucdir_plugin").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    long = {str(f): n for f in files if (n := len(f.read_text(encoding="utf-8").splitlines())) > LONGEST}
    assert not long


@pytest.mark.parametrize("module", sorted(MODULES))
def test_public_methods_say_what_they_do(module):
    """Of its own or of what it overrides; ruff looks at the rest (pyproject.toml)."""
    found = importlib.import_module(module)
    silent = []
    for name, cls in vars(found).items():
        if inspect.isclass(cls) and cls.__module__ == module and not name.startswith("_"):
            for key, value in vars(cls).items():
                if key.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
                    continue
                if not inspect.getdoc(getattr(cls, key)):
                    silent.append(f"{name}.{key}")
    assert not silent


def test_the_tools_load_nothing_before_their_arguments():
    """Neither parsers nor dispatcher import the package, or anything but the standard library, at their top."""
    standard = {"__future__", "argparse", "difflib", "importlib", "os", "sys", "typing", "ucdir_cli"}
    own = {"pathlib", "subprocess", "time", "venv"}  # quickstart.py
    for file in (ROOT / "tools").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            tops = {module.split(".")[0] for module, _ in imports(node)} if "mport" in type(node).__name__ else set()
            assert tops <= standard | (own if file.name == "quickstart.py" else set()), file


def test_every_module_is_listed_in_the_architecture():
    """docs/architecture.md names each part of the package's top."""
    text = (Path(ROOT) / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = {m.name for m in pkgutil.iter_modules(ucdir_plugin.__path__)}
    assert not [part for part in sorted(parts) if f"`{part}" not in text]


def test_the_wheel_holds_the_commands_and_no_laboratory(tmp_path):
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("ucdir_plugin", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheel", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    commands = {"train", "test", "restore", "evaluate", "compare", "tables", "convert_weights"}
    assert {Path(n).stem for n in names if n.startswith("ucdir_cli/")} == {*commands, "command_line", "__init__"}
    assert {f"ucdir_plugin/{n}" for n in ("evaluation/report.html", "archs/akgm/akgm.cpp", "zoo/index.json")} <= names
    assert {module_of(n) for n in names if n.startswith("ucdir_plugin/") and n.endswith(".py")} == MODULES
