"""Imports go down only, as the map in the package's docstring says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "chatglm"
NO_TORCH = ("errors", "settings", "prompts", "strategies")
FLOOR_LINE = re.compile(r"^ {4}(\d+)('?) +\S")
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} | {
    "data_utils", "models", "train", "infer", "infer_finetuning", "infer_lora_finetuning",
    "infer_api", "evaluate",
}  # fmt: skip


def read_map():
    """{module or folder: floor} from the indented lines of chatglm/__init__.py's docstring.

    A floor's line is its number, what it is about, two spaces or more, and its modules; the
    lines that go on with it are indented as deep as its modules.
    """
    floors, floor, depth = {}, None, None
    for line in ast.get_docstring(ast.parse(PACKAGE.joinpath("__init__.py").read_text())).split(
        "\n"
    ):
        started = FLOOR_LINE.match(line)
        if started:
            floor = int(started.group(1))
            about = re.match(r"^ {4}\d+'? +\S.*? {2,}", line)
            depth = about.end()
            names = line[depth:]
        elif floor is not None and line.startswith(" " * (depth or 1)):
            names = line[depth:]
        else:
            floor, names = None, ""
        for name in names.split():
            assert name not in floors, f"{name} stands in the map twice"
            floors[name] = floor
    return floors


FLOORS = read_map()


def place(parts):
    """The name under which a module, ('quantization', 'linear') say, stands in the map."""
    for length in range(len(parts), 0, -1):
        for joint in (".", "/"):
            if joint.join(parts[:length]) in FLOORS:
                return joint.join(parts[:length])
    return None


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path):
    """Full names of everything a file imports, at its top and inside functions alike."""
    package = ("chatglm", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import_call(node):
            yield tuple(node.args[0].value.split("."))


def _is_import_call(node):
    name = getattr(node.func, "attr", getattr(node.func, "id", None))
    constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
    return name in ("import_module", "__import__") and constant


def named(path):
    return str(path.relative_to(PACKAGE))


def test_the_map_is_read_whole():
    assert FLOORS["errors"] == 0
    assert FLOORS["quantization"] == FLOORS["loss"] == FLOORS["cache"]
    assert FLOORS["errors"] < FLOORS["loss"] < FLOORS["model"]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_stands_in_the_map(path):
    parts = module_of(path)
    assert not parts or place(parts), f"{'.'.join(parts)} is missing in chatglm/__init__.py"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_go_down_only(path):
    here = place(module_of(path))
    for target in imports_of(path):
        if target[0] == "chatglm":
            there = place(target[1:])
            assert there, f"{named(path)} imports {'.'.join(target)}, which is not in the map"
            assert FLOORS[there] <= FLOORS[here], f"{named(path)} imports {there}, floors above"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_module_imports_a_script(path):
    assert not [target for target in imports_of(path) if target[0] in SCRIPTS]


@pytest.mark.parametrize("name", NO_TORCH)
def test_words_and_rules_import_no_torch(name):
    path = PACKAGE / f"{name}.py"
    if path.exists():
        assert not {target[0] for target in imports_of(path)} & {"torch", "transformers"}


def test_the_package_itself_imports_nothing():
    assert not list(imports_of(PACKAGE / "__init__.py"))
