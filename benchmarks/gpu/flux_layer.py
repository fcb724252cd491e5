"""A FLUX layer on a GPU between its projections: ours, and the operators of diffusers' stock processor.

The stock form is written out here, as a machine with a GPU may lack diffusers; where it is installed, the two
are compared.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bindings import Control, attention, qk_norm_rope
from ..cases.float64_check import ExpectedRows
from ..cases.flux_layer import EPS, LayerInputs, Outputs, joined_qkv, stock_processor
from ..cases.inputs import Case
from ..cases.shapes import Shape
from ..timing.device_clock import input_sets, time_on_device
from ..timing.rounds import ratio, spread
from ..timing.rows import Row, describe_shape, ratio_cells, seconds_cells
from . import contestants
from .forward import peak_memory
from .setup import Setup, judged
from .shapes import dry


def stock(inputs: LayerInputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Outputs:
    """The operators of diffusers' FluxAttnProcessor; `attend` takes (batch, heads, tokens, dim)."""
    shape = inputs.shape
    image, text = (
        [t.unflatten(-1, (shape.heads, shape.dim)) for t in stream] for stream in (inputs.image, inputs.text)
    )
    q, k = (
        torch.cat(
            [
                F.rms_norm(text[i], (shape.dim,), inputs.norms[2 + i], EPS),
                F.rms_norm(image[i], (shape.dim,), inputs.norms[i], EPS),
            ],
            1,
        )
        for i in (0, 1)
    )
    v = torch.cat([text[2], image[2]], 1)
    q, k = _rotary(q, inputs.rope), _rotary(k, inputs.rope)
    out = attend(*(t.permute(0, 2, 1, 3) for t in (q, k, v))).permute(0, 2, 1, 3)
    return _split(out.flatten(2, 3), text[0].shape[1])


def _rotary(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (t[None, :, None, :] for t in rope)
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


def own(inputs: LayerInputs, control: Control | None, backend: str, in_place: bool) -> Outputs:
    """Ours; in_place: the values are not joined, each segment's are read where the projections left them."""
    shape = inputs.shape
    image, text = (
        [t.unflatten(-1, (shape.heads, shape.dim)) for t in stream] for stream in (inputs.image, inputs.text)
    )
    q, k = (
        qk_norm_rope(
            [(text[i], inputs.norms[2 + i], None), (image[i], inputs.norms[i], None)], *inputs.rope, eps=EPS
        )
        for i in (0, 1)
    )
    if in_place:
        lengths = list(shape.keys.values())
        keys = k.split(lengths, 1)
        values = [text[2], *image[2].split(lengths[1:], 1)]
        out = attention(q, keys, values, control, backend=backend)
    else:
        out = attention(q, k, torch.cat([text[2], image[2]], 1), control, backend=backend)
    return _split(out.flatten(2, 3), text[0].shape[1])


def _split(out: Tensor, text_len: int) -> Outputs:
    text, image = out.split_with_sizes([text_len, out.shape[1] - text_len], 1)
    return image.contiguous(), text.contiguous()


@torch.no_grad()
def measure(setup: Setup, shape: Shape) -> Row:
    """One row of the results, as forward.measure's; stock_<name> is the stock form on torch's backend."""
    shape, device, dtype = dry(shape) if setup.dry else shape, setup.device, torch.bfloat16
    control = shape.control()
    groups = [
        LayerInputs.draw(shape, dtype, seed, device)
        for seed in range(input_sets(device, 6 * shape.batch * shape.n_rows * shape.heads * shape.dim))
    ]
    forms: dict[str, Callable[[LayerInputs], Outputs]] = {
        f"stock_{name}": functools.partial(stock, attend=functools.partial(contestants.forced, backend))
        for name, backend in contestants.FORCED.items()
    }
    forms["stock"] = functools.partial(stock, attend=F.scaled_dot_product_attention)
    for name, given, in_place in (
        ("plain", None, False),
        ("plain_in_place", None, True),
        ("controlled", control, False),
        ("controlled_in_place", control, True),
    ):
        forms[name] = functools.partial(own, control=given, backend=setup.backend, in_place=in_place)
    expected = {controlled: _expected(groups[0], controlled) for controlled in (False, True)}
    calls, errors, missing, failures, memory = {}, {}, {}, {}, {}
    for name, form in forms.items():
        if device.type != "cuda" and name in ("stock_cudnn", "stock_efficient"):
            missing[name] = "torch has no such kernel on the CPU"
            continue
        with judged(name, missing, failures, device, ours=not name.startswith("stock")):
            image, text = form(groups[0])
            out = torch.cat([text, image], 1).unflatten(-1, (shape.heads, shape.dim))
            report = expected[name.startswith("controlled")].check(f"FLUX layer, {name} at {shape.name}", out)
            memory[name] = peak_memory(functools.partial(form, groups[0]), device)
            errors[name] = report
            calls[name] = [functools.partial(form, inputs) for inputs in groups]
    agreement = compare_with_diffusers(groups[0].shape, device)
    if agreement is not None and not agreement <= 1e-5:
        failures["stock_form"] = f"the stock form differs from diffusers' processor by {agreement:.3g}"
        calls = {name: group for name, group in calls.items() if not name.startswith("stock")}
    samples = time_on_device(calls, device, setup.seconds(1.5)) if calls else {}
    stocks = [n for n in samples if n.startswith("stock")]
    mine = [n for n in samples if n not in stocks]
    found = {f"{a}/{b}": ratio(samples, a, b) for a in mine for b in stocks}
    if stocks:
        fastest = min(stocks, key=lambda n: spread(samples[n]).median)
        found |= {f"{a}/fastest stock": ratio(samples, a, fastest) for a in mine}
    return {
        "section": "layer",
        "shape": describe_shape(shape),
        "dtype": "bfloat16",
        "seconds": seconds_cells(samples),
        "ratios": ratio_cells(found),
        "errors": errors,
        "memory": memory,
        "missing": missing,
        "failures": failures,
        "stock_against_diffusers": "diffusers is not installed" if agreement is None else agreement,
    }


def _expected(inputs: LayerInputs, controlled: bool) -> ExpectedRows:
    """Exact from the projections on; the allowance rounds q and k where the stock form does."""
    q, k, v = joined_qkv(inputs, inputs.image[0].dtype)
    case = Case(inputs.shape, q.dtype, q, k, v, inputs.shape.control())
    return ExpectedRows(case, controlled, joined_qkv(inputs, torch.float64))


def compare_with_diffusers(shape: Shape, device: torch.device) -> float | None:
    """The largest difference of the stock form to diffusers' processor, in float32 at a small size.

    None where diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        return None
    inputs = LayerInputs.draw(dry(shape), torch.float32, 0, device)
    theirs = stock_processor(inputs)()
    mine = stock(inputs, F.scaled_dot_product_attention)
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
