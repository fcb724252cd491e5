"""The layout's rules: what may import what, which names are public, and what an import costs.

docs/architecture.md describes the layout.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch

import flashbrush as fb
import flashbrush.integrations
import flashbrush.integrations.diffusers as diffusers_integration
from flashbrush import Stats, bindings

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("checkpoints", "kernels", "bindings", "integrations", "benchmarks")
# From the ground up. A file's floor is the longest matching prefix; it imports from its own and those below.
# Benchmarks are a leaf: only the root's __main__ is above them.
FLOORS = (
    "checkpoints",
    "kernels",
    "bindings/core",
    "bindings/backends",
    "bindings/operators",
    "bindings",
    "_moved_paths.py",
    "__init__.py",
    "integrations/diffusers/protocol",
    "integrations/diffusers/hosts",
    "integrations/diffusers",
    "integrations/methods/shared",
    "integrations/methods",
    "integrations/pipelines",
    "integrations",
    "integrations/tiny_fill",
    "integrations/evaluation",
    "integrations/cli",
    "benchmarks",
    "__main__.py",
)
# `flashbrush info` lists the instruction sets of the CPU library, which bindings have no public function for.
ALLOWED = (("integrations/cli/info.py", "bindings/backends/cpu/library.py"),)


def floor(place: str) -> int:
    """The floor's index; place: a module's file or a package's folder, from the root ("": the root)."""
    place = place or "__init__.py"
    return FLOORS.index(max((f for f in FLOORS if f"{place}/".startswith(f"{f}/")), key=len))


def own_files() -> list[str]:
    """The package's Python files, without those that only pytest reads."""
    files = [*ROOT.glob("_*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    names = sorted(path.relative_to(ROOT).as_posix() for path in files)
    return [name for name in names if not Path(name).name.startswith(("test_", "conftest"))]


def imports(place: str, source: str) -> list[tuple[int, str | None, str]]:
    """(line, imported place or None if outside the package, name) of every import in a file.

    Imports in functions and under TYPE_CHECKING count, and so do the relative names of a package that imports
    lazily.
    """
    tree = ast.parse(source, place)
    found: list[tuple[int, str | None, str]] = []

    def relative(line: int, dotted: str, name: str) -> None:
        module = dotted.lstrip(".")
        folder = Path(place).parents[len(dotted) - len(module) - 1] / module.replace(".", "/")
        for target in (folder / name, folder / f"{name}.py", folder, Path(f"{folder}.py")):
            if name and target.name and (ROOT / target).exists():
                found.append((line, "" if target == Path() else target.as_posix(), name))
                return
        found.append((line, "" if folder == Path() else folder.as_posix(), name))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, None, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.lineno, None, node.module or "")]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                relative(node.lineno, "." * node.level + (node.module or ""), alias.name)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            lazy = [
                n for n in ast.walk(tree) if isinstance(n, ast.Constant) and re.match(r"\.+\w", str(n.value))
            ]
            for name in lazy:
                relative(name.lineno, str(name.value), "")
            if not lazy and place != "_moved_paths.py":  # it imports by the names of its table
                found.append((node.lineno, None, ast.unparse(node)))
    return found


def violations(place: str, source: str) -> list[str]:
    wrong = []
    inside = place.split("/")[0]
    for line, target, name in imports(place, source):
        if target is None:
            if name.split(".")[0] in ("flashbrush", *FOLDERS) or "(" in name:
                wrong.append(f"{place}:{line}: {name} is not imported relatively")
        elif floor(target) > floor(place):
            wrong.append(f"{place}:{line}: {name} of {target or 'the package'} is on a higher floor")
        elif inside == "kernels" and not target.startswith("kernels/"):
            wrong.append(f"{place}:{line}: {name} of {target}: kernels import nothing of ours")
        elif (
            (place, target) not in ALLOWED and inside == "integrations" and not allowed_outside(target, name)
        ):
            wrong.append(f"{place}:{line}: {name} of {target} is not a public name of bindings")
    return wrong


