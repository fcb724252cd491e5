"""Editing a photo by a changed prompt: MasaCtrl, Plug-and-Play, Prompt-to-Prompt and InfEdit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..diffusers import apply
from ..diffusers.hosts.registry import find_host
from ..methods import (
    InfEdit,
    LocalBlend,
    MasaCtrl,
    MutualBlend,
    PlugAndPlay,
    PromptEdit,
    PromptToPrompt,
    TokenAlignment,
    WordMaps,
)
from ..methods.shared.ddcm import ddcm_step
from ..methods.shared.layers_and_steps import scaled
from ..methods.shared.token_alignment import word_tokens
from . import images as im
from .images import ImageLike
from .inversion import ddim as ddim_inversion
from .inversion.ddpm import DDPMSchedule, noise_predictor
from .shared.arguments import check_number, check_texts, noise_seed
from .shared.stable_diffusion_parts import StableDiffusionParts

PromptMethod = MasaCtrl | PlugAndPlay | PromptToPrompt | InfEdit
# By name: (class, steps, guidance) of the released code.
METHODS: dict[str, tuple[type, int, float]] = {
    "masactrl": (MasaCtrl, 50, 7.5),
    "plug-and-play": (PlugAndPlay, 50, 10.0),
    "prompt-to-prompt": (PromptToPrompt, 50, 7.5),
    "infedit": (InfEdit, 15, 2.0),
}


@dataclass
class PromptEditingOutput:
    """Result of PromptEditingPipeline.

    Attributes:
        image: the edited photo, RGB, of its own size.
        reconstruction: the photo encoded and decoded by the model's autoencoder, without an edit.
        latents: of the edit, (1, channels, height, width) float32.
        size: (width, height) in pixels at which the model saw the photo.
        method: that was used, with the alignment and words of these prompts.
        seed: that reproduces the result; None where a generator was given.
    """

    image: Image.Image
    reconstruction: Image.Image
    latents: Tensor
    size: tuple[int, int]
    method: PromptMethod
    seed: int | None


class PromptEditingPipeline(StableDiffusionParts):
    """Edits of a photo by a prompt on Stable Diffusion, without training.

    MasaCtrl, Plug-and-Play and Prompt-to-Prompt start from the photo's DDIM inversion. The inverted latents
    of every level represent the photo beside the edit, so guidance cannot change it; the released code
    samples it again. InfEdit needs no inversion. Each step is one UNet call on the photo and its edit, with
    and without text.

    Examples:
        ```python
        pipe = PromptEditingPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
        edited = pipe(
            "cat.png", "a photo of a tiger", source_prompt="a photo of a cat", method="prompt-to-prompt"
        )
        edited.image.save("tiger.png")
        ```

    Args:
        pipe: a diffusers StableDiffusionPipeline.
        backend: as in flashbrush.attention.

    Raises:
        TypeError: another pipeline.
        ValueError: a UNet that takes more than latents and text, or a scheduler without betas.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike,
        prompt: str,
        *,
        source_prompt: str = "",
        method: str | PromptMethod = "masactrl",
        words: Sequence[str] = (),
        source_words: Sequence[str] = (),
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        inversion_iterations: int = 1,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> PromptEditingOutput:
        """Edit a photo.

        Args:
            image: a file, a PIL image, or a uint8 array.
            prompt: what the edit shows.
            source_prompt: what the photo shows; MasaCtrl's code leaves it empty.
            method: a name of METHODS, with the released code's knobs and its windows of steps in proportion
                to `steps`; or a method, whose alignment, masks and blend the pipeline sets where they are
                None.
            words: words of `prompt` to which the edit is confined, by their attention maps: LocalBlend,
                MutualBlend, or MasaCtrl's masks. Only with a method that has no blend or masks of its own.
            source_words: the same words of `source_prompt`; both or neither.
            negative_prompt: prompt that guidance leads away from.
            steps: denoising steps; None: the method's, see METHODS.
            guidance_scale: of classifier-free guidance; None: the method's, see METHODS.
            inversion_iterations: calls of the model in each step of the inversion, see inversion.ddim.invert;
                1 for InfEdit, which inverts nothing.
            width: at which the model sees the photo, a multiple of 8; None: near the photo's own.
            height: the same.
            seed: of InfEdit's noise, the only method that draws noise; None: from torch's default generator.
            generator: in place of a seed.
            progress: show a progress bar.

        Returns:
            The picture, its reconstruction without an edit, and the method that was used.

        Raises:
            TypeError, ValueError, FileNotFoundError: wrong input; the message names the argument.
            FloatingPointError: the latents are no longer finite.
        """
        kind = (
            method
            if isinstance(method, str)
            else next((n for n, (c, *_) in METHODS.items() if type(method) is c), "")
        )
        if kind not in METHODS:
            got = repr(method) if isinstance(method, str) else type(method).__name__
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, or such a method, got {got}")
        check_texts(prompt=prompt, source_prompt=source_prompt, negative_prompt=negative_prompt)
        if bool(words) != bool(source_words):
            raise ValueError("words: expected them together with source_words, or neither")
        if kind == "infedit" and inversion_iterations != 1:
            raise ValueError(
                f"inversion_iterations: expected 1, as InfEdit inverts nothing, got {inversion_iterations}"
            )
        steps = METHODS[kind][1] if steps is None else steps
        guidance = METHODS[kind][2] if guidance_scale is None else guidance_scale
        check_number("guidance_scale", guidance)
        schedule = DDPMSchedule.from_scheduler(self._scheduler(), steps)
        base, reported = noise_seed(seed, generator)
        photo = im.flatten(im.open_image(image))
        size = self.size(photo.size, width=width, height=height)
        # A copy: the caller's method is not changed.
        chosen = _released(kind, steps) if isinstance(method, str) else replace(method)
        ready = self._method(kind, chosen, prompt, source_prompt, words, source_words, size)

        clean = self._encode(im.resize_photo(photo, size))
        texts = [self._embed(text) for text in (negative_prompt, source_prompt, prompt)]
        if isinstance(ready, InfEdit):
            latents = self._denoise_consistently(ready, clean, texts, schedule, guidance, base, progress)
        else:
            levels = self._invert(clean, texts[1], schedule, inversion_iterations, progress)
            latents = self._denoise(ready, levels, texts, schedule, guidance, progress)
        made, again = (im.resize_photo(self._decode(x), photo.size) for x in (latents, clean))
        return PromptEditingOutput(made, again, latents, size, ready, reported)

    def _method(
        self,
        kind: str,
        ready: PromptMethod,
        prompt: str,
        source: str,
        words: Sequence[str],
        source_words: Sequence[str],
        size: tuple[int, int],
    ) -> PromptMethod:
        tokenizer = self.pipe.tokenizer
        length = tokenizer.model_max_length
        pairs = ((source, source_words), (prompt, words))
        tokens = [word_tokens(text, chosen, tokenizer, length) for text, chosen in pairs]
        if kind == "plug-and-play" and words:
            raise ValueError("words: Plug-and-Play does not use them")
        # Prompts of the same length differ by replaced words, others by added words.
        same = kind == "prompt-to-prompt" and len(source.split()) == len(prompt.split())
        align = TokenAlignment.replace if same else TokenAlignment.refine

        def edited(edit: PromptEdit) -> PromptEdit:
            if edit.alignment is None:
                return replace(edit, alignment=align(source, prompt, tokenizer, length))
            if edit.alignment.prompts not in (None, (source, prompt)):
                raise ValueError(
                    f"method: expected an alignment of {(source, prompt)}, "
                    f"got one of {edit.alignment.prompts}"
                )
            return edit

        if words and (getattr(ready, "masks", None) is not None or getattr(ready, "blend", None) is not None):
            raise ValueError(
                f"words: expected none beside a method with masks or a blend of its own, got {list(words)}"
            )
        if isinstance(ready, PromptToPrompt):
            ready.edits = [edited(one) for one in ready.edits]
        if isinstance(ready, InfEdit):
            ready.edit = edited(ready.edit)
        if words and isinstance(ready, MasaCtrl):
            # Batch items are [source, edit] twice; the conditional half comes last.
            ready.masks = WordMaps({-2: tokens[0], -1: tokens[1]}, self._resolution(size))
        if words and isinstance(ready, PromptToPrompt):
            ready.blend = LocalBlend(tokens, resolution=self._resolution(size))
        if words and isinstance(ready, InfEdit):
            ready.blend = MutualBlend(tokens[1], tokens[1], resolution=self._resolution(size))
        return ready

    def _resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of the layers whose word maps are used, a quarter of the latents' (16 x 16 at 512 px)."""
        unet, scale = self.pipe.unet, self.pipe.vae_scale_factor
        host = find_host(unet)
        level = max(site.level for site in host.sites(unet) if site.kind == "cross" and site.level <= 2)
        return host.grids(unet, size[1] // scale, size[0] // scale)[level]

    def _scheduler(self) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.pipe.scheduler.config)

    def _invert(
        self, clean: Tensor, text: Tensor, schedule: DDPMSchedule, iterations: int, progress: bool
    ) -> Tensor:
        """Latents of all levels from the noise to `clean`, (steps + 1, channels, height, width)."""
        predict = noise_predictor(self.pipe.unet, text)
        with (
            apply(self.pipe.unet, backend=self.backend),
            self._bar("inverting", schedule.steps, progress) as bar,
        ):
            return ddim_inversion.invert(
                clean, predict, schedule, iterations=iterations, progress=bar.update
            )[0]

    def _denoise(
        self,
        method: Any,
        levels: Tensor,
        texts: list[Tensor],
        schedule: DDPMSchedule,
        guidance: float,
        progress: bool,
    ) -> Tensor:
        negative, source, target = texts
        text, blend = torch.cat([negative, negative, source, target]), getattr(method, "blend", None)
        latents = levels[:1]
        with self._sampling(method, schedule, text, progress) as predict:
            for step in range(schedule.steps):
                without, given = predict(step, torch.cat([levels[step : step + 1], latents])).chunk(2)
                output = (without + guidance * (given - without))[1:]
                latents = ddim_inversion.step(latents, output, schedule, step)
                if blend is not None:
                    latents = blend(torch.cat([levels[step + 1 : step + 2], latents]))[1:]
        return latents

    def _denoise_consistently(
        self,
        method: InfEdit,
        clean: Tensor,
        texts: list[Tensor],
        schedule: DDPMSchedule,
        guidance: float,
        seed: int,
        progress: bool,
    ) -> Tensor:
        """InfEdit's sampling of [source, edit, mutual], of which the mutual item has the edit's text."""
        generator = torch.Generator().manual_seed(seed)

        def fresh() -> Tensor:
            return torch.randn(clean.shape, generator=generator).to(clean)

        if schedule.prediction != "epsilon":
            raise ValueError(
                f"scheduler: InfEdit needs a model that predicts epsilon, got one of {schedule.prediction}"
            )
        negative, source, target = texts
        text = torch.cat([negative, negative, negative, source, target, target])
        alphas = schedule.alphas.tolist()
        latents = (alphas[0] ** 0.5 * clean + (1 - alphas[0]) ** 0.5 * fresh()).expand(3, -1, -1, -1)
        scales = torch.tensor([1.0, guidance, guidance], device=clean.device)[:, None, None, None]
        with self._sampling(method, schedule, text, progress) as predict:
            for step in range(schedule.steps):
                without, given = predict(step, latents).chunk(2)
                noise = without + scales * (given - without)
                latents, start = ddcm_step(latents, noise, clean, alphas[step], alphas[step + 1], fresh())
                if step + 1 == schedule.steps:
                    # The schedule's last level may keep a little noise; the edit takes x0 instead.
                    latents = start
                if method.blend is not None:
                    latents = method.blend(latents)
        return latents[1:2]

    @contextmanager
    def _sampling(
        self, method: PromptMethod, schedule: DDPMSchedule, text: Tensor, progress: bool
    ) -> Iterator[Callable[[int, Tensor], Tensor]]:
        """A function (step, items) -> outputs of the controlled model, unconditional then conditional."""
        unet = self.pipe.unet
        with (
            apply(unet, method, backend=self.backend) as handle,
            self._bar("editing", schedule.steps, progress) as bar,
        ):

            def predict(step: int, items: Tensor) -> Tensor:
                handle.set_step(step, schedule.steps, float((1 - schedule.alphas[step]).sqrt()))
                inputs = torch.cat([items, items]).to(unet.dtype)
                timesteps = schedule.timesteps[step].to(items.device).expand(len(inputs))
                outputs = unet(inputs, timesteps, text, return_dict=False)[0].float()
                bar.update()
                return outputs

            yield predict


def _released(kind: str, steps: int) -> PromptMethod:
    """A method with the released code's knobs and its windows of steps in proportion to `steps`."""
    made: dict[str, Callable[[], PromptMethod]] = {
        "masactrl": MasaCtrl,
        "plug-and-play": PlugAndPlay,
        "prompt-to-prompt": lambda: PromptToPrompt([PromptEdit()]),
        "infedit": lambda: InfEdit(PromptEdit()),
    }
    method, share = made[kind](), steps / METHODS[kind][1]
    if isinstance(method, (MasaCtrl, PlugAndPlay)):
        method.steps = scaled(method.steps, share)
    if isinstance(method, PlugAndPlay):
        method.feature_steps = scaled(method.feature_steps, share)
    return method
