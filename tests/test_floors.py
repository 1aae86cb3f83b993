"""Imports go down only, as the map in the package's docstring says; each library has its doors."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "chatglm"
FLOOR_LINE = re.compile(r"^ {4}(\d+)('*) +\S.*? {2,}")
RESOLVED = re.compile(r"([a-z_]\w*(?:\.\w+)*):[A-Z]\w*")  # what pkgutil.resolve_name imports
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPT_FILES = sorted(ROOT.glob("*.py"))
SCRIPTS = {path.stem for path in SCRIPT_FILES}

ANYWHERE = {"torch", "numpy"}
DOORS = {
    "bitsandbytes": "quantization optim",
    "deepspeed": "sharding",
    "fastapi": "serving",
    "filelock": "data_utils.py",
    "google_crc32c": "records",
    "huggingface_hub": "weights",
    "jieba": "scores",
    "jsonargparse": "command_line",
    "lmdb": "records",
    "lightning": "sharding training callbacks trainer",
    "matplotlib": "callbacks pictures",
    "modelscope": "weights",
    "nltk": "scores",
    "orjson": "sources serving",
    "peft": "tuning",
    "prometheus_client": "serving",
    "psutil": "serving",
    "pyarrow": "sources",
    "pydantic": "serving",
    "pytorch_optimizer": "optim",
    "ray": "ray_workers serving",
    "rouge_chinese": "scores",
    "rich": "showing data_utils.py",
    "safetensors": "weights tuning saved checkpoints callbacks old_files conversion",
    "sentencepiece": "pieces tokenizer",
    "starlette": "serving",
    "tqdm": "evaluation builder data_utils.py",
    # The model is one of transformers'; beside it: the schedules in optim.
    "transformers": "tokenizer configuration cache paged_cache quantization sampling decoding chat"
    " model weights optim serving",
    "uvicorn": "infer_api.py",
    "yaml": "command_line",
}
"""Where each outside library is imported: modules, folders and scripts."""


def read_map():
    """{module or folder: (floor, primes)} from the docstring of chatglm/__init__.py.

    A floor's line is its number, what it is about, two spaces or more, and its modules; the
    lines that go on with it are indented as deep as its modules.
    """
    floors, floor, depth = {}, None, None
    text = ast.get_docstring(ast.parse(PACKAGE.joinpath("__init__.py").read_text()))
    for line in text.split("\n"):
        started = FLOOR_LINE.match(line)
        if started:
            floor, depth = (int(started[1]), started[2]), started.end()
        elif floor is None or not line.startswith(" " * depth):
            floor = None
            continue
        for name in line[depth:].split():
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
    """Full names of everything a file imports, at its top, inside functions and by its name."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import_call(node):
            yield tuple(node.args[0].value.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            resolved = RESOLVED.fullmatch(node.value)
            if resolved:
                yield tuple(resolved[1].split("."))


def _is_import_call(node):
    name = getattr(node.func, "attr", getattr(node.func, "id", None))
    constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
    return name in ("import_module", "__import__") and constant


def own_imports(path):
    """Where in the map the modules of the package that a file imports stand."""
    return {place(target[1:]) for target in imports_of(path) if target[0] == "chatglm"}


def outside_imports(path):
    """The outside libraries that a file imports."""
    known = {"chatglm", *SCRIPTS, *sys.stdlib_module_names}
    return {target[0] for target in imports_of(path)} - known


def door(path):
    """The name of a file in DOORS."""
    return place(module_of(path)) if PACKAGE in path.parents else path.name


def named(path):
    return str(path.relative_to(ROOT))


def test_the_map_is_read_whole():
    assert FLOORS["errors"] == (0, "")
    assert FLOORS["quantization"] == FLOORS["loss"] == FLOORS["cache"]
    assert FLOORS["errors"] < FLOORS["loss"] < FLOORS["model"]
    assert FLOORS["training"][0] == FLOORS["evaluation"][0]
    assert FLOORS["training"] != FLOORS["evaluation"]


def test_the_map_names_what_there_is():
    there = {place(module_of(path)) for path in SOURCES if module_of(path)}
    assert there == FLOORS.keys()


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_stands_in_the_map(path):
    parts = module_of(path)
    assert not parts or place(parts), f"{'.'.join(parts)} is missing in chatglm/__init__.py"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_go_down_only(path):
    here = place(module_of(path))
    for there in own_imports(path):
        assert there, f"{named(path)} imports from chatglm what is not in the map"
        below = FLOORS[there][0] < FLOORS[here][0]
        assert below or FLOORS[there] == FLOORS[here], (
            f"{named(path)} imports {there}, above or beside its floor"
        )


def test_no_module_imports_itself_by_way_of_others():
    files = {module_of(path): path for path in SOURCES}
    graph = {}
    for module, path in files.items():
        targets = [target[1:] for target in imports_of(path) if target[0] == "chatglm"]
        # A target is a module, or a module and a name in it.
        graph[module] = {target if target in files else target[:-1] for target in targets}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_module_imports_a_script(path):
    assert not [target for target in imports_of(path) if target[0] in SCRIPTS]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_words_and_rules_import_no_torch(path):
    if FLOORS.get(place(module_of(path))) == (0, ""):
        assert "torch" not in outside_imports(path)


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPT_FILES], ids=named)
def test_an_outside_library_comes_in_by_its_doors(path):
    for library in outside_imports(path) - ANYWHERE:
        doors = DOORS.get(library, "").split()
        assert door(path) in doors, f"{named(path)} imports {library}; its doors: {doors}"


def test_every_door_is_used():
    used = {
        (lib, door(path)) for path in [*SOURCES, *SCRIPT_FILES] for lib in outside_imports(path)
    }
    stated = {(library, name) for library, doors in DOORS.items() for name in doors.split()}
    assert stated - used == set()


def test_the_package_itself_imports_nothing():
    assert not list(imports_of(PACKAGE / "__init__.py"))
