"""A photo changed by a changed prompt, without training: MasaCtrl, Plug-and-Play, Prompt-to-Prompt and
InfEdit.
"""

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
# name: (its class, steps, guidance), the released codes'
METHODS: dict[str, tuple[type, int, float]] = {
    "masactrl": (MasaCtrl, 50, 7.5),
    "plug-and-play": (PlugAndPlay, 50, 10.0),
    "prompt-to-prompt": (PromptToPrompt, 50, 7.5),
    "infedit": (InfEdit, 15, 2.0),
}


@dataclass
class PromptEditingOutput:
    """What one call made.

    Attributes:
        image: the edited photo, RGB, of its own size.
        reconstruction: the photo as the model's autoencoder gives it back, from which the edit started.
        latents: (1, channels, height, width) float32, the edit's.
        size: (width, height) in pixels at which the model saw the photo.
        method: the one that was used, with its items, alignment and words, which are of these prompts.
        seed: the one that makes the same picture again; None where a generator was given.
    """

    image: Image.Image
    reconstruction: Image.Image
    latents: Tensor
    size: tuple[int, int]
    method: PromptMethod
    seed: int | None


class PromptEditingPipeline(StableDiffusionParts):
    """Edits of a photo by a prompt, with the parts of a StableDiffusionPipeline; arguments as in
    StableDiffusionParts.

        pipe = PromptEditingPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
        pipe("cat.png", "a photo of a tiger", source_prompt="a photo of a cat",
        method="prompt-to-prompt").image

    MasaCtrl, Plug-and-Play and Prompt-to-Prompt start from the photo's DDIM inversion. The inverted latents
    of every level stand for the photo beside the edit, so that it is what it was, whatever the guidance; the
    released codes sample it anew. InfEdit needs no inversion. Each step is one UNet call for the photo and
    its edit, with and without text.
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
            prompt: what the edit shows. source_prompt: what the photo shows; MasaCtrl's code leaves it empty.
            method: a name of METHODS, with the released code's knobs, its windows of steps scaled to `steps`;
                or the method itself, whose items, alignment and blend the pipeline sets where they are not
                set.
            words, source_words: what the edit is about, in `prompt` and `source_prompt`: the edit stays where
                they are looked at (LocalBlend, MutualBlend), or MasaCtrl's masks are made of them. Both or
                neither, and only with a method that has no blend or masks of its own.
            negative_prompt: what guidance leads away from.
            steps, guidance_scale: None: the method's, see METHODS.
            inversion_iterations: calls of the model for each step of the inversion, see
                ddim_inversion.invert; InfEdit has none.
            width, height: of what the model sees, multiples of 8; None: near the photo's.
            seed, generator: of InfEdit's noise; the others draw none.
            progress: show a progress bar.

        Raises:
            TypeError, ValueError, FileNotFoundError: naming the argument, what was expected and what came.
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
        chosen = (
            _released(kind, steps) if isinstance(method, str) else replace(method)
        )  # what is given stays as it is
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
            raise ValueError("words: Plug-and-Play has no use for them")
        # As many words: some are others. Otherwise some are new.
        same = kind == "prompt-to-prompt" and len(source.split()) == len(prompt.split())
        align = TokenAlignment.replace if same else TokenAlignment.refine

        def edited(edit: PromptEdit) -> PromptEdit:
            if edit.alignment is None:
                return replace(edit, alignment=align(source, prompt, tokenizer, length))
            if edit.alignment.prompts not in (None, (source, prompt)):
                raise ValueError(
                    f"method: expected an alignment of {(source, prompt)}, got one of {edit.alignment.prompts}"
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
            # Of [source, edit] twice, the conditional half comes last.
            ready.masks = WordMaps({-2: tokens[0], -1: tokens[1]}, self._resolution(size))
        if words and isinstance(ready, PromptToPrompt):
            ready.blend = LocalBlend(tokens, resolution=self._resolution(size))
        if words and isinstance(ready, InfEdit):
            ready.blend = MutualBlend(tokens[1], tokens[1], resolution=self._resolution(size))
        return ready

    def _resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of the layers whose maps of words count: a quarter of the latents', as 16 is at 512
        pixels.
        """
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
        """(steps + 1, channels, height, width), from the noise to `clean`"""
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
        """InfEdit's sampling; the mutual item has the edit's text."""
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
                    # The last level of a schedule may have a little noise left, of which the edit has no use.
                    latents = start
                if method.blend is not None:
                    latents = method.blend(latents)
        return latents[1:2]

    @contextmanager
    def _sampling(
        self, method: PromptMethod, schedule: DDPMSchedule, text: Tensor, progress: bool
    ) -> Iterator[Callable[[int, Tensor], Tensor]]:
        """The model under control: (step, items) -> outputs (twice the items, ...) float32, without text and
        with it.
        """
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
    """With the released code's knobs: its windows of steps are the same shares of a run of another length."""
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
