"""VisualICLPipeline on a tiny checkpoint: against an eager run; effects of cache, seed and knobs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import flashbrush as fb
from flashbrush.integrations.diffusers import Handle
from flashbrush.integrations.methods import InContextRoles, VisualInContext
from flashbrush.integrations.pipelines import VisualICLPipeline
from flashbrush.integrations.pipelines.inversion.cache import InversionCache
from flashbrush.integrations.pipelines.inversion.ddpm import (
    DDPMSchedule,
    Inversion,
    invert,
    noise_predictor,
    sample,
)
from flashbrush.integrations.pipelines.shared.visual_icl_tasks import TASKS
from flashbrush.integrations.pipelines.visual_icl import linear_decay

from ..tiny_sd import ddim, tiny_unet

STEPS, SKIP = 5, 1
SIDE = 64


@pytest.fixture(scope="module")
def loaded(sd_checkpoint: Path) -> VisualICLPipeline:
    return VisualICLPipeline.from_pretrained(sd_checkpoint, dtype=torch.float32)


@pytest.fixture
def pipe(loaded: VisualICLPipeline, tmp_path: Path) -> Iterator[VisualICLPipeline]:
    """With an empty cache, for tests that do not change the model."""
    loaded.cache = InversionCache(tmp_path / "cache")
    yield loaded
    loaded.pipe.unet._forward_pre_hooks.clear()
    loaded.pipe.set_progress_bar_config()


@pytest.fixture
def changed(sd_checkpoint: Path, tmp_path: Path) -> VisualICLPipeline:
    """For tests that change the model."""
    return VisualICLPipeline.from_pretrained(sd_checkpoint, dtype=torch.float32, cache=tmp_path / "cache")


def photo(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def truth(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A picture of two colours."""
    return photo(seed, size).convert("L").point([0] * 128 + [255] * 128).convert("RGB")


PAIRS = [(photo(0), truth(1)), (photo(2), truth(3))]
QUERY = photo(4)


def run(pipe: VisualICLPipeline, prompts: Any = None, query: Any = QUERY, **more: Any):
    options = {"steps": STEPS, "skip": SKIP, "seed": 0, "progress": False, **more}
    return pipe(PAIRS[:1] if prompts is None else prompts, query, **options)


def calls(pipe: VisualICLPipeline) -> list[int]:
    """Batch sizes of the UNet's calls from now on."""
    batches: list[int] = []
    pipe.pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    return batches


