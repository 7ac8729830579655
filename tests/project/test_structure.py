"""The shape of the code: which package may import which, sizes of files and functions, what must not be there."""

import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train.py", "generate.py", "evaluate.py")

LEVELS = {
    "errors": 0,
    "files": 1,
    "versions": 1,
    "downloads": 1,
    "patience": 1,
    "results": 1,
    "choices": 0,
    "pulse": 0,
    "secrets": 0,
    "config": 2,
    "launch": 3,
    "kernels": 3,
    "parallel": 3,
    "data": 3,
    "watch": 4,
    "model": 4,
    "checkpoint": 5,
    "training": 6,
    "inference": 6,
    "evaluation": 7,
    "quickstart": 8,
}
"""A package may import those of lower levels and itself; packages of one level do not import each other."""

MOST_LINES = 400
"""Of a file."""

OUTERMOST_LINES = 600
"""Of the very longest."""


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        importer, imported: dotted names.
        at_start: it happens when the importer is imported, not inside a function.
        for_types: it is under `if TYPE_CHECKING`.
        line: of the statement.
    """

    importer: str
    imported: str
    at_start: bool
    for_types: bool
    line: int


def tracked(*suffixes: str) -> list[Path]:
    """Files that git tracks or would track, by suffix."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        skipped = (".venv", "build", "dist", "quickstart_run")
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if not set(skipped) & set(p.parts) and p.is_file()]
    return [ROOT / name for name in names if name.endswith(suffixes) and (ROOT / name).is_file()]


def code() -> list[Path]:
    """Python files of the project."""
    return tracked(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    found = {}
    for path in code():
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "neox":
            parts = relative.with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str) -> Iterator[Import]:
    """Every import of our own package in a module."""
    yield from _imports(tree_of(modules()[name]), name, at_start=True, for_types=False)


def _imports(node: ast.AST, importer: str, *, at_start: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        for imported in _imported(child):
            yield Import(importer, imported, at_start, for_types, child.lineno)
        yield from _imports(child, importer, at_start=at_start and not inside, for_types=for_types or types)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.split(".")[0] == "neox"]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"line {node.lineno}: imports are absolute here"
    if node.module is None or node.module.split(".")[0] != "neox":
        return []
    # `from neox.config import load_config` imports a name, `from neox.config import keys` a module
    inner = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in modules() else node.module for name in inner]


def package(name: str) -> str:
    """`neox.model.loss` -> `model`; empty for `neox` itself."""
    return name.split(".")[1] if "." in name else ""


def test_every_package_has_its_place() -> None:
    found = {package(name) for name in modules()} - {""}
    assert found <= LEVELS.keys(), f"say in LEVELS what may import {found - LEVELS.keys()}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_one_way(name: str) -> None:
    own = package(name)
    for found in imports_of(name):
        other = package(found.imported)
        if other in (own, ""):
            continue
        allowed = LEVELS[other] < LEVELS[own]
        assert allowed, f"{name}:{found.line} imports {found.imported}: {own} must not know {other}"


def test_no_circle() -> None:
    graph = {
        name: {i.imported for i in imports_of(name) if i.at_start and not i.for_types} - {name} for name in modules()
    }
    # A package's __init__ gathers its modules; a module that imports a sibling runs it, but asks it for nothing.
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, "a circle: " + " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ)


