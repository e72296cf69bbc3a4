"""YAML read safely: files with a base, overrides of the command line, limits of size and depth."""

from __future__ import annotations

import math
import os
import re
import stat
from typing import Any, Dict, Hashable, Iterator, List, Mapping, Optional, Tuple

import yaml

from ucdir_plugin.utils.errors import UserError, printable

_TEXT, _VALUES, _DEPTH = 2**20, 100_000, 50
"""The most that options may be: characters, values, levels."""


_NUMBER = 64
"""The most characters of a number: long ones take minutes to read, or cannot be printed."""

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.2).

    It refuses a key that is given twice, endless brackets and numbers, and merge keys (``<<``) that repeat each other
    too often.
    """

    merged = 0

    def fetch_flow_collection_start(self, TokenClass: type) -> None:
        if self.flow_level > _DEPTH:  # the time grows with the square
            raise UserError(f"line {self.line + 1}: nested too deeply")
        super().fetch_flow_collection_start(TokenClass)

    def merged_mappings(self, node: yaml.Node) -> Iterator[dict]:
        """What a merge key names: a mapping, or several, the first of which wins."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for part in parts:
            found = self.construct_object(part, deep=True)
            if not isinstance(found, dict):
                raise UserError(f"line {node.start_mark.line + 1}: <<: the name of a mapping is expected, or several")
            self.merged += len(found)
            if self.merged > _VALUES:
                raise UserError(f"line {node.start_mark.line + 1}: <<: more than {_VALUES} values are no options")
            yield found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    own: dict = {}
    merged: dict = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            for part in loader.merged_mappings(value_node):
                merged = {**part, **merged}
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise UserError(f"line {line}: a key must be plain text (put quotes around values with braces)")
        if key in own:
            raise UserError(f"line {line}: the key {key!r} is given twice; remove one")
        own[key] = loader.construct_object(value_node, deep=True)
    return {**merged, **own}


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    if len(node.value) > _NUMBER:
        raise UserError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} characters is no option")
    kind = node.tag.rpartition(":")[2]
    return loader.construct_yaml_int(node) if kind == "int" else loader.construct_yaml_float(node)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_number)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML without python tags.

    Raises:
        UserError: naming ``where`` and the line.
    """
    if len(text) > _TEXT:
        raise UserError(f"{where}: more than {_TEXT} characters are no options")
    try:
        content = yaml.load(text, Loader=_Loader)
    except UserError as err:
        raise UserError(f"{where}: {err}") from err
    except yaml.constructor.ConstructorError as err:
        line = f", line {err.problem_mark.line + 1}" if err.problem_mark else ""
        raise UserError(f"{where}{line}: {err.problem}; only plain YAML is read, tags are refused") from err
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: no valid YAML: {getattr(err, 'problem', None) or err}") from err
    except RecursionError as err:
        raise UserError(f"{where}: no valid YAML: nested too deeply") from err
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as err:  # no date, number, letter
        raise UserError(f"{where}: no valid YAML: {err}") from err
    check_plain(content, where)
    return _copied(content)


def _copied(content: Any) -> Any:
    """A copy in which nothing is shared: what anchors repeat can be overridden in one place alone."""
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    return [_copied(value) for value in content] if isinstance(content, list) else content


def check_plain(content: Any, where: str) -> None:
    """Whether it may be walked through, written as JSON, and its numbers be computed with.

    Raises:
        UserError: for what is nested too deeply or, through anchors that repeat each other, too much; keys that are no
            text; NaN, infinite and very large numbers; texts with control characters.
    """

    def fault(place: tuple, message: str) -> None:
        raise UserError(f"{where}: option {printable(':'.join(map(str, place)))}: {message}")

    left, stack = _VALUES, [((), content)]
    while stack:
        place, value = stack.pop()
        inner: list = []
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    fault(place, f"the key {key!r} must be text: put quotes around it")
            inner = list(value.items())
        elif isinstance(value, (list, tuple)):
            inner = list(enumerate(value))
        elif not math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and abs(value) >= 2**63:
            fault(place, f"{value} is no number to compute with")
        elif isinstance(value, str) and printable(text := re.sub(r"[\n\t]", "", value)) != text:
            fault(place, f"{value!r} has control characters; remove them")
        left -= len(inner)
        if left < 0 or len(place) > _DEPTH:
            raise UserError(f"{where}: more than {_VALUES} values or {_DEPTH} levels, anchors counted, are no options")
        stack += [((*place, key), item) for key, item in inner]


def apply_overrides(opt: dict, entries: Optional[List[str]], where: str = "--force_yml") -> None:
    """Apply ``--force_yml a:b=value`` entries in place; values are YAML, missing levels are created.

    Raises:
        UserError: for an entry without '=', or a path through something that is no mapping.
    """
    for entry in entries or ():
        path, separator, value = entry.partition("=")
        keys = [key.strip() for key in path.split(":")]
        if not separator or not all(keys) or len(keys) > _DEPTH:
            raise UserError(f"{where} {entry!r}: write it as key:subkey=value")
        target = opt
        for depth, key in enumerate(keys[:-1]):
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
            if not isinstance(target, dict):
                raise UserError(f"{where} {entry!r}: {':'.join(keys[: depth + 1])} is no mapping")
        target[keys[-1]] = read_yaml(value, f"{where} {entry!r}")


def read_assignments(entries: List[str], where: str) -> Dict[str, Any]:
    """KEY=VALUE entries of the command line; values are YAML.

    Raises:
        UserError: for one without '=', or one that is no plain YAML.
    """
    result: Dict[str, Any] = {}
    apply_overrides(result, entries, where)
    return result


def read_yaml_file(path: str) -> dict:
    """A mapping from a file of plain YAML.

    Raises:
        UserError: if it is missing, no plain YAML, or no mapping.
    """
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise UserError(f"option file {path} cannot be read: it is no file, but a pipe or a device")
        with open(path, encoding="utf-8") as file:
            text = file.read(_TEXT + 1)
    except (OSError, ValueError) as err:
        raise UserError(
            f"option file {path} cannot be read: {getattr(err, 'strerror', None) or 'it is no text'}"
        ) from err
    raw = read_yaml(text, path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a mapping of options is expected")
    return raw


def read_options(path: str, above: Tuple[str, ...] = ()) -> dict:
    """An option file on top of the one that it names as ``_base_``, relative to its own folder (as in MMEngine).

    Mappings are merged; where both have a ``type`` and it differs, the file's own replaces that of the base.
    Nothing is checked yet.

    Raises:
        UserError: if a file cannot be read.
    """
    if os.path.realpath(path) in above:
        raise UserError(f"option file {path}: it is its own _base_")
    raw = read_yaml_file(path)
    base = raw.pop("_base_", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"{path}: _base_: the path of one option file is expected, got {base!r}")
    return _on_top(read_options(os.path.join(os.path.dirname(path), base), (*above, os.path.realpath(path))), raw)


def _on_top(base: dict, changes: dict) -> dict:
    if changes.get("type", base.get("type")) != base.get("type"):
        return changes
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _on_top(base[key], value) if both else value
    return merged


def option_text(path: str) -> str:
    """An option file as one that needs no other: as it is, or, where it names a ``_base_``, both merged."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if "_base_" not in read_yaml_file(path):
        return text
    return f"# {path} on top of its _base_\n{yaml.safe_dump(read_options(path), sort_keys=False)}"
