"""What is built and installed: a wheel with the package and nothing else, with and without a compiler, and a
clone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

import flashbrush as fb

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("checkpoints", "kernels", "bindings", "integrations", "benchmarks")
FILES = (
    "__init__.py",
    "__main__.py",
    "_moved_paths.py",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
BUILT = ("libflashbrush_cpu.so", "build_report.json")
CUDA_BUILT = "libflashbrush_cuda.so"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
# One instruction set is quicker to build, and shows that one that the compiler cannot do is left out.
OLD_COMPILER = """#!/bin/sh
case "$*" in *-mavx*) echo "error: unrecognized command-line option '-mavx'"; exit 1;; esac
exec {compiler} "$@"
"""

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def copy_tree(target: Path, *more: str) -> Path:
    """What a fresh clone has, as far as packaging is concerned, and beside it what a used one collects."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", *BUILT, CUDA_BUILT)
    for folder in (*FOLDERS, "csrc", *more):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for file in FILES:
        shutil.copy(ROOT / file, target / file)
    strays = ("scratch.py", "conftest.py", "photo.png", "notes.txt", "data/__init__.py", "demo/result.png")
    strays += (
        "venv/lib/module.py",
        "bindings/notes.txt",
        "bindings/old/module.py",
        "kernels/__pycache__/segments.pyc",
    )
    for stray in (*strays, *(f"bindings/backends/{name}" for name in BUILT)):
        (target / stray).parent.mkdir(parents=True, exist_ok=True)
        (target / stray).write_text("stray")
    return target


def run(command: list[str], folder: Path, **environment: str) -> str:
    """With this interpreter in `folder`, by the variables given; the output, or the test fails with it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH", "FLASHBRUSH_SANITIZE")}
    kept["NVCC"] = ""  # which takes half a minute, and has a test of its own
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


def ask(target: Path, code: str, **environment: str) -> str:
    """The last line that an interpreter prints for which flashbrush is the one in `target`."""
    where = "import flashbrush, pathlib; print(pathlib.Path(flashbrush.__file__).resolve().parent)\n"
    lines = run(["-c", where + code], target.parent, PYTHONPATH=str(target), **environment).splitlines()
    assert lines[0] == str((target / "flashbrush").resolve())
    return lines[-1]


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Iterator[Path]:
    """A source distribution, and the wheel that is built from it by a compiler that knows no AVX."""
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


def sources() -> set[str]:
    """Python files of the package, without those that only pytest reads."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    files = [path for path in files if not path.name.startswith(("test_", "conftest"))]
    return {path.relative_to(ROOT).as_posix() for path in files} | {
        "__init__.py",
        "__main__.py",
        "_moved_paths.py",
    }


