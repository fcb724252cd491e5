"""Edit-friendly DDPM inversion on a tiny UNet: the formulas, and that sampling reproduces its latents."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor

from flashbrush.integrations.pipelines.inversion.ddpm import (
    DDPMSchedule,
    invert,
    noise_predictor,
    sample,
    steps_left_out,
)

from ...tiny_sd import BETAS, TEXT_WIDTH, ddim, tiny_unet

STEPS = 6


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture
def clean() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def text(seed: int = 0) -> Tensor:
    return torch.randn(1, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds or (3, 4)]


def ddpm() -> DDPMScheduler:
    return DDPMScheduler(**{k: v for k, v in BETAS.items() if k != "steps_offset"}, clip_sample=False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("skip", [0, 2])
def test_sampling_reproduces_the_latents(
    unet, clean, prediction: str, eta: float, guidance: float, skip: int
) -> None:
    schedule = DDPMSchedule.from_scheduler(ddim(prediction_type=prediction), STEPS, eta)
    predict = noise_predictor(unet, text(), text(1), guidance)
    kept = invert(clean, predict, schedule, generators=generators(), skip=skip, keep_last=True)
    assert kept.latents.shape == (2, STEPS - skip + 1, 4, 8, 8) and kept.noise_maps.shape == (
        2,
        STEPS - skip,
        4,
        8,
        8,
    )
    back = sample(kept, predict, schedule)
    torch.testing.assert_close(back, kept.latents, rtol=1e-4, atol=1e-4)
    assert torch.equal(kept.latents[:, -1], clean) and torch.equal(kept.at(STEPS), clean)

    dropped = invert(clean, predict, schedule, generators=generators(), skip=skip)
    assert not dropped.noise_maps[:, -1].any() and torch.equal(
        dropped.noise_maps[:, :-1], kept.noise_maps[:, :-1]
    )
    assert torch.equal(dropped.latents, kept.latents)
    back = sample(dropped, predict, schedule)
    torch.testing.assert_close(back[:, :-1], kept.latents[:, :-1], rtol=1e-4, atol=1e-4)
    assert float((back[:, -1] - clean).abs().max()) > 1e-3


def test_other_noise_maps_give_other_latents(unet, clean) -> None:
    schedule, predict = DDPMSchedule.from_scheduler(ddim(), STEPS), noise_predictor(unet, text())
    found = invert(clean, predict, schedule, generators=generators())
    swapped = dataclasses.replace(found, noise_maps=found.noise_maps.flip(0))
    assert float((sample(swapped, predict, schedule)[:, -1] - clean).abs().max()) > 0.1


def test_a_step_equals_ddim_with_eta_1(clean) -> None:
    scheduler, x, output = ddim(), clean, torch.randn(clean.shape)
    schedule = DDPMSchedule.from_scheduler(scheduler, STEPS)
    scheduler.set_timesteps(STEPS)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.randn(clean.shape)
        stock = scheduler.step(output, int(t), x, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(schedule.step(x, output, i, noise), stock, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(schedule.noisy(x, noise, i), scheduler.add_noise(x, noise, t))
    a, b = schedule.alphas[1], schedule.alphas[2]
    variance = (1 - b) / (1 - a) * (1 - a / b)
    assert float(DDPMSchedule.from_scheduler(ddim(), STEPS, 0.5).deviations[1]) == pytest.approx(
        0.5 * float(variance) ** 0.5
    )


def test_a_step_equals_ddpm(clean) -> None:
    """Against the posterior of diffusers' own DDPMScheduler."""
    schedule, own = DDPMSchedule.from_scheduler(ddpm(), STEPS), ddpm()
    own.set_timesteps(STEPS)
    output = torch.randn(clean.shape)
    for i, t in enumerate(schedule.timesteps):
        stock = own.step(output, int(t), clean, generator=torch.Generator().manual_seed(5)).prev_sample
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(schedule.step(clean, output, i, noise), stock, rtol=1e-3, atol=1e-3)


