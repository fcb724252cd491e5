"""Registration of torch.ops.flashbrush.*: a schema written by hand, an implementation, and a fake for
compilers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("flashbrush", "DEF")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator and return it.

    Args:
        schema: "name(arguments) -> results".
        run: the implementation, for every device. Its outputs have the layout that `fake` promises.
        fake: outputs of the right shape, dtype, device and layout, without their values.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashbrush::{name}", fake, lib=_library)
    return getattr(torch.ops.flashbrush, name).default