def data() -> set[str]:
    model = [
        path
        for path in (ROOT / "checkpoints").glob("*/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return {
        path.relative_to(ROOT).as_posix() for path in (*model, *(ROOT / "benchmarks/results").glob("*.json"))
    }


@needs_compiler
def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    inside = {name for name in names if not name.startswith(f"flashbrush-{fb.__version__}.dist-info/")}
    built = {f"bindings/backends/{name}" for name in BUILT}
    assert inside == {f"flashbrush/{name}" for name in sources() | data() | built}
    assert f"flashbrush-{fb.__version__}.dist-info/licenses/LICENSE" in names


def test_a_source_distribution_can_be_built_again(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        folders = {member.name.partition("/")[2] for member in archive if member.isdir()}
    # the links of a checkout lead round in circles, its tests need the checkout
    csrc = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "csrc").rglob("*")
        if p.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    made = {name for name in names if name.startswith("flashbrush.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - folders - made == sources() | data() | csrc | set(FILES)


def test_a_wheel_is_for_every_python_on_this_platform(wheel: Path) -> None:
    name, version, *tag = wheel.stem.split("-")
    assert (name, version, *tag[:2]) == ("flashbrush", fb.__version__, "py3", "none")
    assert tag[2] not in ("any", "")


def test_metadata(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        read = lambda name: archive.read(f"flashbrush-{fb.__version__}.dist-info/{name}").decode()  # noqa: E731
        metadata, entry_points, top_level = (
            read(n) for n in ("METADATA", "entry_points.txt", "top_level.txt")
        )
        assert "def main(" in archive.read("flashbrush/__main__.py").decode()
    about = message_from_string(metadata)
    assert about["License-Expression"] == "Apache-2.0"
    assert {"diffusers", "cli", "triton", "all", "dev"} <= set(about.get_all("Provides-Extra", []))
    requirements = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.partition(">")[0] for line in requirements] == ["torch"]
    assert entry_points.split("\n")[:2] == ["[console_scripts]", "flashbrush = flashbrush.__main__:main"]
    assert top_level.split() == ["flashbrush"]


@needs_compiler
def test_the_report_says_what_was_built_and_what_was_left_out(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        report = json.loads(archive.read("flashbrush/bindings/backends/build_report.json"))
    assert report["error"] is None
    assert report["library"] == "libflashbrush_cpu.so"
    assert report["isas"] == ["portable"]
    others = {"avx2", "avx512", "avx512bf16", "amx"} if report["machine"] == "x86_64" else set()
    assert set(report["left_out"]) == others
    assert all("unrecognized command-line option" in reason for reason in report["left_out"].values())


# Writes what ptxas would say of two kernels, or fails as an old nvcc does.
CUDA_COMPILER = """#!/bin/sh
test "$1" = --version && { echo "some nvcc"; exit 0; }
OUTCOME
echo "ptxas info    : Compiling entry function '_Z5firstv' for 'sm_90a'"
echo "    64 bytes stack frame, 140 bytes spill stores, 136 bytes spill loads"
echo "ptxas info    : Used 168 registers, used 16 barriers"
echo "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized in '_Z6secondv'"
echo "ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'"
echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
echo "ptxas info    : Used 90 registers"
for last; do :; done
echo library > "$last"
"""


@pytest.mark.parametrize("works", (True, False))
def test_the_cuda_library_is_built_where_nvcc_is(works: bool, tmp_path: Path) -> None:
    compiler, tree = tmp_path / "nvcc", copy_tree(tmp_path / "tree")
    compiler.write_text(
        CUDA_COMPILER.replace("OUTCOME", "" if works else "echo 'error: unsupported gpu'; exit 1")
    )
    compiler.chmod(0o755)
    run(
        ["setup.py", "-q", "build_ext", "--inplace"], tree, NVCC=str(compiler), CXX="false"
    )  # the other library takes longer
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


WORKS = """
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
def test_an_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    install(wheel, tmp_path / "site")
    assert sorted(path.name for path in (tmp_path / "site").iterdir() if path.name != "bin") == [
        "flashbrush",
        f"flashbrush-{fb.__version__}.dist-info",
    ]
    assert ask(tmp_path / "site", WORKS.replace("BACKEND", "cpu")) == "[]"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "the C++ compiler that CXX names does not exist: /nonexistent/c++"),
        ({"PATH": "/nonexistent"}, "no C++ compiler was found"),
        ({"CXX": "false"}, "false exited with 1"),
    ],
    ids=["CXX names none", "none on PATH", "one that fails"],
)
def test_without_a_compiler_the_package_installs_and_says_why(
    environment, reason: str, tmp_path: Path
) -> None:
    install(copy_tree(tmp_path / "tree"), tmp_path / "site", **environment)
    backends = tmp_path / "site/flashbrush/bindings/backends"
    assert not (backends / "libflashbrush_cpu.so").exists()
    assert reason in json.loads((backends / "build_report.json").read_text())["error"]
    answer = ask(tmp_path / "site", WORKS.replace("BACKEND", "composed"))
    assert "the shared library was not built" in answer
    assert reason in answer


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
    ours = {name: f for name, f in files.items() if ROOT in f.parents and "tests" not in f.relative_to(ROOT).parts}
    assert "flashbrush.bindings.operators.attention" in ours
    assert not [name for name in ours if not name.startswith("flashbrush")]
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Iterator[Path]:
    """A clone called `checkout`, and a folder in which it has the package's name."""
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
        ["-c", "tests/pytest.ini", "tests/bindings/test_merge.py", "tests/integrations/test_one_copy.py"],
        ["tests/integrations/test_one_copy.py"],
        ["benchmarks", "--collect-only"],
    ],
    ids=["with the settings named", "as make does", "benchmarks"],
)
def test_a_clone_under_another_name(arguments: list[str], clone: Path) -> None:
    """pytest must not import the root a second time under the clone's name: operators would register twice."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    output = run(command, clone, PYTHONPATH=str(clone.parent / "path"))
    assert "passed" in output or "collected" in output
