"""The same start for every test, hypothesis without deadlines, and Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and any library may import it first, so it is set here.
Without a GPU the tests in kernels/ and csrc/ run in the interpreter; all others see the machine as it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Without deadlines and health checks: machines that run the tests may be slow and shared.
settings.register_profile(
    "flashbrush", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("flashbrush")


@pytest.fixture(autouse=True)
def same_global_state() -> Iterator[None]:
    """Seeds, forgets which warnings were given, and afterwards restores the process's settings."""
    from flashbrush.bindings.backends import planner  # here, as it may import Triton

    torch.manual_seed(0)
    planner._warned.clear()
    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    device, grad = torch.get_default_device(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(device)
    torch.set_grad_enabled(grad)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the setter imports much of torch
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def interpreter_for_kernels_only(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, same_global_state: None
) -> None:
    # After same_global_state: a test that calls monkeypatch.undo() undoes this too, and the environment that
    # is restored after it must be the one from before.
    if not {"kernels", "csrc"} & set(request.path.parts):
        monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(autouse=True, scope="session")
def interpreter_patches_once() -> Iterator[None]:
    """Triton's interpreter patches triton.language at each call of a device function, a third of its time.

    Here only the first call of each patches it.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_if_unpatched(fn: Callable) -> object:
        used = [value for value in fn.__globals__.values() if value in (language, language.core)]
        unpatched = any(language.core.is_builtin(module.load) for module in used)
        return patch_language(fn) if unpatched else SimpleNamespace(restore=lambda: None)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_if_unpatched)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the workers' time; tests that compile kernels have a budget of their own (docs/development)."""
    seconds = {"compile kernels": 0.0, "others": 0.0}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds["compile kernels" if "compiled" in report.keywords else "others"] += report.duration
    times = ", ".join(f"{name} {total:.0f} s" for name, total in seconds.items())
    terminalreporter.write_line(f"time of all workers: {times}")
