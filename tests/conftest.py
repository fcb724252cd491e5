"""One seed, hypothesis without deadlines (the machines that run this are slow and noisy), and Triton's
interpreter.

Triton decides at its import whether kernels are interpreted, and any library may import it first: so it is
chosen here. The tests of the kernels run in it where there is no GPU; all others see the machine as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile(
    "flashbrush", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("flashbrush")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninterpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not {"kernels", "csrc"} & set(request.path.parts):
        monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(autouse=True, scope="session")
def patched_once() -> Iterator[None]:
    """Triton's interpreter patches triton.language at each call of a device function, a third of its time:
    once will do.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    plain = interpreter._patch_lang

    def patch(fn: Callable) -> object:
        used = [value for value in fn.__globals__.values() if value in (language, language.core)]
        fresh = any(language.core.is_builtin(module.load) for module in used)
        return plain(fn) if fresh else SimpleNamespace(restore=lambda: None)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch)
        yield
