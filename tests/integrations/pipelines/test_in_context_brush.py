"""InContextBrushPipeline on the tiny model: known pixels and tokens stay bitwise, knobs change the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline, PyramidAttentionBroadcastConfig
from PIL import Image

from flashbrush.integrations import InContextBrush, InContextBrushPipeline
from flashbrush.integrations.diffusers import Handle, apply
from flashbrush.integrations.pipelines import images as im

STEPS = 3


def run(pipe, photos, **more):
    arguments = {"seed": 0, "steps": STEPS, "progress": False, **photos, **more}
    return pipe(arguments.pop("prompt", "a red cup"), **arguments)


def test_pixels_and_tokens_outside_of_the_mask_stay_bitwise(pipe, photos) -> None:
    result = run(pipe, photos)
    photo, mask = np.asarray(Image.open(photos["image"])), np.asarray(Image.open(photos["mask"]))
    picture = np.asarray(result.images[0])
    assert picture.shape == photo.shape
    assert (picture[mask == 0] == photo[mask == 0]).all()
    assert (picture[mask > 0] != photo[mask > 0]).mean() > 0.5
    known = result.known[:, :, None].expand_as(result.latents)
    assert torch.equal(result.latents[known], result.source_latents[known])
    assert not torch.equal(result.latents, result.source_latents) and bool(
        torch.isfinite(result.latents).all()
    )
    # Known are all tokens of the subject's panel, and those of the photo's that the hole does not touch.
    tokens = result.known[0].reshape(2, 48 // 8, 64 // 8)
    hole = torch.zeros(6, 8, dtype=torch.bool)
    hole[1:5, 2:6] = True
    assert bool(tokens[0].all()) and torch.equal(~tokens[1], hole)


def test_known_tokens_are_noised_to_each_step_s_level(pipe, photos, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashbrush.integrations.pipelines import in_context_brush as module

    seen = []
    blend = module.blend_latents

    def spy(generated, source, noise, mask, sigma):
        out = blend(generated, source, noise, mask, sigma)
        seen.append((out, source, noise, mask, sigma))
        return out

    monkeypatch.setattr(module, "blend_latents", spy)
    run(pipe, photos)
    sigmas = [float(s) for s in pipe.pipe.scheduler.sigmas[1:]]
    assert [entry[4] for entry in seen] == sigmas and sigmas[-1] == 0.0 and len(sigmas) == STEPS
    for out, source, noise, mask, sigma in seen:
        assert noise is seen[0][2]
        line = (1 - sigma) * source + sigma * noise
        torch.testing.assert_close(torch.where(mask, 0, out), torch.where(mask, 0, line))


def test_head_gains_are_between_1_and_1_2(pipe, photos) -> None:
    result = run(pipe, photos)
    assert result.head_gains.shape == (STEPS, 8, 1, 6)
    assert result.layer_kinds == ["double"] * 3 + ["single"] * 5
    low, high = result.head_gains.amin(3), result.head_gains.amax(3)
    torch.testing.assert_close(low, torch.ones_like(low))
    torch.testing.assert_close(high, torch.full_like(high, 1.2), atol=1e-3, rtol=0)
    assert Handle.of(pipe.pipe.transformer) is None


def test_head_gains_are_nan_where_a_layer_was_cached(pipe, photos) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("single_transformer_blocks",),
    )
    pipe.pipe.transformer.enable_cache(config)
    try:
        gains = run(pipe, photos).head_gains
    finally:
        pipe.pipe.transformer.disable_cache()
    assert gains.shape == (STEPS, 8, 1, 6)
    cached = gains.isnan().all(3)[:, :, 0]
    assert not cached[:, :3].any() and not cached[0].any() and bool(cached[1, 3:].any())


def test_neutral_knobs_equal_flux_fill_with_blending(pipe, photos) -> None:
    """Against FluxFillPipeline's own call, with the blending in its step callback."""
    neutral = run(pipe, photos, method=InContextBrush(0, 0, gain_span=0), paste_back=False)
    assert torch.equal(neutral.head_gains, torch.ones_like(neutral.head_gains))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(neutral.latents.shape, generator=generator)

    def blend(stock, index, timestep, tensors):
        sigma = stock.scheduler.sigmas[index + 1]
        line = (1 - sigma) * neutral.source_latents + sigma * noise
        return {"latents": torch.where(neutral.known[:, :, None], line, tensors["latents"])}

    inputs = {
        "prompt": "a red cup",
        "image": neutral.diptychs[0],
        "mask_image": neutral.masks[0],
        "width": 64,
        "height": 96,
    }
    inputs |= {"num_inference_steps": STEPS, "max_sequence_length": 16, "output_type": "latent"}
    stock = pipe.pipe(**inputs, latents=noise, generator=generator, callback_on_step_end=blend).images
    torch.testing.assert_close(neutral.latents, stock, rtol=1e-4, atol=1e-4)
    changed = run(pipe, photos, method=InContextBrush(0.9, 0.9, gain_span=0.5))
    assert not torch.allclose(changed.latents, stock, rtol=1e-2, atol=1e-2)


