"""Builds flashbrush: the packages, whose root is this folder, and the libraries from csrc/cpu and csrc/cuda.

The libraries are plain C++ and CUDA C++ behind a C interface: no Python, no torch. Every file of a folder is
compiled: those of `csrc/cpu/isa/` once per instruction set, with -DFLASHBRUSH_ISA=<name>, those of
`csrc/cpu/schedule/` once, for any machine. Together they become bindings/backends/libflashbrush_cpu.so.
`csrc/cuda/*.cu` becomes libflashbrush_cuda.so beside it, for Hopper GPUs, where nvcc is present.

An instruction set that the compiler cannot do is left out. Without a compiler, or where something else fails,
the package installs without that library. bindings/backends/build_report.json says what was built, how, and
what went wrong.

    CXX                     the compiler; by default the first of c++, g++, clang++
    NVCC                    the CUDA compiler; by default CUDA_HOME's or the one on PATH; empty: none
    FLASHBRUSH_SANITIZE=1   with AddressSanitizer and UndefinedBehaviorSanitizer, or not at all
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGES = [
    "flashbrush",
    "flashbrush.benchmarks",
    "flashbrush.benchmarks.cases",
    "flashbrush.benchmarks.cpu",
    "flashbrush.benchmarks.gpu",
    "flashbrush.benchmarks.timing",
    "flashbrush.bindings",
    "flashbrush.bindings.backends",
    "flashbrush.bindings.backends.composed",
    "flashbrush.bindings.backends.cpu",
    "flashbrush.bindings.backends.cuda",
    "flashbrush.bindings.backends.gpu",
    "flashbrush.bindings.backends.triton",
    "flashbrush.bindings.core",
    "flashbrush.bindings.operators",
    "flashbrush.checkpoints",
    "flashbrush.integrations",
    "flashbrush.integrations.cli",
    "flashbrush.integrations.cli.shared",
    "flashbrush.integrations.diffusers",
    "flashbrush.integrations.diffusers.hosts",
    "flashbrush.integrations.diffusers.protocol",
    "flashbrush.integrations.evaluation",
    "flashbrush.integrations.evaluation.insertion",
    "flashbrush.integrations.evaluation.visual_icl",
    "flashbrush.integrations.methods",
    "flashbrush.integrations.methods.shared",
    "flashbrush.integrations.pipelines",
    "flashbrush.integrations.pipelines.inversion",
    "flashbrush.integrations.pipelines.shared",
    "flashbrush.integrations.tiny_fill",
    "flashbrush.integrations.tiny_fill.data",
    "flashbrush.integrations.tiny_fill.training",
    "flashbrush.kernels",
    "flashbrush.kernels.attention",
]
ROOT_MODULES = {"__init__", "__main__", "_moved_paths"}
DATA = {
    "flashbrush": ["py.typed"],
    "flashbrush.benchmarks": ["results/*.json"],
    "flashbrush.checkpoints": ["*/**"],
}

SOURCES = Path("csrc/cpu")
CUDA_SOURCES = Path("csrc/cuda")
BACKENDS = Path("bindings/backends")
LIBRARY = "libflashbrush_cpu.so"
CUDA_LIBRARY = "libflashbrush_cuda.so"
REPORT = "build_report.json"

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
# Python's own CFLAGS carry -fwrapv in many places, which would hide signed overflow.
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-fno-wrapv", "-g", "-O1"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprfchw"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]
# The architecture by its long form: the short one also makes code for an sm_90 that has no wgmma.
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
CUDA_FLAGS += ["-Xptxas=-v", "-shared"]
ISAS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512BF16, "amx": AMX}


class BuildError(Exception):
    """A step of the build failed: the line that `flashbrush info` shows, and the compiler's own output."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def call(command: list[str]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        lines = done.stdout.splitlines() or ["no output"]
        reason = next((line for line in lines if "error" in line), lines[0])
        output = f"{shlex.join(command)}\n{done.stdout[:4000]}"
        raise BuildError(f"{command[0]} exited with {done.returncode}: {reason.strip()}", output)
    return done.stdout


def find_compiler() -> list[str]:
    if not sys.platform.startswith(("linux", "darwin")):
        raise BuildError(f"the library is built on Linux and macOS, this is {sys.platform}")
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(chosen[0]):
            raise BuildError(f"the C++ compiler that CXX names does not exist: {chosen[0]}")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler was found (c++, g++ or clang++ on PATH, or CXX)")