def test_eta_below_1_follows_the_published_formula(clean) -> None:
    """In the term towards the latents it has eta, where DDIM has its square."""
    schedule, output = DDPMSchedule.from_scheduler(ddim(), STEPS, 0.5), torch.randn(clean.shape)
    a, b = (float(schedule.alphas[i]) for i in (2, 3))
    start = (clean - (1 - a) ** 0.5 * output) / a**0.5
    variance = (1 - b) / (1 - a) * (1 - a / b)
    expected = b**0.5 * start + (1 - b - 0.5 * variance) ** 0.5 * output
    torch.testing.assert_close(schedule.mean(clean, output, 2), expected, rtol=1e-5, atol=1e-5)


def test_v_prediction_equals_epsilon(clean) -> None:
    epsilon, v = (
        DDPMSchedule.from_scheduler(ddim(prediction_type=p), STEPS) for p in ("epsilon", "v_prediction")
    )
    noise = torch.randn(clean.shape)
    for i in range(STEPS):
        alpha = epsilon.alphas[i]
        x = epsilon.noisy(clean, noise, i)
        velocity = float(alpha.sqrt()) * noise - float((1 - alpha).sqrt()) * clean
        torch.testing.assert_close(epsilon.mean(x, noise, i), v.mean(x, velocity, i), rtol=1e-4, atol=1e-4)


def test_levels_are_noised_independently() -> None:
    clean = torch.zeros(1, 4, 32, 32)
    schedule = DDPMSchedule.from_scheduler(ddim(), STEPS)
    found = invert(clean, lambda x, t: x, schedule, generators=generators(0))
    noise = found.latents[0, :-1] / (1 - schedule.alphas[:-1]).sqrt().float().reshape(-1, 1, 1, 1)
    correlation = torch.corrcoef(noise.flatten(1))
    torch.testing.assert_close(correlation, torch.eye(STEPS), atol=0.06, rtol=0)
    torch.testing.assert_close(noise.flatten(1).std(1), torch.ones(STEPS), atol=0.06, rtol=0)


def test_an_image_does_not_depend_on_the_others(unet, clean) -> None:
    schedule, predict = DDPMSchedule.from_scheduler(ddim(), STEPS), noise_predictor(unet, text())
    both = invert(clean, predict, schedule, generators=generators(3, 4))
    for i, seed in enumerate((3, 4)):
        alone = invert(clean[i : i + 1], predict, schedule, generators=generators(seed))
        assert torch.equal(both.latents[i], alone.latents[0]) and torch.equal(
            both.noise_maps[i], alone.noise_maps[0]
        )
    other = invert(clean, predict, schedule, generators=generators(5, 4))
    assert not torch.equal(other.latents[0, 0], both.latents[0, 0]) and torch.equal(
        other.latents[1], both.latents[1]
    )


def test_steps_left_out_are_a_share_of_the_run() -> None:
    assert [steps_left_out(None, steps, (32, 100)) for steps in (100, 50, 3, 1)] == [32, 16, 0, 0]
    assert steps_left_out(2, 3, (32, 100)) == 2
    with pytest.raises(ValueError, match=r"skip: .*0 to 2.*got 3"):
        steps_left_out(3, 3, (32, 100))


