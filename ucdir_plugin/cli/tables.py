"""The command that makes tables of papers: tools/tables.py once its arguments are parsed."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import yaml

from ucdir_plugin import zoo
from ucdir_plugin.evaluation import compare, plans, tables
from ucdir_plugin.evaluation.measure import not_available
from ucdir_plugin.options.check import load_options
from ucdir_plugin.options.reading import apply_overrides, read_options
from ucdir_plugin.utils import files
from ucdir_plugin.utils.errors import UserError, at_least_one, did_you_mean, printable
from ucdir_plugin.utils.versions import versions
from ucdir_plugin.zoo.model_files import find_weights

RECORD = "plan.json"
"""In a run's folder: what its results were made of."""


@dataclass
class Job:
    """A run of a plan, ready to go.

    Attributes:
        run: of the plan.
        name: of its folder in results/.
        overrides: ``--force_yml``.
        sets: names of its test sets.
        made_of: a digest of all that decides its results.
    """

    run: plans.Run
    name: str
    overrides: List[str]
    sets: List[str]
    made_of: str

    @property
    def folder(self) -> str:
        """Where its results lie."""
        return os.path.join("results", self.name)

    def results(self, name: str) -> str:
        """The table of one of its sets."""
        return os.path.join(self.folder, "metrics.json" if self.run.restored else f"metrics_{name}.json")

    def finished(self) -> bool:
        """Whether its results are there and made of what it would take now."""
        try:
            with open(os.path.join(self.folder, RECORD), encoding="utf-8") as file:
                same = json.load(file) == {"made_of": self.made_of}
        except (OSError, ValueError):
            return False
        return same and all(os.path.isfile(self.results(name)) for name in self.sets)


def run(args: argparse.Namespace) -> int:
    """Make the table that the arguments of tools/tables.py name; returns the exit code.

    Raises:
        UserError: for a wrong plan, or if none of its runs can be done.
    """
    at_least_one(**{"--processes": args.processes})
    plan = plans.read_plan(args.plan)
    for name in args.parts or ():
        if name not in plan.parts:
            raise UserError(f"{args.plan} has no part {name!r}; {did_you_mean(name, plan.parts)}")
    chosen = {name: part for name, part in plan.parts.items() if args.parts is None or name in args.parts}
    stem = os.path.splitext(os.path.basename(args.plan))[0]
    output = args.output or os.path.join("results", "tables", stem)
    jobs: Dict[str, List[Job]] = {}
    missing: Dict[str, Dict[str, str]] = {}
    for part_name, part in chosen.items():  # what is missing is said before hours of work
        jobs[part_name], missing[part_name] = [], {}
        for entry in part.runs:
            try:
                jobs[part_name].append(_job(entry, f"tables_{stem}_{part_name}", [*plan.options, *part.options], args))
            except UserError as err:
                missing[part_name][entry.name] = f"left out: {err}"
                print(f"left out: {part_name}: {printable(f'{entry.name}: {err}')}", file=sys.stderr, flush=True)
    folders = [job.folder for found in jobs.values() for job in found]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise UserError(f"{args.plan}: two runs would write to {twice}: give them other names")
    _refuse_nothing(jobs, missing)
    text = [f"# {plan.title}", *plan.notes]
    path = os.path.join(output, "table.md")
    for part_name, part in chosen.items():
        for job in list(jobs[part_name]):
            outcome = _do(job, args)
            if outcome.fault:
                missing[part_name][job.run.name] = outcome.fault
            if not outcome.measured:
                jobs[part_name].remove(job)
        done = jobs[part_name]
        text.append(f"## {part.title}")
        for name in dict.fromkeys(name for job in done for name in job.sets):
            having = [job for job in done if name in job.sets]
            text += _table(part, having, name, os.path.join(output, part_name, name))
        text += ["\n".join(plans.published_table(part, plan.source))] if part.published else []
        text += [f"- {tables.escaped(name)}: {reason}" for name, reason in missing[part_name].items()]
        if done:
            files.write_text("\n\n".join(text) + "\n", path)  # what there is so far
    _refuse_nothing(jobs, missing)
    files.write_text("\n\n".join(text) + "\n", path)
    print("\n\n".join(text))
    print(f"table: {path}; of each part in {output}: comparison.md .csv .tex .json .png")
    return 1 if any(missing.values()) else 0


def _refuse_nothing(jobs: Dict[str, List[Job]], missing: Dict[str, Dict[str, str]]) -> None:
    if any(jobs.values()):
        return
    part_name, faults = next((name, found) for name, found in missing.items() if found)
    entry_name, reason = next(iter(faults.items()))
    raise UserError(f"none of the runs can be done; {part_name}: {entry_name}: {reason.removeprefix('left out: ')}")