class Eager(AttnProcessor2_0):
    """Stock attention; the last item's is the paper's, with its map in memory."""

    def __init__(self, temperature: float, beta: float, clip: tuple[float, float] | None) -> None:
        super().__init__()
        self.knobs = temperature, beta, clip

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stock = super().__call__(attn, hidden_states, *args, **kwargs)
        if len(hidden_states) == 1:
            return stock
        temperature, beta, clip = self.knobs
        q, k, v = (
            f(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        images, truths = torch.cat(k[0:-3:2].split(1), 2)[0], torch.cat(v[1:-3:2].split(1), 2)[0]
        alpha = (q[-3] @ images.mT / (temperature * math.sqrt(q.shape[-1]))).softmax(-1)
        alpha = alpha.mean(-1, keepdim=True) + beta * (alpha - alpha.mean(-1, keepdim=True))
        out = (alpha if clip is None else alpha.clamp(*clip)) @ truths
        stock[-1] = attn.to_out[0](out.transpose(0, 1).flatten(1))
        return stock


def inverted(pipe: VisualICLPipeline, image: Image.Image, skip: int = SKIP) -> Inversion:
    """The inversion of an image in the pipeline's cache."""
    clean = pipe._encode(image)
    for path in pipe.cache.folder.iterdir():
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["settings"])
        settings.pop("version")
        kept = InversionCache(pipe.cache.folder).get(settings)
        if kept is not None and torch.equal(kept.latents[0, -1], clean[0]):
            assert kept.skip == skip
            return kept
    raise AssertionError("the image has not been inverted")


@torch.no_grad()
def eagerly(
    pipe: VisualICLPipeline, pairs: list, knobs: tuple, gamma: float = 3.5, adain: bool = True
) -> Tensor:
    """The whole loop with diffusers' own scheduler and processors."""
    unet, scheduler = pipe.pipe.unet, ddim()
    scheduler.set_timesteps(STEPS)
    kept = [inverted(pipe, image) for pair in pairs for image in pair] + [inverted(pipe, QUERY)]
    text = pipe.pipe.encode_prompt("", "cpu", 1, False)[0]
    stock = unet.attn_processors
    mine = {
        name: Eager(*knobs) if name.startswith("up") and "attn1" in name else p for name, p in stock.items()
    }
    latents = kept[-1].latents[:, 0]
    for i, t in enumerate(scheduler.timesteps[SKIP:]):
        batch = torch.cat([entry.latents[:, i] for entry in kept] + [latents, latents])
        unet.set_attn_processor(dict(mine))
        out = unet(batch, t, text.expand(len(batch), -1, -1)).sample
        eps = out[-2:-1] + gamma * (STEPS - SKIP - i) / STEPS * (out[-1:] - out[-2:-1])
        noise = kept[-1].noise_maps[:, i]
        latents = scheduler.step(eps, int(t), latents, eta=1.0, variance_noise=noise).prev_sample
        if adain:
            style = torch.stack([entry.latents[0, i + 1] for entry in kept[1:-1:2]], 2).flatten(
                1
            )  # (channels, pixels)
            mean, std = latents.mean((2, 3), keepdim=True), (latents.var((2, 3), keepdim=True) + 1e-5).sqrt()
            latents = (latents - mean) / std * (style.var(1) + 1e-5).sqrt()[:, None, None] + style.mean(1)[
                :, None, None
            ]
    unet.set_attn_processor(stock)
    return latents


@pytest.mark.parametrize(
    "pairs", [PAIRS[:1], PAIRS, [*PAIRS, (photo(7), truth(8))]], ids=["one pair", "two", "three"]
)
@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "unclipped"])
def test_equals_an_eager_run(pipe, pairs: list, clip: tuple[float, float] | None) -> None:
    result = run(pipe, pairs, method=VisualInContext(clip=clip))
    torch.testing.assert_close(result.latents, eagerly(pipe, pairs, (0.4, 1.67, clip)), rtol=1e-4, atol=1e-4)
    plain = run(pipe, pairs, gamma=0).latents
    assert float((result.latents - plain).abs().max()) > 1e-2


def test_knobs_reach_the_attention(pipe) -> None:
    method = VisualInContext(temperature=0.8, contrast=1.2)
    result = run(pipe, method=method, gamma=2.0, use_adain=False)
    expected = eagerly(pipe, PAIRS[:1], (0.8, 1.2, (0.0, 1.0)), 2.0, adain=False)
    torch.testing.assert_close(result.latents, expected, rtol=1e-4, atol=1e-4)
    assert method.items is None
    plain = run(pipe, gamma=0, use_adain=False).latents
    # The method counts skipped steps.
    late, last = (
        run(pipe, method=VisualInContext(steps=(n, None)), use_adain=False).latents
        for n in (STEPS, STEPS - 1)
    )
    torch.testing.assert_close(late, plain, rtol=1e-4, atol=1e-4)
    assert float((last - plain).abs().max()) > 1e-3


def test_without_swap_guidance_sampling_is_plain(pipe) -> None:
    batches = calls(pipe)
    plain = run(pipe, gamma=0, use_adain=False)
    assert batches[-(STEPS - SKIP) :] == [1] * (STEPS - SKIP)
    kept = inverted(pipe, QUERY)
    predict = noise_predictor(pipe.pipe.unet, pipe._embed(""))
    schedule = DDPMSchedule.from_scheduler(ddim(), STEPS)
    torch.testing.assert_close(plain.latents, sample(kept, predict, schedule)[:, -1], rtol=1e-4, atol=1e-4)
    knobs = VisualInContext(temperature=5.0, contrast=9.0)
    assert torch.equal(run(pipe, gamma=0, use_adain=False, method=knobs).latents, plain.latents)


def test_each_step_is_one_unet_call(pipe) -> None:
    batches = calls(pipe)
    run(pipe, PAIRS, use_cache=False)
    levels = STEPS - SKIP
    assert batches == [levels] * 5 + [2 * 2 + 3] * levels


def test_gamma_may_be_a_function_of_the_step(pipe) -> None:
    asked = []

    def gamma(step: int, steps: int) -> float:
        asked.append((step, steps))
        return linear_decay(3.5, step, steps)

    assert torch.equal(run(pipe, gamma=gamma).latents, run(pipe).latents)
    assert asked == [(i, STEPS) for i in range(SKIP, STEPS)]
    assert [linear_decay(2.0, i, 4) for i in range(4)] == [2.0, 1.5, 1.0, 0.5]
    batches = calls(pipe)
    some = run(pipe, gamma=lambda step, steps: float(step == 3))
    assert batches == [1, 1, 5, 1]
    assert float((some.latents - run(pipe, gamma=0).latents).abs().max()) > 1e-3