def allowed_outside(target: str, name: str) -> bool:
    if target.startswith("kernels"):
        return False
    return not target.startswith("bindings") or name in bindings.__all__


def test_imports_go_to_the_same_floor_or_below() -> None:
    files = own_files()
    assert {Path(file).parts[0] for file in files} >= set(FOLDERS)
    assert not [line for file in files for line in violations(file, (ROOT / file).read_text())]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("kernels/a.py", "from ..bindings.problem import Problem"),
        ("kernels/a.py", "from .. import __version__"),
        ("bindings/backends/a.py", "from ..attention import attention"),
        ("bindings/backends/a.py", "from .. import attention"),
        ("bindings/core/problem.py", "from ..backends import Result"),
        ("bindings/backends/a.py", "from ..operators.attention import solve"),
        ("bindings/a.py", "def f():\n    from ..integrations.diffusers import apply"),
        ("bindings/a.py", "from ..benchmarks.cases import shapes"),
        ("bindings/a.py", "from .. import merge"),
        ("bindings/a.py", "import flashbrush"),
        ("bindings/a.py", "from kernels.attention import forward"),
        ("integrations/diffusers/apply.py", "from ..methods import InContextBrush"),
        ("integrations/diffusers/apply.py", "from .. import InContextBrush"),
        ("integrations/diffusers/apply.py", "from ...bindings.core.problem import Problem"),
        ("integrations/diffusers/apply.py", "from ...bindings.core import problem"),
        ("integrations/diffusers/protocol/a.py", "from ..hosts.host import Host"),
        ("integrations/diffusers/hosts/a.py", "from ..apply import apply"),
        ("integrations/methods/a.py", "from ...kernels.segments import dot"),
        ("integrations/methods/a.py", "from ..pipelines import InContextBrushPipeline"),
        ("integrations/methods/shared/a.py", "from ..ip_adapter import IPAdapter"),
        ("integrations/diffusers/__init__.py", "import_module('..methods', __name__)"),
        ("integrations/pipelines/a.py", "from ...benchmarks.cases import shapes"),
        ("integrations/cli/main.py", "from ...benchmarks.cpu.table import main"),
        ("integrations/a.py", "importlib.import_module(name)"),
        ("integrations/a.py", "from flashbrush.bindings import attention"),
    ],
)
def test_forbidden_imports_are_found(place: str, line: str) -> None:
    assert violations(place, line)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("kernels/attention/a.py", "from ..segments import dot"),
        (
            "bindings/backends/a.py",
            "from ...kernels.attention import forward\nfrom ..core.problem import Problem",
        ),
        ("bindings/a.py", "from .operators import attention\nfrom .backends import planner"),
        (
            "integrations/methods/a.py",
            "from ...bindings import Control\nfrom ..diffusers.protocol.plan import Plan",
        ),
        ("integrations/__init__.py", "import_module('.methods', __name__)"),
        ("integrations/cli/a.py", "from ..pipelines import InContextBrushPipeline"),
        ("benchmarks/a.py", "from ..bindings.backends.triton import launch"),
        ("__main__.py", "from .benchmarks.cpu.table import main"),
    ],
)
def test_permitted_imports_are_not_reported(place: str, line: str) -> None:
    assert not violations(place, line)


def test_a_backend_imports_no_other_backend() -> None:
    packages = {"composed", "cpu", "cuda", "triton", "reference.py"}
    wrong = []
    for file in own_files():
        parts = file.split("/")
        if parts[:2] != ["bindings", "backends"] or parts[2] not in packages:
            continue
        for line, target, name in imports(file, (ROOT / file).read_text()):
            used = (target or "").split("/")
            if used[:2] == parts[:2] and len(used) > 2 and used[2] in packages - {parts[2]}:
                wrong.append(f"{file}:{line}: {name} of {target}")
    assert not wrong