def test_apply_without_a_method_equals_the_stock_pipeline(pipe, photos) -> None:
    panels = run(pipe, photos)
    inputs = {
        "prompt": "a red cup",
        "image": panels.diptychs[0],
        "mask_image": panels.masks[0],
        "width": 64,
        "height": 96,
    }
    inputs |= {"num_inference_steps": STEPS, "max_sequence_length": 16, "output_type": "latent"}
    stock = pipe.pipe(**inputs, generator=torch.Generator().manual_seed(0)).images
    with apply(pipe.pipe.transformer):
        plain = pipe.pipe(**inputs, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(plain, stock, rtol=1e-4, atol=1e-4)
    after = pipe.pipe(**inputs, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(after, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_known_pixels_and_tokens(checkpoint, photos, dtype: torch.dtype) -> None:
    half = InContextBrushPipeline.from_pretrained(checkpoint, dtype=dtype)
    result = run(half, photos)
    assert result.latents.dtype == dtype and bool(result.latents.isfinite().all())
    known = result.known[:, :, None].expand_as(result.latents)
    assert torch.equal(result.latents[known], result.source_latents[known])
    photo, mask = np.asarray(Image.open(photos["image"])), np.asarray(Image.open(photos["mask"]))
    assert (np.asarray(result.images[0])[mask == 0] == photo[mask == 0]).all()


def test_knobs_can_be_arguments(pipe, photos) -> None:
    knobs = {"alpha_prompt": 0.7, "alpha_subject": 0.1, "gain_span": 0.4}
    given = run(pipe, photos, **knobs)
    assert torch.equal(given.latents, run(pipe, photos, method=InContextBrush(**knobs)).latents)
    method = InContextBrush(0.7, 0.9, gain_span=0.4, gain_norm="softmax")
    mixed = run(pipe, photos, method=method, alpha_subject=0.1)
    expected = run(pipe, photos, method=InContextBrush(**knobs, gain_norm="softmax"))
    assert torch.equal(mixed.latents, expected.latents) and not torch.equal(mixed.latents, given.latents)
    assert method.alpha_subject == 0.9


def test_a_generator_equals_its_seed(pipe, photos) -> None:
    first = run(pipe, photos, seed=3)
    same = run(pipe, photos, seed=None, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first.latents, same.latents) and (first.seeds, same.seeds) == ([3], [None])
    one = torch.Generator().manual_seed(3)
    draws = run(pipe, photos, seed=None, generator=one, prompt=["a red cup"] * 2)
    assert not torch.equal(draws.latents[0], draws.latents[1])
    each = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both, seeded = (
        run(pipe, photos, seed=None, generator=each),
        run(pipe, photos, seed=3, prompt=["a red cup"] * 2),
    )
    assert torch.equal(both.latents, seeded.latents) and seeded.seeds == [3, 4]


def test_without_a_seed_torch_s_default_generator_is_used(pipe, photos) -> None:
    results = []
    for start in (5, 5, 6):
        torch.manual_seed(start)
        results.append(run(pipe, photos, seed=None))
    assert torch.equal(results[0].latents, results[1].latents) and results[0].seeds != results[2].seeds
    assert torch.equal(results[2].latents, run(pipe, photos, seed=results[2].seeds).latents)


def test_raises_when_latents_overflow(pipe, photos) -> None:
    with pytest.raises(FloatingPointError, match=r"latents.*float32"):
        run(pipe, photos, alpha_prompt=1e38, alpha_subject=1e38)
    assert Handle.of(pipe.pipe.transformer) is None


def test_a_scheduler_of_second_order_is_refused(checkpoint, photos) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    own = InContextBrushPipeline.from_pretrained(checkpoint)
    own.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match=r"scheduler: .*order 2"):
        run(own, photos)


def test_the_method_plans_every_step(pipe, photos) -> None:
    planned = []

    class Recording(InContextBrush):
        def plan(self, layer, step):
            if layer.index == 0:
                planned.append((step.index, step.count, step.sigma, layer.grid))
            return super().plan(layer, step)

    run(pipe, photos, method=Recording())
    sigmas = pipe.pipe.scheduler.sigmas.tolist()
    assert list(dict.fromkeys(planned)) == [(i, STEPS, sigmas[i], (12, 8)) for i in range(STEPS)]


def test_items_of_a_batch_equal_single_calls(pipe, photos) -> None:
    first, again, other = (run(pipe, photos, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.latents, again.latents) and not torch.equal(first.latents, other.latents)
    both = run(pipe, photos, seed=3, prompt=["a red cup", "a red cup"])
    assert len(both.images) == 2 and both.head_gains.shape[2] == 2
    for i, alone in enumerate((first, other)):
        torch.testing.assert_close(both.latents[i], alone.latents[0], rtol=1e-3, atol=1e-3)
    subjects = [photos["subject"], photos["image"]]
    several = run(pipe, {**photos, "subject_mask": None}, subject=subjects, seed=[7, 7])
    assert not torch.equal(several.latents[0], several.latents[1])
    assert np.asarray(several.diptychs[0])[:48].tobytes() != np.asarray(several.diptychs[1])[:48].tobytes()


def test_the_subject_is_cut_out_by_mask_or_transparency(pipe, photos) -> None:
    panel = np.asarray(run(pipe, photos).diptychs[0])[:48]
    assert (panel[:2, :2] == 255).all() and (panel[20:28, 28:36] != 255).any()
    whole = np.asarray(run(pipe, photos | {"subject_mask": None}).diptychs[0])[:48]
    assert (whole[:, 0] != 255).any() and (whole[:, -1] != 255).any()
    transparent = Image.open(photos["subject"]).convert("RGBA")
    transparent.putalpha(Image.open(photos["subject_mask"]))
    by_alpha = run(pipe, photos | {"subject": transparent, "subject_mask": None})
    by_mask = run(pipe, photos)
    assert by_alpha.diptychs[0].tobytes() == by_mask.diptychs[0].tobytes()


def test_given_width_and_height_set_the_panel_s_size(pipe, photos) -> None:
    result = run(pipe, photos, width=32, height=24, paste_back=False)
    assert result.images[0].size == (32, 24) and result.diptychs[0].size == (32, 48)
    assert run(pipe, photos, width=32).images[0].size == (64, 48)


def test_a_name_calls_the_finder(pipe, photos) -> None:
    asked = []

    def finder(picture, name):
        asked.append((picture.size, name))
        return Image.open(photos["subject_mask"])

    own = InContextBrushPipeline(pipe.pipe, finder=finder)
    found = run(own, photos | {"subject_mask": None}, subject_name="cup")
    assert asked == [((40, 30), "cup")]
    assert found.diptychs[0].tobytes() == run(pipe, photos).diptychs[0].tobytes()


def test_the_progress_bar_s_setting_is_restored(pipe, photos) -> None:
    before = dict(pipe.pipe._progress_bar_config)
    run(pipe, photos, progress=False)
    assert pipe.pipe._progress_bar_config == before


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"prompt": 3}, TypeError, "prompt.*int"),
        ({"prompt": []}, ValueError, "prompt.*got 0"),
        ({"prompt": ["a"] * 3, "seed": [1, 2]}, ValueError, "seed: expected 1 or 3 entries.*got 2"),
        ({"seed": -1}, ValueError, "seed.*-1"),
        ({"seed": 0.5}, ValueError, r"seed.*0\.5"),
        ({"subject_name": "cup"}, ValueError, "subject_mask.*subject_name"),
        ({"steps": 0}, ValueError, "steps.*0"),
        ({"steps": 2.0}, ValueError, r"steps.*2\.0"),
        ({"max_sequence_length": 0}, ValueError, "max_sequence_length.*0"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale.*nan"),
        ({"guidance_scale": "high"}, ValueError, "guidance_scale.*'high'"),
        ({"generator": torch.Generator()}, ValueError, "seed.*generator"),
        ({"seed": None, "generator": 3}, TypeError, r"generator.*torch\.Generator.*int"),
        ({"method": "brush"}, TypeError, "method.*str"),
        (
            {"method": InContextBrush(subject_first=False)},
            ValueError,
            "method: the diptych has the subject first",
        ),
        ({"method": InContextBrush(subject_tokens=5)}, ValueError, "method: .*subject_tokens"),
        ({"alpha_subject": -2}, ValueError, "alpha_subject.*-2"),
        ({"alpha_prompt": float("inf")}, ValueError, "alpha_prompt.*inf"),
        ({"width": 30}, ValueError, "width.*multiple of 8.*30"),
        ({"height": -8}, ValueError, "height.*-8"),
        ({"image": np.zeros((48, 64), np.float32)}, TypeError, "image.*uint8.*float32"),
        ({"image": 7}, TypeError, "image.*int"),
        ({"subject_mask": Image.new("L", (40, 30))}, ValueError, "subject_mask: nothing is on"),
        ({"mask": Image.new("L", (64, 48), 255)}, ValueError, "mask: everything is on"),
        ({"mask": Image.new("L", (48, 64), 255)}, ValueError, "mask.*64x48.*48x64"),
        (
            {
                "image": [Image.new("RGB", (64, 48)), Image.new("RGB", (32, 48))],
                "mask": [
                    Image.linear_gradient("L").resize((64, 48)),
                    Image.linear_gradient("L").resize((32, 48)),
                ],
            },
            ValueError,
            "image: expected photos of one size",
        ),
    ],
)
def test_wrong_input_raises(pipe, photos, change: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run(pipe, photos | change)
    assert Handle.of(pipe.pipe.transformer) is None


def test_wrong_models_raise(checkpoint, tmp_path) -> None:
    assert isinstance(InContextBrushPipeline.from_pretrained(checkpoint).pipe, FluxFillPipeline)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"model.*model_index\.json, transformer"):
        InContextBrushPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(TypeError, match="FluxFillPipeline, got str"):
        InContextBrushPipeline("black-forest-labs/FLUX.1-Fill-dev")


