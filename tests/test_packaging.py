"""What the source distribution and the wheel hold, builds with poor compilers, and a renamed clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

import flashbrush as fb

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("checkpoints", "kernels", "bindings", "integrations", "benchmarks")
ROOT_MODULES = ("__init__.py", "__main__.py", "_moved_paths.py")
FILES = (*ROOT_MODULES, "py.typed", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILT = ("libflashbrush_cpu.so", "build_report.json")
CUDA_BUILT = "libflashbrush_cuda.so"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
# Knows no AVX: an instruction set that the compiler cannot do must be left out. One is also quicker to build.
OLD_COMPILER = """#!/bin/sh
case "$*" in *-mavx*) echo "error: unrecognized command-line option '-mavx'"; exit 1;; esac
exec {compiler} "$@" -O0
"""

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def copy_tree(target: Path, *more: str) -> Path:
    """A clone's files that packaging may see, and files that collect beside them and must not be packaged."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", *BUILT, CUDA_BUILT)
    for folder in (*FOLDERS, "csrc", *more):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for file in FILES:
        shutil.copy(ROOT / file, target / file)
    strays = (
        "scratch.py",
        "conftest.py",
        "photo.png",
        "notes.txt",
        "data/__init__.py",
        "demo/result.png",
        "venv/lib/module.py",
        "bindings/notes.txt",
        "bindings/old/module.py",
        "kernels/__pycache__/segments.pyc",
        *(f"bindings/backends/{name}" for name in BUILT),
    )
    for stray in strays:
        (target / stray).parent.mkdir(parents=True, exist_ok=True)
        (target / stray).write_text("stray")
    return target


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Runs this interpreter in `folder`; returns its output, which a failure shows."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH", "FLASHBRUSH_SANITIZE")}
    kept["NVCC"] = ""  # nvcc takes half a minute; the CUDA library has a test of its own
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=kept | environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def install(what: Path, target: Path, **environment: str) -> str:
    quiet = ["-q", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    return run(
        ["-m", "pip", "install", *quiet, "--target", str(target), str(what)], target.parent, **environment
    )


def last_line_with(site: Path, code: str) -> str:
    """The last line that `code` prints when flashbrush is imported from the folder `site`."""
    where = "import flashbrush, pathlib; print(pathlib.Path(flashbrush.__file__).resolve().parent)\n"
    lines = run(["-c", where + code], site.parent, PYTHONPATH=str(site)).splitlines()
    assert lines[0] == str((site / "flashbrush").resolve())
    return lines[-1]


# What is in the distributions


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Iterator[Path]:
    """A folder with a source distribution and the wheel built from it by a compiler that knows no AVX."""
    folder = tmp_path_factory.mktemp("dist")
    compiler = folder / "c++"
    compiler.write_text(OLD_COMPILER.format(compiler=COMPILER))
    compiler.chmod(0o755)
    tree = copy_tree(folder / "tree")
    run(["-m", "build", "--no-isolation", "-o", str(folder), str(tree)], folder, CXX=str(compiler))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    [path] = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"{dist_info()}/METADATA").decode())


def dist_info() -> str:
    return f"flashbrush-{fb.__version__}.dist-info"


def relative_names(paths) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in paths}


def modules() -> set[str]:
    """The package's Python files, without those that only pytest reads."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files = [path for path in files if not path.name.startswith(("test_", "conftest"))]
    return relative_names(files) | set(ROOT_MODULES)


def data() -> set[str]:
    """The package's other files: the type marker, model weights and benchmark results."""
    weights = (path for path in (ROOT / "checkpoints").glob("*/**/*") if "__pycache__" not in path.parts)
    files = [path for path in weights if path.is_file()]
    return relative_names([*files, *(ROOT / "benchmarks/results").glob("*.json"), ROOT / "py.typed"])


