"""A training run of the tiny FLUX.1-Fill: models, optimisers, averaged weights and losses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..data.canvases import SIDE, Canvases, canvases
from ..data.photos import HELD_OUT, Photos, photos
from . import autoencoder, model

LEVELS = (0.2, 1.1)  # mean and standard deviation of the noise level's logit


@dataclass
class Recipe:
    """The settings of a run. A resumed run uses the recipe that it is given, not the saved run's.

    Attributes:
        seed: of weights and data.
        steps: of the transformer.
        decoder_steps: of the decoder.
        batch: diptychs per step.
        rate: AdamW's learning rate for the transformer.
        decoder_rate: AdamW's learning rate for the decoder.
        sharp: factor of the learning rate of the q and k norms.
        warmup: steps in which the rate rises from 0.
        decay: share of the steps, at the end, in which the rate falls to 0.
        widen: share of the steps, from the start, in which the freedom of the poses rises from 0 to 1.
        aligned: share of the diptychs with the same pose in both panels throughout.
        average: decay of the moving average of the weights.
        outside: weight of the loss outside of the hole, where inside is 1.
    """

    seed: int = 0
    steps: int = 20_000
    decoder_steps: int = 3_000
    batch: int = 16
    rate: float = 1e-3
    decoder_rate: float = 2e-3
    sharp: float = 5.0
    warmup: int = 200
    decay: float = 0.3
    widen: float = 0.5
    aligned: float = 0.5
    average: float = 0.998
    outside: float = 0.25


class Training:
    """The models, their optimisers and averaged weights, and the number of steps done.

    Args:
        recipe: of the run.
        device: of models and data.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, device
        torch.manual_seed(recipe.seed)
        self.weight, self.bias = autoencoder.principal_components(
            photos(), Generator().manual_seed(recipe.seed)
        )
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)
        vae: Any = autoencoder.autoencoder(self.weight, self.bias)  # diffusers' `to` is typed by a decorator
        transformer: Any = model.transformer()
        self.decoder = vae.decoder.to(device, memory_format=torch.channels_last)
        self.transformer = transformer.to(device)
        sharp = model.sharpness(self.transformer)
        plain = [p for p in self.transformer.parameters() if all(p is not q for q in sharp)]
        self.optimisers = {
            "transformer": torch.optim.AdamW(
                [
                    {"params": plain, "scale": 1.0},
                    {"params": sharp, "scale": recipe.sharp, "weight_decay": 0.0},
                ],
                betas=(0.9, 0.99),
                weight_decay=0.01,
                fused=True,
            ),
            "decoder": torch.optim.AdamW(
                self.decoder.parameters(), betas=(0.9, 0.99), weight_decay=1e-4, fused=True
            ),
        }
        self.averages = {name: copies(part) for name, part in self.parts.items()}
        self.done = {"transformer": 0, "decoder": 0}
        self.prompts = model.Prompts(recipe.seed, device)
        self.seen: dict[str, Photos] = {
            "training": photos(device=device),
            "held out": photos(HELD_OUT, device),
        }
        self.places = model.token_places(2 * SIDE // 8, SIDE // 8).to(device)
        self.words = torch.zeros(model.TEXT_TOKENS, 3, device=device)

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """The trained models, by "transformer" and "decoder"."""
        return {"transformer": self.transformer, "decoder": self.decoder}

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (n, channels, height / CELL, width / CELL) of pictures (n, 3, height, width) in [-1, 1]."""
        return F.conv2d(pictures, self.weight, self.bias, stride=autoencoder.CELL)

    def conditions(self, some: Canvases) -> dict[str, Tensor]:
        """The transformer's inputs beside the noisy latents: masked picture, mask, embedded prompts."""
        pixels = (2 * some.pictures - 1) * (1 - some.masks)
        return {
            "known": torch.cat([model.pack(self.encode(pixels)), model.pack_mask(some.masks)], -1),
            "encoder_hidden_states": self.prompts(some.prompts),
        }

    def velocity(
        self, noisy: Tensor, level: Tensor, conditions: dict[str, Tensor], guidance: Tensor
    ) -> Tensor:
        """The transformer's prediction, (n, tokens, channels).

        Args:
            noisy: packed latents, (n, tokens, channels).
            level: noise levels, (n,) in [0, 1].
            conditions: as from conditions().
            guidance: scales of the embedded guidance, (n,).
        """
        return self.transformer(
            hidden_states=torch.cat([noisy, conditions["known"]], -1),
            encoder_hidden_states=conditions["encoder_hidden_states"],
            pooled_projections=torch.zeros(len(noisy), model.TEXT_WIDTH, device=self.device),
            timestep=level,
            guidance=guidance,
            img_ids=self.places,
            txt_ids=self.words,
            return_dict=False,
        )[0]

    def transformer_loss(self, generator: Generator) -> Tensor:
        """Flow-matching loss (arXiv 2210.02747), weighted by `recipe.outside` outside of the hole."""
        recipe, n = self.recipe, self.recipe.batch
        freedom = min(1.0, self.done["transformer"] / (recipe.widen * recipe.steps))
        freedom = torch.where(torch.rand(n, generator=generator) < recipe.aligned, 0.0, freedom)
        some = canvases(n, self.seen["training"], generator, freedom)
        clean = model.pack(self.encode(2 * some.pictures - 1))
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        level = (LEVELS[0] + LEVELS[1] * torch.randn(n, generator=generator)).sigmoid().to(clean)
        # Random, so that the model learns to ignore it.
        guidance = (1 + 59 * torch.rand(n, generator=generator)).to(clean)
        noisy = torch.lerp(clean, noise, level[:, None, None])
        error = self.velocity(noisy, level, self.conditions(some), guidance) - (noise - clean)
        hole = model.pack_mask(some.masks).mean(-1)
        weight = recipe.outside + (1 - recipe.outside) * hole
        return (error.square().mean(-1) * weight).sum() / weight.sum()

    def decoder_loss(self, generator: Generator) -> Tensor:
        """Absolute plus squared error of panels decoded from slightly noisy latents."""
        some = canvases(self.recipe.batch, self.seen["training"], generator)
        upper = (torch.rand(self.recipe.batch, generator=generator) < 0.3).to(self.device)[
            :, None, None, None
        ]
        pixels = 2 * torch.where(upper, some.pictures[:, :, :SIDE], some.pictures[:, :, SIDE:]) - 1
        latents = self.encode(pixels)
        latents = latents + 0.1 * torch.randn(latents.shape, generator=generator).to(latents)
        error = self.decoder(latents.contiguous(memory_format=torch.channels_last)) - pixels
        return error.abs().mean() + error.square().mean()

    def step(self, part: str) -> float:
        """One optimiser step of "transformer" or "decoder"; returns the loss."""
        done, steps = (
            self.done[part],
            {"transformer": self.recipe.steps, "decoder": self.recipe.decoder_steps}[part],
        )
        base = {"transformer": self.recipe.rate, "decoder": self.recipe.decoder_rate}[part]
        left = (steps - done) / (self.recipe.decay * steps)
        rate = base * min(1.0, (done + 1) / self.recipe.warmup, left)
        optimiser = self.optimisers[part]
        for group in optimiser.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        # From the seed and the step alone: a resumed run draws the same data as an uninterrupted one.
        generator = Generator().manual_seed((self.recipe.seed << 32) + 2 * done + (part == "decoder") + 1)
        losses: dict[str, Callable[[Generator], Tensor]] = {
            "transformer": self.transformer_loss,
            "decoder": self.decoder_loss,
        }
        loss = losses[part](generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parts[part].parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        self.done[part] += 1
        with torch.no_grad():
            kept = min(self.recipe.average, done / (done + 10))
            torch._foreach_lerp_(
                list(self.averages[part].values()), list(self.parts[part].state_dict().values()), 1 - kept
            )
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write the state to a file, which is replaced only once the new one is complete."""
        state = {
            "recipe": asdict(self.recipe),
            "done": self.done,
            "averages": self.averages,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
        }
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, path)

    def load(self, path: Path) -> None:
        """Continue from a state that save() wrote."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.done, self.averages = state["done"], state["averages"]
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
            self.optimisers[name].load_state_dict(state["optimisers"][name])

    def write_checkpoint(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint of FluxFillPipeline."""
        averaged = model.transformer()
        averaged.load_state_dict(self.averages["transformer"])
        vae = autoencoder.autoencoder(self.weight, self.bias)
        vae.decoder.load_state_dict(self.averages["decoder"])
        model.save(folder, averaged, vae, self.recipe.seed)


def copies(part: torch.nn.Module) -> dict[str, Tensor]:
    """Detached copies of the parameters and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in part.state_dict().items()}