def test_the_prediction_has_the_truths_statistics(pipe) -> None:
    for pairs in (PAIRS[:1], PAIRS):
        latents = run(pipe, pairs).latents
        style = torch.cat([inverted(pipe, ground).latents[0, -1].flatten(1) for _, ground in pairs], 1)
        torch.testing.assert_close(latents[0].flatten(1).mean(1), style.mean(1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(latents[0].flatten(1).std(1), style.std(1), rtol=1e-2, atol=1e-3)
    style = inverted(pipe, PAIRS[0][1]).latents[:, -1]
    torch.testing.assert_close(run(pipe).latents, fb.adain(run(pipe).latents, style), rtol=1e-3, atol=1e-3)


def test_runs_are_bitwise_equal_with_and_without_the_cache(pipe, changed) -> None:
    fresh = run(pipe, PAIRS)
    changed.cache = InversionCache(pipe.cache.folder / "other")
    for result in (run(pipe, PAIRS), run(pipe, PAIRS, use_cache=False), run(changed, PAIRS)):
        assert torch.equal(result.latents, fresh.latents) and result.image.tobytes() == fresh.image.tobytes()


def test_each_image_is_inverted_once(pipe, changed) -> None:
    batches = calls(pipe)
    first = run(pipe, PAIRS)
    assert len(batches) == 5 + STEPS - SKIP and first.reused == 0
    batches.clear()
    assert run(pipe, PAIRS, photo(9)).reused == 4
    assert len(batches) == 1 + STEPS - SKIP
    batches.clear()
    assert run(pipe, PAIRS[::-1], photo(9)).reused == 5
    assert len(batches) == STEPS - SKIP
    assert len(list(pipe.cache.folder.iterdir())) == 6
    changed.cache = pipe.cache
    batches = calls(changed)
    assert torch.equal(run(changed, PAIRS).latents, first.latents) and len(batches) == STEPS - SKIP


def test_settings_of_an_inversion_have_files_of_their_own(pipe) -> None:
    run(pipe)
    run(pipe, gamma=1.0, method=VisualInContext(0.8), use_adain=False)
    run(pipe, inversion_guidance=2.0)  # no effect: both texts are empty
    kept = 3
    assert len(list(pipe.cache.folder.iterdir())) == kept
    for change in (
        {"steps": 6},
        {"skip": 2},
        {"seed": 1},
        {"text": "a cat"},
        {"inversion_batch": 3},
        {"width": 48, "height": 48},
        {"negative_text": "b", "inversion_guidance": 2.0},
    ):
        run(pipe, **change)
        kept += 3
        assert len(list(pipe.cache.folder.iterdir())) == kept, change


def test_a_changed_model_or_scheduler_inverts_again(changed) -> None:
    run(changed)
    with torch.no_grad():
        changed.pipe.unet.conv_out.bias += 0.1
    run(changed)
    assert len(list(changed.cache.folder.iterdir())) == 6
    changed.pipe.scheduler = ddim(timestep_spacing="trailing")
    run(changed)
    assert len(list(changed.cache.folder.iterdir())) == 9


def test_use_cache_false_writes_nothing(pipe) -> None:
    run(pipe, use_cache=False)
    assert not pipe.cache.folder.exists()


def test_noise_of_different_images_is_uncorrelated(pipe) -> None:
    run(pipe, skip=0)
    noise = torch.stack([inverted(pipe, image, 0).latents[0, 0].flatten() for image in (*PAIRS[0], QUERY)])
    clean = torch.stack([inverted(pipe, image, 0).latents[0, -1].flatten() for image in (*PAIRS[0], QUERY)])
    alpha = DDPMSchedule.from_scheduler(ddim(), STEPS).alphas[0].float()
    correlation = torch.corrcoef(noise - alpha.sqrt() * clean)
    assert float((correlation - torch.eye(3)).abs().max()) < 0.25


def test_seed_or_generator_decides_the_result(pipe) -> None:
    first, other = run(pipe, seed=3), run(pipe, seed=4)
    assert not torch.equal(first.latents, other.latents) and (first.seed, other.seed) == (3, 4)
    drawn = [run(pipe, seed=None, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(drawn[0].latents, drawn[1].latents) and drawn[0].seed is None
    results = []
    for start in (5, 5, 6):
        torch.manual_seed(start)
        results.append(run(pipe, seed=None))
    assert torch.equal(results[0].latents, results[1].latents) and results[0].seed != results[2].seed
    assert torch.equal(results[2].latents, run(pipe, seed=results[2].seed).latents)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_reads_its_data(pipe, task: str) -> None:
    pairs = [(photo(0, (72, 56)), truth(1, (72, 56)))]
    result = run(pipe, pairs, photo(4, (72, 56)), task=task)
    assert result.task == task and result.image.size == result.picture.size == (72, 56)
    shape = {"detection": (4,), "keypoints": (1, 2), "colourisation": (56, 72, 3)}.get(task, (56, 72))
    if task != "detection" or result.data is not None:
        assert np.asarray(result.data).shape == shape
    assert (result.palette is not None) is (task in ("semantic", "keypoints"))


def test_given_palette_is_used(pipe) -> None:
    palette = {"sky": (0, 0, 255), "ground": (120, 80, 20), "tree": (0, 160, 0)}
    result = run(pipe, task="semantic", palette=palette)
    assert result.palette.tolist() == [list(colour) for colour in palette.values()] and result.data.max() <= 2
    with pytest.raises(ValueError, match=r"palette: .*at most 256 colours"):
        run(pipe, [(photo(0), photo(1))], task="semantic")


def test_result_has_the_query_s_size(pipe) -> None:
    small = [(photo(0, (80, 40)), truth(1, (80, 40)))]
    result = run(pipe, small, photo(4, (100, 60)), width=48, height=32)
    assert result.size == (48, 32) and result.image.size == (100, 60) and result.latents.shape == (1, 4, 4, 6)
    assert run(pipe, small, photo(4, (80, 40))).size == (80, 40)
    assert pipe.size((640, 320)) == (88, 48) and pipe.size((640, 320), width=128) == (128, 64)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_both_prediction_types_match_plain_sampling(changed, prediction: str) -> None:
    pipe = changed
    pipe.pipe.scheduler = ddim(prediction_type=prediction)
    result = run(pipe, gamma=0, use_adain=False)
    schedule = DDPMSchedule.from_scheduler(pipe.pipe.scheduler, STEPS)
    assert schedule.prediction == prediction
    predict = noise_predictor(pipe.pipe.unet, pipe._embed(""))
    expected = sample(inverted(pipe, QUERY), predict, schedule)[:, -1]
    torch.testing.assert_close(result.latents, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_is_finite_and_repeatable(sd_checkpoint, tmp_path) -> None:
    half = VisualICLPipeline.from_pretrained(sd_checkpoint, cache=tmp_path)
    assert half.pipe.unet.dtype == half.pipe.vae.dtype == torch.bfloat16
    result = run(half)
    assert result.latents.dtype == torch.float32 and bool(result.latents.isfinite().all())
    assert torch.equal(run(half).latents, result.latents)


def test_raises_when_latents_are_not_finite(changed) -> None:
    pipe = changed
    with torch.no_grad():
        pipe.pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        run(pipe)
    assert Handle.of(pipe.pipe.unet) is None and not pipe.cache.folder.exists()


def test_progress_bars_show_only_when_asked_for(pipe, capsys) -> None:
    run(pipe, progress=True)
    said = capsys.readouterr().err
    assert "inverting" in said and "sampling" in said and f"{3 * (STEPS - SKIP)}/{3 * (STEPS - SKIP)}" in said
    run(pipe)
    pipe.pipe.set_progress_bar_config(disable=True)
    run(pipe, progress=True)
    assert capsys.readouterr().err == ""


def wide(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (9, 99, 199))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prompts": []}, ValueError, "prompts: expected at least one pair.*none"),
        ({"prompts": "a.png:b.png"}, TypeError, "prompts: .*pairs.*str"),
        ({"prompts": PAIRS[0]}, TypeError, r"prompts\[0\]: expected a pair.*Image"),
        ({"prompts": [PAIRS[0], (photo(0),)]}, ValueError, r"prompts\[1\]: expected a pair.*got 1 of them"),
        ({"prompts": [(photo(0), None)]}, ValueError, r"prompts\[0\]: expected a pair.*got 1 of them"),
        (
            {"prompts": [("none.png", photo(0))]},
            FileNotFoundError,
            r"prompts\[0\]: image: no such file: none.png",
        ),
        ({"prompts": [(photo(0), 7)]}, TypeError, r"prompts\[0\]: ground truth: .*int"),
        (
            {"prompts": [(photo(0), wide((64, 32)))]},
            ValueError,
            r"prompts\[0\]: .*its image's size, 64x64 .*64x32",
        ),
        (
            {"prompts": [(wide((32, 64)), wide((32, 64)))]},
            ValueError,
            r"prompts\[0\]: .*query's size, 64x64 .*32x64; give width",
        ),
        ({"query": np.zeros((8, 8), np.float32)}, TypeError, "query: .*float32"),
        ({"task": "depth"}, ValueError, "task: expected one of segmentation.*'depth'"),
        ({"steps": 0}, ValueError, "steps: .*0"),
        ({"steps": 5.0}, ValueError, r"steps: .*5\.0"),
        ({"skip": STEPS}, ValueError, "skip: .*0 to 4.*got 5"),
        ({"gamma": float("nan")}, ValueError, "gamma: .*nan"),
        ({"gamma": "much"}, TypeError, "gamma: .*'much'"),
        ({"gamma": True}, TypeError, "gamma: .*True"),
        ({"gamma": lambda step, steps: float("inf")}, ValueError, "gamma of step 1: .*inf"),
        ({"gamma": lambda step, steps: None}, ValueError, "gamma of step 1: .*None"),
        ({"method": "swap"}, TypeError, "method: expected a VisualInContext, got str"),
        ({"method": VisualInContext(items=InContextRoles.stacked(1))}, ValueError, "method: .*items=None"),
        ({"text": None}, TypeError, "text: .*NoneType"),
        ({"inversion_guidance": float("inf")}, ValueError, "inversion_guidance: .*inf"),
        ({"inversion_batch": 0}, ValueError, "inversion_batch: .*0"),
        ({"width": 30}, ValueError, "width: .*multiple of 8.*30"),
        ({"height": -8}, ValueError, "height: .*-8"),
        ({"seed": -1}, ValueError, "seed: .*-1"),
        ({"seed": 0.5}, ValueError, r"seed: .*0\.5"),
        ({"generator": torch.Generator()}, ValueError, "seed: expected it or generator"),
        ({"seed": None, "generator": 3}, TypeError, r"generator: .*torch\.Generator.*int"),
    ],
)
def test_wrong_input_raises(pipe, change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run(pipe, **change)
    assert Handle.of(pipe.pipe.unet) is None and not pipe.cache.folder.exists()


def test_wrong_models_raise(sd_checkpoint, tmp_path, pipe) -> None:
    with pytest.raises(TypeError, match="pipe: expected a StableDiffusionPipeline, got str"):
        VisualICLPipeline(str(sd_checkpoint))
    for folder, parts in (("flux", ("transformer", "vae")), ("empty", ())):
        for part in parts:
            (tmp_path / folder / part).mkdir(parents=True)
        (tmp_path / folder).mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"model: .*flux is no UNet model .*it has a transformer"):
        VisualICLPipeline.from_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match=r"model: .*empty is not .*it has no model_index.json, unet, vae"):
        VisualICLPipeline.from_pretrained(tmp_path / "empty")
    parts = dict(pipe.pipe.components)
    for change, match in (
        ({"unet": tiny_unet(in_channels=9)}, "model: .*4 channels.*takes 9"),
        ({"unet": tiny_unet(class_embed_type="timestep")}, "model: .*further inputs"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "scheduler: .*betas.*FlowMatch"),
    ):
        stock = StableDiffusionPipeline(**parts | change, requires_safety_checker=False)
        with pytest.raises(ValueError, match=match):
            VisualICLPipeline(stock)


def test_the_cached_inversion_satisfies_the_formula(pipe) -> None:
    run(pipe)
    kept = inverted(pipe, QUERY)
    schedule, predict = (
        DDPMSchedule.from_scheduler(ddim(), STEPS),
        noise_predictor(pipe.pipe.unet, pipe._embed("")),
    )
    again = invert(kept.latents[:, -1], predict, schedule, generators=[torch.Generator()], skip=SKIP)
    assert again.latents.shape == kept.latents.shape and not kept.noise_maps[:, -1].any()
    maps = (
        kept.latents[:, 1] - schedule.mean(kept.at(1), predict(kept.at(1), schedule.timesteps[1:2]), 1)
    ) / float(schedule.deviations[1])
    torch.testing.assert_close(kept.noise_map(1), maps, rtol=1e-3, atol=1e-3)