def file_of(target: str) -> str | None:
    """The file that importing a place executes; None for a folder without an __init__.py."""
    for file in (target, f"{target}.py", f"{target}/__init__.py".lstrip("/")):
        if file.endswith(".py") and (ROOT / file).is_file():
            return file
    return None


def test_no_circle_of_files() -> None:
    """Imports in functions and under TYPE_CHECKING count."""
    uses = {}
    for file in own_files():
        found = imports(file, (ROOT / file).read_text())
        uses[file] = {used for _, target, _ in found if target is not None and (used := file_of(target))} - {
            file
        }
    # Remove files that use none of the rest until there is none; what remains is in a circle or uses one.
    while removable := [file for file, used in uses.items() if not used & uses.keys()]:
        for file in removable:
            del uses[file]
    assert not uses


METHODS = sorted(path.stem for path in (ROOT / "integrations/methods").glob("[a-z]*.py"))
WITHOUT_METHODS = ("integrations/diffusers/protocol", "integrations/diffusers/hosts", "kernels", "csrc")


def without_comments(source: str, suffix: str) -> str:
    """The code alone: comments and docstrings may cite the paper a formula comes from."""
    if suffix != ".py":
        return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.S)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)  # which drops comments


def methods_named(source: str, suffix: str) -> list[str]:
    code = without_comments(source, suffix)
    return [m for m in METHODS if re.search(m.replace("_", "[ _-]?"), code, re.I)]


def test_protocol_hosts_and_kernels_name_no_method() -> None:
    files = [path for folder in WITHOUT_METHODS for path in (ROOT / folder).rglob("*")]
    files = [path for path in files if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    named = {str(path): methods_named(path.read_text(), path.suffix) for path in files}
    assert len(METHODS) > 10 and len(files) > 40
    assert not {path: names for path, names in named.items() if names}


@pytest.mark.parametrize(
    ("source", "suffix", "expected"),
    [
        ("from ..methods.masa_ctrl import MasaCtrl", ".py", ["masa_ctrl"]),
        ("if method.name == 'in-context brush': pass", ".py", ["in_context_brush"]),
        ('def f():\n    """In-Context Brush, Eq. 6"""\n    # MasaCtrl', ".py", []),
        ("void ip_adapter_forward();", ".cpp", ["ip_adapter"]),
        ("// IP-Adapter\n/* KV-Edit\n */ int x;", ".cpp", []),
    ],
)
def test_names_of_methods_are_found_in_code_only(source: str, suffix: str, expected: list[str]) -> None:
    assert methods_named(source, suffix) == expected


def test_tests_import_the_package_by_its_name() -> None:
    """A root module imported under another name would register the operators a second time."""
    wrong = []
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("test_*.py")]:
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if not node.level else [""] * (node.level > depth)
            wrong += [f"{path}: {name}" for name in names if name.split(".")[0] in ("", *FOLDERS)]
    assert not wrong


# Public names

NAMES = {
    "Branch": "q k v control gate scale source",
    "Contrast": "beta clip",
    "Control": "rows keys bias weight gain head_gain groups gates contrast valid",
    "HeadGain": "rows keys span floor norm apply_to",
    "Segments": "lengths named",
    "Stats": "lse mass gain",
    "adain": "x style mask style_mask backend",
    "attention": "q k v control scale source mask backend out return_stats",
    "attention_sum": "branches out",
    "backends": "",
    "blend_latents": "generated source noise mask sigma backend",
    "column_mass": "q k lse control scale source rows backend",
    "key_probabilities": "q k lse keys control scale source",
    "merge": "parts",
    "qk_norm_rope": "streams cos sin eps rope permutation backend",
    "query_blur": "q grid sigma tokens backend",
}


def has_docstring(thing: object) -> bool:
    """True for a docstring that was written: dataclasses and named tuples make one of their signature."""
    text = (inspect.getdoc(thing) or "").strip()
    return len(text) > 20 and not text.startswith((f"{getattr(thing, '__name__', '')}(", "Alias for field"))