def find_cuda_compiler() -> str:
    if (chosen := os.environ.get("NVCC")) is not None:
        if not shutil.which(chosen):
            raise BuildError(
                f"the CUDA compiler that NVCC names does not exist: {chosen}" if chosen else "NVCC is empty"
            )
        return chosen
    homes = [Path(home, "bin") for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    for path in (*homes, None, "/usr/local/cuda/bin"):
        if found := shutil.which("nvcc", path=path and str(path)):
            return found
    raise BuildError("nvcc was not found (NVCC, CUDA_HOME or PATH)")


def build_cuda_library(folder: Path) -> dict:
    """Leaves the library in `folder`, or none; what the report says of it."""
    report: dict = {
        "error": None,
        "output": "",
        "compiler": None,
        "flags": CUDA_FLAGS,
        "kernels": {},
        "warnings": [],
    }
    library = folder / CUDA_LIBRARY
    try:
        compiler = find_cuda_compiler()
        report["compiler"] = call([compiler, "--version"]).splitlines()[-1]
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            target = Path(scratch) / CUDA_LIBRARY
            sources = [str(source) for source in sorted(CUDA_SOURCES.glob("*.cu"))]
            read_resources(call([compiler, *CUDA_FLAGS, *sources, "-o", str(target)]), report)
            os.replace(target, library)
    except (BuildError, OSError) as error:
        library.unlink(missing_ok=True)
        report["error"] = str(error)
        report["output"] = getattr(error, "output", "")
    return report


def read_resources(output: str, report: dict) -> None:
    """Registers and bytes spilled of each kernel, and what ptxas warns of, from its -v."""
    kernel = ""
    for line in output.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = found[1]
            report["kernels"][kernel] = {"registers": 0, "spills": 0}
        elif found := re.search(r"(\d+) bytes spill stores", line):
            report["kernels"][kernel]["spills"] = int(found[1])
        elif found := re.search(r"Used (\d+) registers", line):
            report["kernels"][kernel]["registers"] = int(found[1])
        elif "warning" in line.lower() or re.search(r"\(C\d+\)", line):
            report["warnings"].append(line.strip())


def build_library(folder: Path) -> None:
    """Leaves the libraries and their report in `folder`, or the report alone, with the reason in "error"."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    sanitize = os.environ.get("FLASHBRUSH_SANITIZE", "0") not in ("", "0")
    report: dict = {
        "error": None,
        "output": "",
        "library": None,
        "compiler": None,
        "machine": platform.machine(),
    }
    report |= {"isas": [], "left_out": {}, "flags": [], "isa_flags": {}, "sanitize": sanitize}
    started = time.monotonic()
    cuda = ThreadPoolExecutor(1).submit(build_cuda_library, folder)
    try:
        # Renamed into place: a process that runs the old library keeps the old file.
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            compile_and_link(Path(scratch), FLAGS + SANITIZE * sanitize, report)
            os.replace(Path(scratch) / LIBRARY, library)
        report["library"] = LIBRARY
    except (BuildError, OSError) as error:
        library.unlink(missing_ok=True)
        if sanitize:
            raise
        report["error"] = str(error)
        report["output"] = getattr(error, "output", "")
        print(f"flashbrush: installing without the CPU library: {error}\n{report['output']}", file=sys.stderr)
    report["cuda"] = cuda.result()
    report["seconds"] = round(time.monotonic() - started, 1)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def compile_and_link(scratch: Path, flags: list[str], report: dict) -> None:
    compiler = find_compiler()
    report["compiler"] = call([*compiler, "--version"]).partition("\n")[0]
    report["flags"] = flags
    once_sources, isa_sources = (sorted((SOURCES / folder).glob("*.cpp")) for folder in ("schedule", "isa"))
    if not once_sources or not isa_sources:
        raise BuildError(f"no sources in {SOURCES}/schedule and {SOURCES}/isa")
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")

    def compile_one(source: Path, isa: str | None) -> str:
        target = scratch / f"{source.stem}.{isa or 'any'}.o"
        extra = [f"-DFLASHBRUSH_ISA={isa}", *ISAS[isa]] if isa else []
        call([*compiler, *flags, f"-I{SOURCES}", *extra, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        once = [pool.submit(compile_one, source, None) for source in once_sources]
        by_isa = {
            isa: [pool.submit(compile_one, source, isa) for source in isa_sources]
            for isa in ISAS
            if isa == "portable" or on_x86
        }
    objects = [job.result() for job in once]
    for isa, jobs in by_isa.items():
        try:
            objects += [job.result() for job in jobs]
        except BuildError as error:
            if isa == "portable":
                raise
            report["left_out"][isa] = str(error)
            print(f"flashbrush: {isa} is left out: {error}", file=sys.stderr)
        else:
            report["isas"].append(isa)
            report["isa_flags"][isa] = ISAS[isa]
    call([*compiler, *flags, "-shared", "-pthread", *objects, "-o", str(scratch / LIBRARY)])


class BuildPython(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "flashbrush"), ignore_errors=True)  # modules since removed
        super().run()

    def find_package_modules(self, package, package_dir):
        """Of the root only the package's own modules, not this file; of the benchmarks not what only pytest
        reads.
        """
        return [
            (name, module, file)
            for name, module, file in super().find_package_modules(package, package_dir)
            if (package != "flashbrush" or module in ROOT_MODULES)
            and not module.startswith("test_")
            and module != "conftest"
        ]


class BuildLibrary(build_ext):
    """The CPU library in place of extension modules; an editable install gets it in the source tree."""

    def run(self) -> None:
        build_library(BACKENDS if self.inplace else Path(self.build_lib, "flashbrush") / BACKENDS)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib, "flashbrush") / BACKENDS
        return [str(folder / name) for name in (LIBRARY, CUDA_LIBRARY, REPORT) if (folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {out: str(BACKENDS / Path(out).name) for out in self.get_outputs()} if self.inplace else {}

    def get_source_files(self) -> list[str]:
        paths = sorted((*SOURCES.rglob("*"), *CUDA_SOURCES.rglob("*")))
        return [str(path) for path in paths if path.suffix in (".cpp", ".h", ".cu", ".cuh")]


class PlatformWheel(bdist_wheel):
    """For this platform, as it holds the library, but for every Python, as the library knows none."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    setup(
        package_dir={"flashbrush": "."},
        packages=PACKAGES,
        package_data=DATA,
        distclass=PlatformDistribution,
        cmdclass={"build_py": BuildPython, "build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    )