@needs_compiler
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    inside = {name for name in names if not name.startswith(f"{dist_info()}/")}
    built = {f"bindings/backends/{name}" for name in BUILT}
    assert inside == {f"flashbrush/{name}" for name in modules() | data() | built}
    assert f"{dist_info()}/licenses/LICENSE" in names


@needs_compiler
def test_source_distribution_holds_all_that_a_build_needs_and_no_tests(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        folders = {member.name.partition("/")[2] for member in archive if member.isdir()}
    csrc = relative_names(
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")
    )
    made = {name for name in names if name.startswith("flashbrush.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - folders - made == modules() | data() | csrc | set(FILES)


@needs_compiler
def test_wheel_is_for_every_python_on_this_platform(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("flashbrush", fb.__version__, "py3", "none")
    assert platform not in ("any", "")


@needs_compiler
def test_metadata(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"diffusers", "cli", "triton", "all", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.partition(">")[0] for line in required] == ["torch"]


@needs_compiler
def test_console_script_is_the_root_main(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        entry_points = archive.read(f"{dist_info()}/entry_points.txt").decode()
        assert entry_points.split("\n")[:2] == ["[console_scripts]", "flashbrush = flashbrush.__main__:main"]
        assert "def main(" in archive.read("flashbrush/__main__.py").decode()
        assert archive.read(f"{dist_info()}/top_level.txt").decode().split() == ["flashbrush"]


@needs_compiler
def test_report_names_instruction_sets_built_and_left_out(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        report = json.loads(archive.read("flashbrush/bindings/backends/build_report.json"))
    assert report["error"] is None
    assert report["library"] == "libflashbrush_cpu.so"
    assert report["isas"] == ["portable"]
    others = {"avx2", "avx512", "avx512bf16", "amx"} if report["machine"] == "x86_64" else set()
    assert set(report["left_out"]) == others
    assert all("unrecognized command-line option" in reason for reason in report["left_out"].values())


# Installing and building

USE_INSTALLED = """
import torch, flashbrush as fb
from importlib.util import find_spec
import flashbrush.benchmarks.cases.shapes, flashbrush.integrations.methods
assert find_spec("flashbrush.kernels.attention.forward")
q, k, v = torch.randn(3, 1, 40, 2, 16)
control = fb.Control(fb.Segments(a=12, b=28), weight={("a", "b"): 1.5})
out = fb.attention(q, k, v, control, backend="BACKEND")
torch.testing.assert_close(out, fb.attention(q, k, v, control, backend="reference"))
print(fb.backends()["cpu"])
"""


@needs_compiler
def test_installed_wheel_computes(wheel: Path, tmp_path: Path) -> None:
    install(wheel, tmp_path / "site")
    assert {path.name for path in (tmp_path / "site").iterdir()} - {"bin"} == {"flashbrush", dist_info()}
    assert last_line_with(tmp_path / "site", USE_INSTALLED.replace("BACKEND", "cpu")) == "[]"


def test_without_a_compiler_it_installs_and_says_why(tmp_path: Path) -> None:
    install(copy_tree(tmp_path / "tree"), tmp_path / "site", PATH="/nonexistent")
    assert not list((tmp_path / "site/flashbrush/bindings/backends").glob("*.so"))
    answer = last_line_with(tmp_path / "site", USE_INSTALLED.replace("BACKEND", "composed"))
    assert "the shared library was not built" in answer and "no C++ compiler was found" in answer


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nonexistent/c++", "the C++ compiler that CXX names does not exist: /nonexistent/c++"),
        ("false", "false exited with 1"),
    ],
    ids=["missing", "failing"],
)
def test_build_without_a_working_compiler_succeeds_and_reports_why(
    compiler: str, reason: str, tmp_path: Path
) -> None:
    """test_without_a_compiler_it_installs_and_says_why shows the way from the report to fb.backends()."""
    tree = copy_tree(tmp_path / "tree")
    run(["setup.py", "-q", "build_ext", "--inplace"], tree, CXX=compiler)
    backends = tree / "bindings/backends"
    assert not (backends / "libflashbrush_cpu.so").exists()
    assert reason in json.loads((backends / "build_report.json").read_text())["error"]


# Prints what ptxas says of two kernels, or fails as an nvcc does that is too old.
CUDA_COMPILER = """#!/bin/sh
test "$1" = --version && { echo "some nvcc"; exit 0; }
OUTCOME
echo "ptxas info    : Compiling entry function '_Z5firstv' for 'sm_90a'"
echo "    64 bytes stack frame, 140 bytes spill stores, 136 bytes spill loads"
echo "ptxas info    : Used 168 registers, used 16 barriers"
echo "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async is serialized in '_Z6secondv'"
echo "ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'"
echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
echo "ptxas info    : Used 90 registers"
for last; do :; done
echo library > "$last"
"""


@pytest.mark.parametrize("works", (True, False), ids=["works", "too old"])
def test_cuda_library_is_built_where_nvcc_works(works: bool, tmp_path: Path) -> None:
    compiler, tree = tmp_path / "nvcc", copy_tree(tmp_path / "tree")
    compiler.write_text(
        CUDA_COMPILER.replace("OUTCOME", "" if works else "echo 'error: unsupported gpu'; exit 1")
    )
    compiler.chmod(0o755)
    # CXX: without the CPU library, which takes longer.
    run(["setup.py", "-q", "build_ext", "--inplace"], tree, NVCC=str(compiler), CXX="false")
    backends = tree / "bindings" / "backends"
    report = json.loads((backends / "build_report.json").read_text())["cuda"]
    assert (backends / CUDA_BUILT).exists() == works
    if not works:
        assert "unsupported gpu" in report["error"] and report["kernels"] == {}
        return
    assert report["error"] is None and report["compiler"] == "some nvcc"
    spilled, clean = {"registers": 168, "spills": 140}, {"registers": 90, "spills": 0}
    assert report["kernels"] == {"_Z5firstv": spilled, "_Z6secondv": clean}
    assert len(report["warnings"]) == 1 and "serialized" in report["warnings"][0]


# A clone under another name

ONE_COPY = """
import sys
from pathlib import Path

import flashbrush

ROOT = Path(__file__).resolve().parents[2]


def test_every_module_was_imported_once():
    assert Path(flashbrush.__file__).resolve().parent == ROOT
    files = {name: Path(getattr(module, "__file__", None) or "") for name, module in sys.modules.items()}
    files = {name: file.resolve() for name, file in files.items() if file.is_absolute()}
    ours = {name for name, f in files.items() if ROOT in f.parents and ROOT / "tests" not in f.parents}
    assert "flashbrush.bindings.operators.attention" in ours
    assert not [name for name in ours if not name.startswith("flashbrush")]
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Iterator[Path]:
    """A clone in a folder called `checkout`; its parent's folder `path` has it under the package's name."""
    folder = tmp_path_factory.mktemp("elsewhere")
    clone = copy_tree(folder / "checkout", "tests")
    (clone / "conftest.py").unlink()
    for name in BUILT:
        (clone / "bindings/backends" / name).unlink()
    (clone / "tests/integrations/test_one_copy.py").write_text(ONE_COPY)
    (folder / "path").mkdir()
    (folder / "path/flashbrush").symlink_to(clone)
    yield clone
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["tests/integrations/test_one_copy.py"], id="as make does"),
        pytest.param(["benchmarks", "--collect-only"], id="benchmarks"),
        pytest.param(
            ["-c", "tests/pytest.ini", "tests/bindings/test_merge.py", "tests/integrations/test_one_copy.py"],
            id="with the settings named",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_pytest_in_a_clone_under_another_name(arguments: list[str], clone: Path) -> None:
    """pytest must not import the root again under the clone's name: operators would register twice."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    output = run(command, clone, PYTHONPATH=str(clone.parent / "path"))
    assert "passed" in output or "collected" in output
