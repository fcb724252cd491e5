"""Where a GPU run takes place, and how a contestant that cannot run or is wrong is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..cases.contestants import Contestant, Missing
from ..cases.float64_check import WrongResult

NO_CUDA = "left out: --no-cuda was given, or a process did not survive the cuda backend"


@dataclass(frozen=True)
class Setup:
    """Where everything runs, and on which of our backends.

    Attributes:
        device: of all tensors.
        backend: of our calls, unless they name another.
        dry: tiny shapes and the fewest rounds, on the CPU.
        more: contestants of the caller's own, by name.
        build: whether CUDA sources may be compiled.
        cuda: whether our cuda backend takes part.
    """

    device: torch.device
    backend: str
    dry: bool = False
    more: dict[str, Contestant] = field(default_factory=dict)
    build: bool = False
    cuda: bool = True

    def seconds(self, seconds: float) -> float:
        """How long a task may time; a dry run makes the fewest rounds."""
        return 0.0 if self.dry else seconds


@contextlib.contextmanager
def judged(
    label: str, missing: dict[str, str], failures: dict[str, str], device: torch.device, ours: bool = True
) -> Iterator[None]:
    """Record a contestant's error under its label, and continue with the others.

    A contestant that cannot run goes to `missing`, one with a wrong result to `failures`. Any other error is
    a failure of ours; another library's contestant is missing for that reason. An error that leaves the
    device unusable is raised.
    """
    try:
        yield
    except Missing as reason:
        missing[label] = str(reason)
    except WrongResult as wrong:
        failures[label] = str(wrong)
    except torch.cuda.OutOfMemoryError:
        missing[label] = "the device's memory is not enough"
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        refused = isinstance(error, ValueError) and str(error).startswith("backend:")
        why = str(error) if refused else f"{type(error).__name__}: {lines[0] if lines else ''}"
        (missing if refused or not ours else failures)[label] = why
        if device.type == "cuda":
            torch.cuda.synchronize(device)