def _job(entry: plans.Run, prefix: str, options: List[str], args: argparse.Namespace) -> Job:
    """Look whether a run's options, weights and images are there.

    Raises:
        UserError: saying what is missing.
    """
    overrides = [*options, *entry.options, *(args.force_yml or [])]
    opt = load_options(entry.opt, overrides, is_train=False, trust=args.trust_config)
    sets = {phase: d for phase, d in opt["datasets"].items() if phase.split("_")[0] in ("val", "test")}
    used = [v for v in (entry.restored, entry.truth, entry.input, opt["val"].get("reference")) if v]
    if entry.restored is None:
        if not sets:
            raise UserError(f"{entry.opt}: there is no val or test dataset")
        used += [v for dataset in sets.values() for k, v in dataset.items() if v and _names_a_file(k)]
        used += _files_of_bird(opt.get("bird") or {})
        if opt.get("network_g"):
            opt["root_path"] = os.getcwd()
            try:
                find_weights(opt, overrides)
            except UserError as err:
                raise UserError(f"it is not trained: python tools/train.py -opt {entry.opt} ({err})") from err
            weights, key = opt["path"]["pretrain_network_g"], opt["path"]["param_key_g"]
            overrides += [f"path:pretrain_network_g={json.dumps(weights)}", f"path:param_key_g={json.dumps(key)}"]
            used.append(weights)
    used = [os.path.expanduser(path) for path in used]
    for path in used:
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist")
    # A metric whose weights come later is measured then.
    metrics = opt["val"].get("metrics") or {}
    lacking = [] if args.download else not_available(metrics, args.weights_dir or opt["val"].get("weights_dir"))
    told = {key: value for key, value in opt.items() if key not in ("path", "root_path", "logger", "dist_params")}
    decides = [told, dataclasses.asdict(entry), {path: _state(path) for path in used}, lacking, versions()]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    name = re.sub(r"\W+", "_", f"{prefix}_{entry.name}").strip("_")
    if re.search(r"\W", entry.name):  # others may differ in no letter
        name += f"_{hashlib.sha256(entry.name.encode()).hexdigest()[:6]}"
    names = [dataset["name"] for dataset in sets.values()] or [""]
    return Job(entry, name, overrides, names if entry.restored is None else names[:1], digest)


def _names_a_file(key: str) -> bool:
    return key.startswith("dataroot") or key in ("meta_info_file", "condition_file")


def _files_of_bird(options: Mapping[str, Any]) -> List[str]:
    """Files and folders that BIR-D's options name; a prior that is no file is one of the package."""
    stage, prior = options.get("first_stage") or {}, options.get("prior") or ""
    found = [stage.get("images"), stage.get("model"), stage.get("weights"), options.get("mask")]
    found += [*(options.get("observations") or ()), (options.get("blur") or {}).get("file")]
    found += [prior] if os.path.exists(prior) or os.path.splitext(prior)[1] or os.sep in prior else []
    return [path for path in found if path and not (path == stage.get("model") and path in zoo.names("model"))]


def _state(path: str) -> str:
    """Whether a file, or what lies in a folder, is still the same, whatever kind of files it is."""
    if os.path.isfile(path):
        return files.sha256_of(path)
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            state, place = os.stat(file) if os.path.exists(file) else os.lstat(file), os.path.relpath(file, path)
            digest.update(f"{place} {state.st_size} {state.st_mtime_ns}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


class Outcome(NamedTuple):
    """What came of a run: whether there are results, and what did not work."""

    measured: bool
    fault: Optional[str] = None


def _do(job: Job, args: argparse.Namespace) -> Outcome:
    """Restore and measure, where that is not done yet."""
    if job.finished():
        print(f"kept: {job.folder}", flush=True)
        return Outcome(True)
    for file in (os.path.join(job.folder, RECORD), *map(job.results, job.sets)):  # those of an earlier run are not its
        if os.path.isfile(file):
            os.remove(file)
    more = ["--weights-dir", args.weights_dir] if args.weights_dir else []
    more += ["--download"] if args.download else []
    more += [text for module in args.imports for text in ("--import", module)]
    more += ["--trust-config"] if args.trust_config else []
    tool = "test.py" if job.run.restored is None else "evaluate.py"
    if job.run.restored is not None:
        command = [sys.executable, os.path.join(args.tools, tool), job.run.restored]
        command += [job.run.truth] if job.run.truth else []
        command += ["--input", job.run.input] if job.run.input else []
        raw = read_options(job.run.opt)
        apply_overrides(raw, job.overrides)
        options = os.path.join(job.folder, "options.yml")
        files.write_text(yaml.safe_dump(raw, sort_keys=False), options)
        command += ["-opt", options, "-o", job.folder, "--name", job.run.name, *more]
    else:
        command = [sys.executable]
        if args.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
        command += [os.path.join(args.tools, tool), "-opt", job.run.opt, *more]
        command += ["--launcher", "pytorch"] if args.processes > 1 else []
        command += ["--force_yml", *job.overrides, f"name={job.name}"]
    print(f"running: {job.run.name} ({job.folder})", flush=True)
    code = _start(command)
    if code == 130:
        raise KeyboardInterrupt
    if code not in (0, 1) or not all(os.path.isfile(job.results(name)) for name in job.sets):
        return Outcome(False, f"left out: tools/{tool} ended with {code}: its output says why")
    if code:  # they are tried again by the next call
        return Outcome(True, "some of its images failed: its output says which")
    files.write_text(json.dumps({"made_of": job.made_of}), os.path.join(job.folder, RECORD))
    return Outcome(True)


def _start(command: List[str]) -> int:
    """Run a command to its end; returns its exit code."""
    return subprocess.run(command).returncode


def _table(part: plans.Part, done: List[Job], name: str, output: str) -> List[str]:
    """Write the comparison of a part's runs on one set; returns Markdown."""
    runs = compare.read_runs([job.results(name) for job in done], least=1)
    for job, found in zip(done, runs):
        found.name = job.run.name
    rows = []
    for title, stage in part.stages.items():
        having = next((found for found in runs if any(stage in row["metrics"] for row in found.rows.values())), None)
        rows += [compare.stage_as_run(having, stage, title)] if having else []
    found = compare.compare([*runs, *rows])
    published = plans.published_cells(part, found["columns"])
    text, _ = compare.write_found(runs, found, output, [], 3, published)
    heading = [f"### {name}"] if name else []
    return [*heading, text.rstrip()]