def test_the_package_has_the_public_names_and_no_others() -> None:
    assert set(fb.__all__) == {*NAMES, "__version__", "tiny_fill"}
    assert set(bindings.__all__) == set(NAMES)
    assert all(getattr(fb, name) is getattr(bindings, name) for name in NAMES)
    assert fb.__all__ == sorted(fb.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_public_names(name: str) -> None:
    assert list(inspect.signature(getattr(fb, name)).parameters) == NAMES[name].split()


@pytest.mark.parametrize(
    ("module", "name"),
    [(fb, name) for name in (*NAMES, "tiny_fill")]
    + [(flashbrush.integrations, name) for name in flashbrush.integrations.__all__]
    + [(diffusers_integration, name) for name in diffusers_integration.__all__],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_public_names_have_docstrings(module: object, name: str) -> None:
    thing = getattr(module, name)
    assert has_docstring(thing)
    methods = {
        key: value
        for key, value in (vars(thing) if inspect.isclass(thing) else {}).items()
        if not key.startswith("_") and isinstance(value, property | staticmethod | classmethod | FunctionType)
    }
    for protocol in ("plan", "attach"):  # which the class `Method` describes
        methods.pop(protocol, None)
    assert not [key for key, value in methods.items() if not has_docstring(getattr(value, "__func__", value))]


def test_missing_docstrings_are_found() -> None:
    assert not has_docstring(type("Bare", (), {}))
    assert not has_docstring(type("Record", (), {"__doc__": "Record(a: int, b: int) -> None"}))
    assert not has_docstring(Stats.lse)


def test_integrations_have_their_public_names() -> None:
    pipelines = {"InContextBrushPipeline", "VisualICLPipeline", "AppearanceTransferPipeline"}
    assert {"InContextBrush", *pipelines} <= set(flashbrush.integrations.__all__)
    names = {"FluxControlledAttnProcessor", "Handle", "Layer", "Method", "Plan", "Step", "apply"}
    assert names <= set(diffusers_integration.__all__)
    with pytest.raises(AttributeError, match="NoSuchName"):
        flashbrush.integrations.NoSuchName  # noqa: B018


OPERATORS = "attention attention_out attention_backward qk_norm_rope blend_latents adain query_blur"


@pytest.mark.parametrize("name", OPERATORS.split())
def test_operators_are_registered(name: str) -> None:
    assert isinstance(getattr(torch.ops.flashbrush, name), torch._ops.OpOverloadPacket)


# The cost of an import

HEAVY = (
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "triton",
    "PIL",
    "matplotlib",
    "typer",
    "torch._inductor",
)
IMPORT = """
import sys, time
import torch
before = set(sys.modules)
started = time.perf_counter()
import {module}
seconds = time.perf_counter() - started
print(seconds, *sorted(set(sys.modules) - before))
"""


def import_alone(module: str) -> tuple[float, set[str]]:
    """(seconds, modules) that an import takes in addition to torch's, in a new interpreter."""
    code = IMPORT.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    seconds, *modules = done.stdout.split()
    return float(seconds), set(modules)


def heavy_ones(modules: set[str]) -> list[str]:
    return [m for m in modules if any(m == name or m.startswith(f"{name}.") for name in HEAVY)]


def test_import_takes_under_two_seconds_and_nothing_heavy() -> None:
    seconds, modules = import_alone("flashbrush")
    assert "flashbrush.bindings.attention" in modules
    assert not heavy_ones(modules)
    assert min([seconds, *(import_alone("flashbrush")[0] for _ in range(2 * (seconds > 2.0)))]) < 2.0


@pytest.mark.parametrize("module", ["flashbrush.integrations", "flashbrush.integrations.diffusers"])
def test_integrations_import_diffusers_only_when_used(module: str) -> None:
    assert not heavy_ones(import_alone(module)[1])


# Hugging Face's package called kernels


def test_kernels_folder_does_not_shadow_the_package_of_that_name(tmp_path: Path) -> None:
    """diffusers imports it; it must be found when the root is the working directory."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; assert kernels.theirs"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
