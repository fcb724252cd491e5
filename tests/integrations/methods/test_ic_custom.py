"""IC-Custom against an eager implementation, column by column and with its registers in the map."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations import ICCustom, ICCustomParameters
from flashbrush.integrations.diffusers import Layer, Step, apply
from flashbrush.integrations.methods.ic_custom import known_mask, panels, preserve

from ..tiny import COLUMNS, ROWS, TEXT, forward, relative, tiny_call, tiny_flux
from .eager import FluxCore, Rope, Site, attend, eagerly, rotate, worst_layer

TOLERANCE = 1e-5  # float32, relative to the largest output
HEADS, DIM = 4, 32
GRID = (ROWS, COLUMNS)
TIMES = (0.9, 0.6, 0.3, 0.0)
NAMES = ("cond_embedding", "target_embedding", "idx_embedding", "task_register_embeddings")


def parameters(**options) -> ICCustomParameters:
    made = ICCustomParameters(HEADS * DIM, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


class EagerICMA(FluxCore):
    """`columns`: the reference that each column of the grid belongs to, or None for the target."""

    def __init__(self, made: ICCustomParameters, columns: list[int | None], task: int = 0) -> None:
        self.tables = {name: getattr(made, name).weight for name in NAMES}
        self.columns, self.task = columns, task

    def with_boundary(self, x: Tensor) -> Tensor:
        cond, target, idx, _ = (self.tables[name] for name in NAMES)
        row = torch.stack(
            [target[0] if n is None else cond[0] + idx[n] for n in self.columns]
        )  # (columns, hidden)
        image = row.repeat(x.shape[2] // len(row), 1)[: x.shape[2] - TEXT]
        boundary = torch.cat([torch.zeros(TEXT, HEADS * DIM), image])
        return x + boundary.reshape(-1, HEADS, DIM).transpose(0, 1)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
        first = 8 * self.task
        keys, values = self.tables[NAMES[3]][first : first + 4], self.tables[NAMES[3]][first + 4 : first + 8]
        q, k = (rotate(self.with_boundary(x), rope) for x in (q, k))
        k, v = (
            torch.cat([t, r.reshape(4, HEADS, DIM).transpose(0, 1).expand(len(t), -1, -1, -1)], 2)
            for t, r in ((k, keys), (v, values))
        )
        return attend(q, k, v)


CASES = {
    "diptych": ({}, [0, 0, None, None], 0),
    "precise": ({"task": "precise"}, [0, 0, None, None], 1),
    "drawn, narrow reference": ({"task": "drawn", "widths": (1, 3)}, [0, None, None, None], 2),
    "three references": ({"references": 3}, [0, 1, 2, None], 0),
    "two references": ({"references": 2, "widths": [1, 2, 1]}, [0, 1, 1, None], 0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_matches_eager(case: str) -> None:
    knobs, columns, task = CASES[case]
    model, made = tiny_flux(), parameters()
    call = tiny_call(model, batch=2)
    core = EagerICMA(made, columns, task)
    with eagerly(model, core):
        expected = forward(model, call)
    with apply(model, ICCustom(made, grid=GRID, **knobs)) as handle:
        assert worst_layer(model, call, core) <= TOLERANCE
        out = forward(model, call)
        assert relative(out, expected) <= TOLERANCE
        handle.grid, handle.method = GRID, ICCustom(made, **knobs)
        assert torch.equal(forward(model, call), out)


@pytest.mark.parametrize("progressive", [False, True])
def test_run_matches_eager(progressive: bool) -> None:
    """Two references; the velocity preserves a background."""
    model, made = tiny_flux(), parameters()
    knobs, columns, task = CASES["two references"]
    call = tiny_call(model)
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(1, ROWS * COLUMNS, 8, generator=generator)
    known = torch.rand(1, ROWS * COLUMNS, 1, generator=generator).round()
    noise = call["hidden_states"]

    def run(blend) -> Tensor:
        latents = noise
        for step, (now, then) in enumerate(pairwise(TIMES)):
            velocity = forward(model, call | {"hidden_states": latents, "timestep": torch.full((1,), now)})
            latents = latents + (then - now) * blend(velocity, step)
        return latents

    def by_hand(velocity: Tensor, step: int) -> Tensor:
        on = step in ((0, 2) if progressive else (0, 1, 2))  # of 3 steps, of which 0.8 are 2.4
        return torch.where((known == 1) & on, noise - source, velocity)

    with eagerly(model, EagerICMA(made, columns, task)):
        expected = run(by_hand)
    with apply(model, ICCustom(made, grid=GRID, **knobs)):
        mine = run(lambda v, step: preserve(v, noise, source, known, step, 3, progressive=progressive))
        plain = run(lambda v, step: v)
    assert relative(mine, expected) <= TOLERANCE
    assert relative(plain, mine) > 100 * TOLERANCE


@pytest.mark.parametrize("form", ["plain", "checkpointed"])
def test_gradients_of_parameters_match_eager(form: str) -> None:
    """Gradients reach all parameters through the attention."""
    gradients = []
    for install in ("eager", "ours"):
        model, made = tiny_flux(double=1, single=1).requires_grad_(False), parameters()
        call = tiny_call(model, batch=2)
        if form == "checkpointed" and install == "ours":
            model.train()
            model.enable_gradient_checkpointing()
            call["hidden_states"].requires_grad_()
        method = ICCustom(made, "precise", 2, (1, 2, 1), GRID)
        with (
            eagerly(model, EagerICMA(made, [0, 1, 1, None], 1))
            if install == "eager"
            else apply(model, method)
        ):
            model(**call).sample.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in made.named_parameters()})
    for name, theirs in gradients[0].items():
        assert theirs is not None and float(theirs.abs().max()) > 0
        assert relative(gradients[1][name], theirs) <= 1e-4
    untouched = gradients[1]["task_register_embeddings.weight"].clone()
    untouched[8:16] = 0
    assert not untouched.any() and not gradients[1]["idx_embedding.weight"][2:].any()


def test_changed_parameters_show_in_the_next_call() -> None:
    model, made = tiny_flux(), parameters()
    call = tiny_call(model)
    with apply(model, ICCustom(made, grid=GRID)):
        before = forward(model, call)
        with torch.no_grad():
            made.target_embedding.weight += 0.1
        assert relative(forward(model, call), before) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "knob",
    [{"task": "precise"}, {"task": "drawn"}, {"references": 3}, {"widths": (1, 3)}, {"grid": (12, 2)}],
    ids=str,
)
def test_each_knob_changes_the_output(knob: dict) -> None:
    model, made = tiny_flux(), parameters()
    call = tiny_call(model)
    with apply(model, ICCustom(made, grid=GRID)) as handle:
        before = forward(model, call)
        handle.method = ICCustom(made, **{"grid": GRID} | knob)
        assert relative(forward(model, call), before) > 100 * TOLERANCE


def test_zero_parameters_without_registers_are_plain_attention() -> None:
    """Registers of zeros take a share of the softmax."""
    model = tiny_flux()
    call = tiny_call(model)
    plain = forward(model, call)
    with apply(model, ICCustom(ICCustomParameters(HEADS * DIM, registers=0), grid=GRID)) as handle:
        assert relative(forward(model, call), plain) <= TOLERANCE
        handle.method = ICCustom(ICCustomParameters(HEADS * DIM), grid=GRID)
        assert relative(forward(model, call), plain) > 100 * TOLERANCE


def test_registers_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(q, k, v, control=None, **options):
        seen.append((k[-1], v[-1]))
        return fb.attention(q, k, v, control, **options)

    model, made = tiny_flux(), parameters()
    monkeypatch.setattr("flashbrush.integrations.diffusers.protocol.plan_call.attention", spy)
    with apply(model, ICCustom(made, "precise", grid=GRID)):
        forward(model, tiny_call(model))
    table = made.task_register_embeddings.weight
    places = (table[8].data_ptr(), table[12].data_ptr())
    assert [(k.data_ptr(), v.data_ptr()) for k, v in seen] == [places] * 4


@torch.no_grad()
def test_layers_of_a_call_share_one_plan() -> None:
    method = ICCustom(parameters(), grid=GRID)
    first, second = (method.plan(Layer(i, "double", None, HEADS, DIM, TEXT, 24), Step(0)) for i in range(2))
    assert second is first
    assert method.plan(Layer(0, "double", None, HEADS, DIM, TEXT, 24), Step(1)) is not first


# Functions beside the method


def test_panels_are_numbered_from_the_left() -> None:
    assert panels((2, 6), 2).tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert panels((1, 6), 1, (4, 2)).tolist() == [0, 0, 0, 0, 1, 1]


def test_known_mask_is_the_inverse_of_flux_fill() -> None:
    painted = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert known_mask(painted, [1, 2]).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert not known_mask(torch.ones(2, 3), [3])[:, 3:].any()


@pytest.mark.parametrize(
    ("step", "options", "expected"),
    [
        (8, {}, True),
        (9, {}, False),
        (5, {"until": 0.5}, True),
        (6, {"until": 0.5}, False),
        (1, {"progressive": True}, False),
        (2, {"progressive": True}, True),
        (0, {"until": 0.0}, True),
    ],
)
def test_steps_at_which_the_background_is_preserved(step: int, options: dict, expected: bool) -> None:
    velocity, noise, source = torch.randn(3, 1, 5, 2)
    known = torch.tensor([1.0, 0, 0, 1, 0])[None, :, None]
    out = preserve(velocity, noise, source, known, step, 10, **options)
    torch.testing.assert_close(
        out, torch.where(known == 1, noise - source, velocity) if expected else velocity
    )


# Files


def test_save_and_load(tmp_path: Path) -> None:
    made = parameters(references=5, registers=2)
    file = made.save_pretrained(tmp_path / "mine")
    assert set(load_file(file)) == {f"{name}.weight" for name in NAMES}
    for path in (file, file.parent, str(file)):
        loaded = ICCustomParameters.from_pretrained(path).state_dict()
        assert all(torch.equal(loaded[name], t) for name, t in made.state_dict().items())


def test_loads_from_several_files_with_other_tensors(tmp_path: Path) -> None:
    made = parameters().to(torch.bfloat16)
    state = made.state_dict() | {"double_blocks.0.lora.weight": torch.ones(3)}
    for part in ("cond", "double"):
        here = {name: t.clone() for name, t in state.items() if name.startswith(part)}
        save_file(here, tmp_path / f"{part}.safetensors")
    rest = {name.removesuffix(".weight"): t.squeeze(0) for name, t in state.items() if name[0] in "ti"}
    assert rest["target_embedding"].shape == (HEADS * DIM,)
    save_file(rest, tmp_path / "rest.safetensors")
    loaded = ICCustomParameters.from_pretrained(tmp_path)
    assert loaded.hidden == HEADS * DIM
    assert all(
        t.dtype == torch.bfloat16 and torch.equal(t, state[name]) for name, t in loaded.state_dict().items()
    )


def test_wrong_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        ICCustomParameters.from_pretrained(tmp_path / "none")
    state = parameters().state_dict()
    save_file({n: t for n, t in state.items() if n.startswith(("cond", "idx"))}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="has no target_embedding, task_register_embeddings; expected all of"
    ):
        ICCustomParameters.from_pretrained(tmp_path)
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="cond_embedding is twice"):
        ICCustomParameters.from_pretrained(tmp_path)
    for name, wrong in (
        ("task_register_embeddings", torch.ones(10, 128)),
        ("idx_embedding", torch.ones(2, 64)),
    ):
        save_file(state | {f"{name}.weight": wrong}, tmp_path / "c.safetensors")
        with pytest.raises(ValueError, match=rf"expected \(1, n\).*{name} \({len(wrong)}, "):
            ICCustomParameters.from_pretrained(tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"d\.safetensors is not a safetensors file"):
        ICCustomParameters.from_pretrained(tmp_path / "d.safetensors")


# Errors


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("parameters", None),
        ("task", "position"),
        ("task", 0),
        ("references", 0),
        ("references", True),
        ("widths", 4),
        ("widths", (4, 0)),
        ("grid", 6),
        ("grid", (6, 0)),
        ("grid", (6, 4, 1)),
    ],
)
def test_wrong_knob_raises(knob: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{knob}: "):
        ICCustom(**{"parameters": ICCustomParameters(8)} | {knob: value})
    method = ICCustom(ICCustomParameters(8))
    with pytest.raises(ValueError, match=f"^{knob}: "):
        setattr(method, knob, value)
    assert getattr(method, knob) is not value or value is None


@pytest.mark.parametrize(
    ("hidden", "knobs", "match"),
    [
        (64, {"grid": GRID}, "^parameters: expected 128 channels for layer 0, got 64"),
        (128, {}, "^grid: expected .rows, columns."),
        (128, {"grid": (6, 5)}, "^grid: 6 x 5 tokens, but the call has 24"),
        (128, {"grid": GRID, "references": 2}, "^widths: 4 columns are not 3 equally wide panels"),
        (128, {"grid": GRID, "widths": (2, 1)}, "^widths: expected those of 2 panels, 4 tokens together"),
        (128, {"grid": GRID, "widths": (2, 1, 1)}, "^widths: expected those of 2 panels"),
        (128, {"grid": GRID, "references": 11}, "^references: expected at most 10"),
    ],
)
def test_call_that_does_not_fit_raises(hidden: int, knobs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ICCustom(ICCustomParameters(hidden), **knobs).plan(Layer(0, "double", None, 4, 32, TEXT, 24), Step(0))


@pytest.mark.parametrize("until", [-0.1, 1.5, float("nan")])
def test_wrong_share_raises(until: float) -> None:
    with pytest.raises(ValueError, match=r"^until: "):
        preserve(*torch.zeros(3, 1, 1, 1), torch.ones(1, 1, 1), 0, 1, until=until)