def test_options_reach_diffusers(checkpoint) -> None:
    for options, dtype in (({}, torch.bfloat16), ({"dtype": torch.float32}, torch.float32)):
        parts = InContextBrushPipeline.from_pretrained(checkpoint, **options).pipe
        assert {
            part.dtype for part in (parts.transformer, parts.vae, parts.text_encoder, parts.text_encoder_2)
        } == {dtype}
    moved = InContextBrushPipeline.from_pretrained(checkpoint)
    assert moved.to("cpu", torch.float16) is moved and moved.pipe.vae.dtype == torch.float16
    with pytest.raises(NotImplementedError, match="nowhere"):
        InContextBrushPipeline.from_pretrained(checkpoint, device_map="nowhere")


def test_the_finder_is_loaded_when_a_name_is_first_given(
    checkpoint, photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashbrush.integrations.pipelines import SubjectFinder

    loaded = []

    def load(detector, segmenter, *, device):
        loaded.append((detector, segmenter, str(device)))
        return lambda picture, name: Image.open(photos["subject_mask"])

    monkeypatch.setattr(SubjectFinder, "from_pretrained", load)
    own = InContextBrushPipeline.from_pretrained(checkpoint, detector="one", segmenter="two")
    run(own, photos)
    assert loaded == []
    for _ in range(2):
        run(own, photos | {"subject_mask": None}, subject_name="cup")
    assert loaded == [("one", "two", "cpu")]


def test_a_crop_shows_the_hole_and_keeps_the_rest(pipe, photos) -> None:
    result = run(pipe, photos, padding_mask_crop=4, width=32, height=32)
    photo, mask = np.asarray(Image.open(photos["image"])), np.asarray(Image.open(photos["mask"]))
    left, top, right, bottom = im.crop_box(Image.open(photos["mask"]), 4, 1.0)
    # The mask is 20 to 44 and 10 to 32; the box is square, as the panel.
    assert (left, top, right, bottom) == (16, 5, 49, 38)
    shown = np.asarray(result.diptychs[0].crop((0, 32, 32, 64)))
    assert (
        shown
        == np.asarray(
            Image.fromarray(photo[top:bottom, left:right]).resize((32, 32), Image.Resampling.LANCZOS)
        )
    ).all()
    picture = np.asarray(result.images[0])
    assert picture.shape == photo.shape and (picture[mask == 0] == photo[mask == 0]).all()
    assert (picture[mask > 0] != photo[mask > 0]).mean() > 0.5


def test_without_blending_known_tokens_change(pipe, photos) -> None:
    kept, free = (run(pipe, photos, blend=blend, paste_back=False) for blend in (True, False))
    known = kept.known[:, :, None].expand_as(kept.latents)
    assert torch.equal(kept.latents[known], kept.source_latents[known])
    assert not torch.equal(free.latents[known], free.source_latents[known])


def test_subject_fill_sets_the_subject_s_size(pipe, photos) -> None:
    def share(**more) -> float:
        panel = np.asarray(run(pipe, photos, **more).diptychs[0].crop((0, 0, 64, 48)))
        columns = np.flatnonzero((panel < 250).any((0, 2)))
        rows = np.flatnonzero((panel < 250).any((1, 2)))
        return max((columns[-1] - columns[0] + 1) / 64, (rows[-1] - rows[0] + 1) / 48)

    assert share() == pytest.approx(0.9, abs=0.04) and share(subject_fill=0.5) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"padding_mask_crop": -1}, "padding_mask_crop: expected a number of pixels"),
        ({"padding_mask_crop": 2.5}, "padding_mask_crop: expected a number of pixels"),
        ({"subject_fill": 0}, "subject_fill: expected a number above 0"),
        ({"subject_fill": 1.1}, "subject_fill: expected a number above 0"),
    ],
)
def test_wrong_crop_or_fill_raises(pipe, photos, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(pipe, photos, **more)
