"""Prompt-to-Prompt (arXiv 2208.01626): a changed prompt edits an image and keeps its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..diffusers.protocol.layer import Layer, Step
from ..diffusers.protocol.plan import Plan
from .shared.cross_batch import inject_maps
from .shared.knobs import Count, Instance, Several, Share
from .shared.layers_and_steps import is_self_attention
from .shared.local_blend import LocalBlend
from .shared.prompt_edit import PromptEdit, cross_plan
from .shared.roles import EditRoles, conditional_edit_roles


@dataclass(eq=False)
class PromptToPrompt:
    """The edits take the source's cross-attention maps, token by token, and its self-attention maps.

    With the mapper M and the alphas a of an edit's alignment, its weights c, and g = 1 while a word's share
    of the steps lasts and 0 after it (a, c and g are diagonal matrices), in cross-attention:

        A     = (A_src M a + A_tgt (1 - a)) c                    replace: a = 1; refine: a = 0 for new words
        o_tgt = (A g + A_tgt (1 - g)) V_tgt
              = A_src (M a c g V_tgt) + A_tgt ((1 - g + (1 - a) c g) V_tgt)

    so that M multiplies the values and no map is made; nothing is renormalised, as in the released code. In
    small self-attention layers o_tgt = A_src V_tgt. Both only in the conditional half of classifier-free
    guidance. All images start from the same noise; the released notebooks have 50 steps and guidance of 7.5.
    A knob may be set at any time.

    Args:
        edits: a PromptEdit for each of the edited items.
        cross_share: share of the steps, from the first, with the source's cross-attention maps.
        self_share: share of the steps, from the first, with the source's self-attention maps.
        self_resolution: side of the largest square of tokens whose self-attention is the source's; 16 in
            the early release, 32 in later notebooks.
        count: steps of the run, where the handle does not know them.
        blend: collects maps of words; call it on the latents after each step. None: no blending.
        items: the roles of a call's items. None: the batch is [source, edit_1, ..., edit_n] twice, and the
            second, conditional half is edited.

    Raises:
        ValueError: a wrong knob, by name. When the model is called: another model, a batch or an alignment
            that does not fit.

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from flashbrush.integrations import PromptEdit, PromptToPrompt, TokenAlignment
        >>> from flashbrush.integrations.diffusers import apply
        >>> pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> prompts, length = ["a cat", "a dog"], pipe.tokenizer.model_max_length
        >>> edit = PromptEdit(TokenAlignment.replace(*prompts, pipe.tokenizer, length))
        >>> with apply(pipe.unet, PromptToPrompt(edit)):
        ...     images = pipe(prompts, num_inference_steps=3).images
    """

    edits: Sequence[PromptEdit] = Several(PromptEdit)
    cross_share: float = Share(0.8)
    self_share: float = Share(0.4)
    self_resolution: int = Count(16, low=1)
    count: int = Count(50, low=1)
    blend: LocalBlend | None = Instance(LocalBlend, None)
    items: Sequence[EditRoles] | None = Several(EditRoles, None)

    def plan(self, layer: Layer, step: Step) -> Plan | None:
        own = is_self_attention(layer)
        see = None if self.blend is None else self.blend.plan(layer, step)
        roles = conditional_edit_roles(self.items, layer.batch)
        progress = step.index / (step.count or self.count)
        if len(roles) != len(self.edits):
            raise ValueError(
                f"edits: expected one for each of {len(roles)} edited items, got {len(self.edits)}"
            )
        if own:
            small = layer.image_len <= self.self_resolution**2
            return inject_maps(roles) if small and progress < self.self_share else None
        if layer.kind != "cross":
            return None
        gates = tuple(
            (progress < self.cross_share, tuple(progress < s for s in e.shares.values())) for e in self.edits
        )
        plan = cross_plan(tuple(self.edits), roles, gates, layer.text_len)
        return plan if see is None else replace(plan or Plan(), see=see)
