"""DDIM inversion on a tiny UNet: the published formula, diffusers' sampler, and the error of a round trip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashbrush.integrations.pipelines.inversion.ddim import invert, sample
from flashbrush.integrations.pipelines.inversion.ddpm import DDPMSchedule, noise_predictor

from ...tiny import relative
from ...tiny_sd import TEXT_WIDTH, ddim, tiny_unet

STEPS = 6


@pytest.fixture(scope="module")
def predict():
    return noise_predictor(
        tiny_unet(), torch.randn(1, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    )


@pytest.fixture
def clean() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_inversion_is_the_published_formula(predict, clean) -> None:
    """Each step takes the noise prediction of the cleaner latents, at the timestep of the noisier level."""
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    x, alpha = clean, float(scheduler.final_alpha_cumprod)
    expected = [x]
    with torch.no_grad():
        for t in reversed(scheduler.timesteps.tolist()):
            higher = float(scheduler.alphas_cumprod[t])
            noise = predict(x, torch.tensor([t, t]))
            x = (higher / alpha) ** 0.5 * (x - (1 - alpha) ** 0.5 * noise) + (1 - higher) ** 0.5 * noise
            alpha = higher
            expected.insert(0, x)
    found = invert(clean, predict, DDPMSchedule.from_scheduler(ddim(), STEPS))
    assert relative(found, torch.stack(expected, 1)) <= 1e-5 and torch.equal(found[:, -1], clean)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_equals_diffusers(predict, clean, prediction: str) -> None:
    scheduler = ddim(prediction_type=prediction)
    scheduler.set_timesteps(STEPS)
    x = clean
    expected = [x]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t.expand(2)), t, x).prev_sample  # type: ignore[arg-type, union-attr]
            expected.append(x)
    found = sample(clean, predict, DDPMSchedule.from_scheduler(scheduler, STEPS))
    assert relative(found, torch.stack(expected, 1)) <= 1e-5


@pytest.mark.parametrize(("prediction", "bound"), [("epsilon", 0.5), ("v_prediction", 0.05)])
def test_round_trip_error_falls_with_steps_and_iterations(
    predict, clean, prediction: str, bound: float
) -> None:
    """It shrinks with more steps, and to rounding with more iterations; epsilon needs the looser bound."""
    error = {}
    for steps, iterations in ((6, 1), (24, 1), (6, 20)):
        schedule = DDPMSchedule.from_scheduler(ddim(prediction_type=prediction), steps)
        found = invert(clean, predict, schedule, iterations=iterations)
        error[steps, iterations] = relative(sample(found[:, 0], predict, schedule)[:, -1], clean)
    assert error[24, 1] <= 0.8 * error[6, 1] and error[24, 1] <= bound, error
    assert error[6, 20] <= 1e-4, error


def test_progress_is_reported_and_wrong_input_raises(predict, clean) -> None:
    schedule, done = DDPMSchedule.from_scheduler(ddim(), STEPS), []
    invert(clean, predict, schedule, progress=done.append)
    assert done == [1] * STEPS
    with pytest.raises(ValueError, match=r"^clean: "):
        invert(clean[0], predict, schedule)
    for iterations in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"^iterations: "):
            invert(clean, predict, schedule, iterations=iterations)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError):
        invert(clean, lambda x, t: x / 0, schedule)
