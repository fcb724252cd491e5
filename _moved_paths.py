"""Import paths of version 0.1 that moved: they work for one more release, with a DeprecationWarning.

A finder at the end of sys.meta_path answers for the old names, so that nothing is imported before it is asked
for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "benchmarks.peers": "benchmarks.cases.contestants",
    "bindings.blend": "bindings.blend_latents",
    "bindings.control": "bindings.core.control",
    "bindings.ops": "bindings.operators.attention",
    "bindings.plan": "bindings.backends.planner",
    "bindings.problem": "bindings.core.problem",
    "bindings.segments": "bindings.core.segments",
    "integrations.diffusers.compose": "integrations.diffusers.protocol.compose",
    "integrations.diffusers.flux": "integrations.diffusers.hosts.flux",
    "integrations.diffusers.host": "integrations.diffusers.hosts.host",
    "integrations.diffusers.layer": "integrations.diffusers.protocol.layer",
    "integrations.diffusers.part": "integrations.diffusers.protocol.batch_call",
    "integrations.diffusers.plan": "integrations.diffusers.protocol.plan",
    "integrations.diffusers.processor": "integrations.diffusers.hosts.processor",
    "integrations.diffusers.sd3": "integrations.diffusers.hosts.sd3",
    "integrations.diffusers.unet": "integrations.diffusers.hosts.unet",
    "integrations.evaluation.items": "integrations.evaluation.insertion.items",
    "integrations.evaluation.judges": "integrations.evaluation.insertion.judges",
    "integrations.evaluation.lists": "integrations.evaluation.csv_files",
    "integrations.evaluation.summary": "integrations.evaluation.insertion.summary",
    "integrations.evaluation.sweep": "integrations.evaluation.insertion.sweep",
    "integrations.evaluation.vicl_items": "integrations.evaluation.visual_icl.items",
    "integrations.evaluation.vicl_judges": "integrations.evaluation.visual_icl.judges",
    "integrations.methods.borrowed": "integrations.methods.shared.cross_batch",
    "integrations.methods.ddcm": "integrations.methods.shared.ddcm",
    "integrations.methods.edit_roles": "integrations.methods.shared.roles",
    "integrations.methods.ic_custom_parameters": "integrations.methods.shared.ic_custom_parameters",
    "integrations.methods.image_branch": "integrations.methods.shared.image_branch",
    "integrations.methods.image_prompt": "integrations.methods.shared.image_prompt",
    "integrations.methods.local_blend": "integrations.methods.shared.local_blend",
    "integrations.methods.personal_subject": "integrations.methods.shared.personal_subject",
    "integrations.methods.perturbed": "integrations.methods.shared.perturbed_guidance",
    "integrations.methods.token_alignment": "integrations.methods.shared.token_alignment",
    "integrations.methods.token_masks": "integrations.methods.shared.token_masks",
    "integrations.methods.word_maps": "integrations.methods.shared.word_maps",
    "integrations.pipelines.checks": "integrations.pipelines.shared.arguments",
    "integrations.pipelines.ddim_inversion": "integrations.pipelines.inversion.ddim",
    "integrations.pipelines.ddpm_inversion": "integrations.pipelines.inversion.ddpm",
    "integrations.pipelines.flux": "integrations.pipelines.shared.flux_parts",
    "integrations.pipelines.inversion_cache": "integrations.pipelines.inversion.cache",
    "integrations.pipelines.kv_editing": "integrations.pipelines.kv_edit",
    "integrations.pipelines.personalization": "integrations.pipelines.personalize_anything",
    "integrations.pipelines.stable_diffusion": "integrations.pipelines.shared.stable_diffusion_parts",
    "integrations.pipelines.swap_guidance": "integrations.pipelines.guidance",
    "integrations.pipelines.vicl_tasks": "integrations.pipelines.shared.visual_icl_tasks",
    "kernels.attention_backward": "kernels.attention.backward",
    "kernels.attention_blocks": "kernels.attention.blocks",
    "kernels.attention_forward": "kernels.attention.forward",
    "kernels.attention_statistics": "kernels.attention.statistics",
    "kernels.attention_tiles": "kernels.attention.tiles",
    "kernels.column_mass": "kernels.attention.column_mass",
}


class _MovedFinder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == PACKAGE and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{PACKAGE}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(
            f"flashbrush: {spec.name} is {new} now; the old path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        module = import_module(new)
        self._own_spec = module.__spec__  # the import machinery replaces it by the alias's
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec


def install() -> None:
    """Answer for the old paths from now on; a second call does nothing."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