def test_import_is_silent_and_light() -> None:
    # Processor time, as a loaded machine stretches the clock; numpy alone would take longer than this.
    program = (
        "import resource, sys\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_utime\n"
        "import neox\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before\n"
        "assert used < 0.05, used\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(program)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    "name", ["neox.config", "neox.launch.main", "neox.launch.local", "neox.launch.environment", "neox.checkpoint.load"]
)
def test_works_before_torch(name: str) -> None:
    heavy = "{'torch', 'deepspeed', 'megatron', 'transformers', 'numpy'}"
    done = run_python(f"import sys, {name}\nprint(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]"


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    # neox.config reads YAML in a fraction of a second; its modules may not even mention torch.
    for name, path in modules().items():
        if package(name) in ("config", "launch", "errors"):
            for node in ast.walk(tree_of(path)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                roots = {n.split(".")[0] for n in names}
                assert not roots & {"torch", "deepspeed", "megatron", "numpy"}, f"{name}:{node.lineno}"


def test_results_are_printed_by_name() -> None:
    """`print` is for what goes elsewhere than to standard output, and says where."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*modules().values(), *(ROOT / name for name in SCRIPTS), *(ROOT / "tools").rglob("*.py")]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if "file" not in {keyword.arg for keyword in node.keywords}
    ]
    assert found == []


HELP = """
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], path.rpartition("/")[0]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    heavy = {"torch", "deepspeed", "transformers", "numpy", "pydantic", "yaml"} & sys.modules.keys()
    assert "usage: " in shown.getvalue() and not heavy, (path, heavy)
"""


def test_help_waits_for_no_library() -> None:
    """Of every script, in one interpreter: what one has imported another finds."""
    scripts = [ROOT / name for name in SCRIPTS] + sorted((ROOT / "tools").rglob("*.py"))
    command = [sys.executable, "-c", HELP, *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_training_needs_deepspeed() -> None:
    """The modules that tools, generation and evaluation run with do not import it, unlike those that build engines."""
    names = ("checkpoint", "data", "evaluation", "inference", "launch", "model", "parallel", "watch")
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    program += "assert 'deepspeed' not in sys.modules"
    found = [name for name in modules() if package(name) in names and not name.endswith(".__main__")]
    command = [sys.executable, "-c", program, "neox.training.vocabulary", *found]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_short() -> None:
    sizes = {str(path.relative_to(ROOT)): lines_of(path) for path in code()}
    longest = {name: size for name, size in sizes.items() if size > OUTERMOST_LINES}
    assert not longest, f"longer than {OUTERMOST_LINES} lines: {longest}"
    long = {name: size for name, size in sizes.items() if size > MOST_LINES}
    assert not long, f"longer than {MOST_LINES} lines: {long}"


def test_scripts_are_thin() -> None:
    assert {name: lines_of(ROOT / name) for name in SCRIPTS if lines_of(ROOT / name) > 60} == {}


@cache
def functions() -> dict[str, int]:
    """Lines of every function of the package, by place; nested ones count in their own right."""
    found = {}
    for path in modules().values():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found[place] = node.end_lineno - node.lineno + 1
    return found


def test_functions_are_short() -> None:
    sizes = functions()
    assert {place: size for place, size in sizes.items() if size > 100} == {}
    assert statistics.median(sizes.values()) <= 12
    short = sum(size < 50 for size in sizes.values()) / len(sizes)
    assert short >= 0.95, f"{short:.1%} of functions are shorter than 50 lines"


def test_nothing_is_called_utils() -> None:
    vague = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert {name for name in modules() if vague & set(name.split("."))} == set()


def test_nothing_is_left_to_do() -> None:
    # Put together here, so that this file does not find itself.
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked(".py", ".md", ".yml", ".toml", "Makefile", "Dockerfile")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if marks.search(line)
    ]
    assert found == []


def test_no_path_of_one_machine() -> None:
    machine = re.compile(
        r"(?<![\w.~-])/(?:" + "|".join(("work", "home", "root", "Users", "mnt", "scratch")) + r")/[\w.]"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked(".py", ".md", ".yml", ".yaml", ".toml", ".txt", "Makefile", ".json", ".sh", "run")
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1)
        if machine.search(line[:2000])
    ]
    assert found == []


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, path in modules().items() if not ast.get_docstring(tree_of(path))]
    assert silent == []


def test_nothing_happens_at_import() -> None:
    """Modules of the package hold definitions; a statement that calls something belongs into a function."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.If,
    )
    found = []
    for name, path in modules().items():
        for node in tree_of(path).body:
            documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not isinstance(node, allowed) and not documents:
                found.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.If) and not re.search("TYPE_CHECKING|__name__", ast.unparse(node.test)):
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in code() if path.name.startswith("test_")]
    assert {name for name in names if names.count(name) > 1} == set()


def test_license_and_version() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:400]
    done = run_python("import neox\nprint(neox.__version__)")
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d*)?", done.stdout.strip())