def test_skip_and_batch_do_not_change_the_noise(unet, clean) -> None:
    schedule, predict = DDPMSchedule.from_scheduler(ddim(), STEPS), noise_predictor(unet, text())
    whole = invert(clean, predict, schedule, generators=generators())
    late = invert(clean, predict, schedule, generators=generators(), skip=3)
    assert torch.equal(late.latents, whole.latents[:, 3:]) and torch.equal(late.at(4), whole.at(4))
    done: list[int] = []
    small = invert(clean, predict, schedule, generators=generators(), batch=4, progress=done.append)
    assert torch.equal(small.latents, whole.latents) and done == [4, 2, 4, 2]
    torch.testing.assert_close(small.noise_maps, whole.noise_maps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(late.noise_map(4), whole.noise_map(4), rtol=1e-3, atol=1e-3)


def test_a_ddpm_scheduler_ends_without_noise(unet, clean) -> None:
    schedule, predict = DDPMSchedule.from_scheduler(ddpm(), STEPS), noise_predictor(unet, text())
    assert float(schedule.alphas[-1]) == 1.0 and float(schedule.deviations[-1]) == 0.0
    found = invert(clean, predict, schedule, generators=generators())
    back = sample(found, predict, schedule)
    torch.testing.assert_close(back[:, :-1], found.latents[:, :-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"keep_last: .*no noise"):
        invert(clean, predict, schedule, generators=generators(), keep_last=True)


def test_zero_terminal_snr_needs_v_prediction(unet, clean) -> None:
    """The first level is pure noise, where only v-prediction defines x0."""
    levels = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}
    schedule = DDPMSchedule.from_scheduler(ddim(prediction_type="v_prediction", **levels), STEPS)
    alphas = schedule.alphas.clone()
    alphas[0] = 0
    schedule = dataclasses.replace(schedule, alphas=alphas)
    predict = noise_predictor(unet, text())
    found = invert(clean, predict, schedule, generators=generators(), keep_last=True)
    torch.testing.assert_close(sample(found, predict, schedule), found.latents, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"prediction: .*epsilon"):
        dataclasses.replace(schedule, prediction="epsilon")


def test_guidance_matches_its_formula(unet, clean) -> None:
    t = torch.tensor(100)
    given, without = (noise_predictor(unet, text(seed))(clean, t.expand(2)) for seed in (0, 1))
    guided = noise_predictor(unet, text(), text(1), 3.5)(clean, t.expand(2))
    torch.testing.assert_close(guided, without + 3.5 * (given - without), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"guidance: 3\.5 needs"):
        noise_predictor(unet, text(), guidance=3.5)
    with pytest.raises(ValueError, match=r"guidance: .*nan"):
        noise_predictor(unet, text(), text(1), float("nan"))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"steps": 0}, ValueError, "steps: .*1 to 1000, got 0"),
        ({"steps": 2.0}, ValueError, r"steps: .*2\.0"),
        ({"steps": 1000}, ValueError, "steps: 1000 steps .*reach timestep 1000"),
        ({"eta": 0}, ValueError, "eta: .*0"),
        ({"eta": 1.5}, ValueError, r"eta: .*1\.5"),
        ({"scheduler": EulerDiscreteScheduler()}, TypeError, "scheduler: .*EulerDiscreteScheduler"),
        ({"scheduler": ddim(prediction_type="sample")}, ValueError, "prediction: .*'sample'"),
    ],
)
def test_wrong_schedules_raise(change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        DDPMSchedule.from_scheduler(**{"scheduler": ddim(), "steps": STEPS} | change)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"clean": torch.zeros(4, 8, 8)}, ValueError, r"clean: .*\(4, 8, 8\)"),
        ({"generators": generators(1)}, ValueError, "generators: expected one for each of 2 images, got 1"),
        ({"skip": STEPS}, ValueError, "skip: .*0 to 5.*got 6"),
        ({"skip": True}, ValueError, "skip: .*True"),
        ({"batch": 0}, ValueError, "batch: .*0"),
        ({"predict": lambda x, t: x * float("nan")}, FloatingPointError, "not finite"),
    ],
)
def test_wrong_inversions_raise(clean, change: dict, error: type[Exception], match: str) -> None:
    given = {"clean": clean, "predict": lambda x, t: x, "generators": generators()} | change
    with pytest.raises(error, match=match):
        invert(schedule=DDPMSchedule.from_scheduler(ddim(), STEPS), **given)
