"""From the edited dicts, a file and the flags to typed settings; and how a script ends.

Later wins: the defaults in settings.py < the dicts in data_utils.py and models.py < `--config FILE`
< flags. A key is spelled the same in all of them and in the settings.json that a run saves.
jsonargparse does the reading; unknown names are refused with the nearest known one.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

import jsonargparse
import yaml

from .errors import ToolkitError, nearest

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse_settings(
    groups: Sequence[tuple[type, dict[str, Any], str]],
    argv: Sequence[str] | None,
    *,
    description: str,
) -> list[Any]:
    """One instance of each group's class, from its edited dict, `--config` and the flags.

    groups: (dataclass, edited values, where they stand). argv: None for the command line.

    Raises:
        ToolkitError: for an unknown name (with the nearest known one) or a value of a wrong type.
    """
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings")
    known: list[str] = []
    for group, edited, where in groups:
        names = [_full_name(group, field.name) for field in dataclasses.fields(group)]
        _refuse_unknown([_full_name(group, key) for key in edited], names, where)
        parser.add_class_arguments(group, _section(group) or None, help=group.__doc__)
        known += names
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments = _spell_out_true(arguments, groups)
    _check_arguments(arguments, known)
    try:
        for group, edited, _ in groups:  # defaults aren't checked for their types, arguments are
            full = {_full_name(group, key): value for key, value in edited.items()}
            parser.parse_args([_as_flag(name, value) for name, value in full.items()])
            parser.set_defaults(full)
        parsed = parser.parse_args(_files_first(arguments))
        parser.validate(parsed)
    except (jsonargparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        if "Expected a <class 'list'>" in reason:
            reason += """; give a list, '["a", "b"]', or add to it: --NAME+ a"""
        raise ToolkitError(reason) from None
    return [_instance(group, parsed.as_dict()) for group, _, _ in groups]


def _section(group: type) -> str:
    """The name of the dict that a group's settings stand in, or "" for the top level."""
    return getattr(group, "section", "")


def _full_name(group: type, name: str) -> str:
    return f"{_section(group)}.{name}".removeprefix(".")


def _instance(group: type, values: dict[str, Any]) -> Any:
    own = values[_section(group)] if _section(group) else values
    _refuse_null(group, own)
    return group(**{field.name: own[field.name] for field in dataclasses.fields(group)})


def _spell_out_true(
    arguments: list[str], groups: Sequence[tuple[type, dict[str, Any], str]]
) -> list[str]:
    """`--flag` alone means true where the setting is one of true and false."""
    switches = {
        f"--{_full_name(group, name)}"
        for group, _, _ in groups
        for name, kind in get_type_hints(group).items()
        if bool in (kind, *get_args(kind))
    }
    return [
        f"{argument}=true" if argument in switches and after.startswith("--") else argument
        for argument, after in itertools.pairwise([*arguments, "--"])
    ]


def _as_flag(name: str, value: Any) -> str:
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def _refuse_null(group: type, values: dict[str, Any]) -> None:
    hints = get_type_hints(group)
    for item in dataclasses.fields(group):
        if values[item.name] is None and type(None) not in get_args(hints[item.name]):
            name = _full_name(group, item.name)
            raise ToolkitError(f"{name}: null is not allowed; expected {item.type}")


def _files_first(arguments: list[str]) -> list[str]:
    """--config and its value before the flags, which then win wherever they stand."""
    files: list[str] = []
    flags: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            files += [argument, *[value for value in [next(rest, None)] if value is not None]]
        else:
            (files if argument.startswith("--config=") else flags).append(argument)
    return files + flags


def _refuse_unknown(keys: Any, known: list[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise ToolkitError(f"{where}: unknown setting {key!r}.{nearest(str(key), known)}")


def _check_arguments(arguments: list[str], known: list[str]) -> None:
    # `--name+ value` appends to a list.
    flags = [a[2:].split("=")[0].removesuffix("+") for a in arguments if a.startswith("--")]
    _refuse_unknown(flags, [*known, "config", "help", "print_config"], "command line")
    for position, argument in enumerate(arguments):
        if argument.split("=")[0] != "--config":
            continue
        path = argument.partition("=")[2] or (arguments[position + 1 : position + 2] or [""])[0]
        try:
            with open(path, encoding="utf-8") as file:
                content = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ToolkitError(f"--config {path}: cannot be read as YAML ({reason})") from None
        if not isinstance(content, dict):
            raise ToolkitError(f"--config {path}: expected `name: value` lines")
        _refuse_unknown(_flat(content, known), known, path)


def _flat(content: dict[Any, Any], known: list[str]) -> list[str]:
    """The full names in a file: `section.name` for what stands in a section."""
    sections = {name.partition(".")[0] for name in known if "." in name}
    names: list[str] = []
    for key, value in content.items():
        inside = isinstance(value, dict) and key in sections
        names += [f"{key}.{name}" for name in value] if inside else [str(key)]
    return names


def run_script(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script's main; a user's mistake is one line and exit code 2."""
    try:
        main(None)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
