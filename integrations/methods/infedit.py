"""InfEdit (arXiv 2312.04965): unified attention control over a source, its edit and a mutual item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..diffusers.protocol.batch_call import Part
from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.knobs import Count, Instance, Several, Share
from .shared.layers_and_steps import is_self_attention
from .shared.local_blend import MutualBlend
from .shared.prompt_edit import PromptEdit, cross_plan
from .shared.roles import EditRoles, MutualRoles, mutual_roles


@dataclass(eq=False)
class InfEdit:
    """Unified attention control over the items source, target and mutual; the source stays plain.

    With A_x the self-attention map of item x, up to a share of the steps

        o_tgt = A_src V_tgt                     o_mut = A_src V_src

    and from then on the target is plain and o_mut = softmax(Q_tgt K_src^T / sqrt(d)) V_src. Up to another
    share the target's cross-attention is Prompt-to-Prompt's refinement of the source's. The released code
    switches like this; the paper mixes both maps by a factor. Sample with ddcm_step(), in 15 steps with
    guidance of 1 for the source and 2 for the target. A knob may be set at any time.

    Args:
        edit: the target's prompt, aligned by TokenAlignment.refine(). The code also aligns new words with
            the source's by the cosine of their embeddings; an alignment of your own can do that.
        self_share: share of the steps before which self-attention is the source's.
        cross_share: share of the steps up to which, itself included, cross-attention is refined.
        count: steps of the run, where the handle does not know them.
        blend: collects maps of words; call it on the latents after each step. None: no blending.
        items: the roles of a call's items. None: the batch is [source, target, mutual], once, or twice:
            unconditional and conditional.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: another model, a batch or an alignment
            that does not fit.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import InfEdit, PromptEdit, TokenAlignment
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> prompts, length = ("a cat", "a fluffy cat"), pipe.tokenizer.model_max_length
        >>> edit = PromptEdit(TokenAlignment.refine(*prompts, pipe.tokenizer, length))
        >>> with apply(pipe.unet, InfEdit(edit)):
        ...     images = pipe([*prompts, prompts[1]], guidance_scale=1.0, num_inference_steps=4).images
    """

    edit: PromptEdit = Instance(PromptEdit)
    self_share: float = Share(0.3)
    cross_share: float = Share(0.7)
    count: int = Count(15, low=1)
    blend: MutualBlend | None = Instance(MutualBlend, None)
    items: Sequence[MutualRoles] | None = Several(MutualRoles, None)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        own = is_self_attention(layer)
        see = None if self.blend is None else self.blend.plan(layer, step)
        roles, progress = mutual_roles(self.items, layer.batch), step.index / (step.count or self.count)
        if own:
            return _self_attention(roles, progress < self.self_share)
        if layer.kind != "cross":
            return None
        edited = tuple(EditRoles(item.source, item.target) for item in roles if item.conditional)
        gate = (progress <= self.cross_share, tuple(progress <= s for s in self.edit.shares.values()))
        plan = cross_plan((self.edit,) * len(edited), edited, (gate,) * len(edited), layer.text_len)
        return plan if see is None else replace(plan or Plan(), see=see)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached: inference tensors cannot be used in a backward pass
def _self_attention(roles: tuple[MutualRoles, ...], early: bool) -> Plan:
    source, target = (torch.tensor([getattr(item, name) for item in roles]) for name in ("source", "target"))
    mutual = [item.mutual for item in roles]
    if not early:
        return Plan(parts=[Part(mutual, {"q": target, "k": source, "v": source})])
    both = torch.cat([source, source])
    items = [item.target for item in roles] + mutual
    return Plan(parts=[Part(items, {"q": both, "k": both, "v": torch.cat([target, source])})])
