"""Measures of visual in-context learning: the metrics of SD-VICL (arXiv 2508.09949) for its six tasks.

Prediction and ground truth are read by the same function of the task (see visual_icl_tasks), then compared.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...pipelines import images as im
from ...pipelines.shared.visual_icl_tasks import Palette, check_palette, check_task, read_task
from ..frechet import frechet_distance

MEASURES = {
    "miou": "intersection over union: mean over predictions; semantic: over classes, from the pixels of "
    "all predictions",
    "mse": "mean squared error, of levels in [0, 1]; keypoints: of positions, the longer side being 1",
    "pck": "share of keypoints that are at most `reach` of the longer side away",
    "lpips": "LPIPS: a network's distance between prediction and truth",
    "fid": "FID: Fréchet distance of Inception's features between all predictions and all truths",
    "fid_latents": "Fréchet distance of the autoencoder's latents, their means and deviations; comparable "
    "within one model",
}
HIGHER_IS_BETTER = ("miou", "pck")


class TaskJudge:
    """Compares predictions with ground truths.

    Examples:
        ```python
        judge = TaskJudge("segmentation")
        for result, truth in zip(results, truths):
            judge.update(result.data, truth)  # {"miou": 0.71}, of this prediction
        judge.summary()  # {"miou": 0.64}, of all predictions
        ```

    Args:
        task: one of visual_icl_tasks.TASKS.
        palette: for semantic and keypoints, the palette that the predictions were read with.
        reach: of pck: how far a correct keypoint may be off, as a share of the picture's longer side. The
            paper does not say of which length its distance is a share.
        lpips: for colourisation, torchmetrics' network: "alex", "vgg" or "squeeze"; None: not measured.
        features: for colourisation, a module from (n, 3, height, width) uint8 to (n, features), whose
            distance is "fid_latents"; "inception": torchmetrics' own, whose distance is "fid"; None: not
            measured.

    Raises:
        ValueError: an unknown task, a missing palette, or a reach outside (0, 1].
        ImportError: torchmetrics is not installed, or what it needs for `lpips` or "inception".
    """

    def __init__(
        self,
        task: str,
        *,
        palette: Palette | None = None,
        reach: float = 0.1,
        lpips: str | None = None,
        features: nn.Module | str | None = None,
    ) -> None:
        self.task, self.palette, self.reach, self.features = check_task(task), palette, reach, features
        if not isinstance(reach, (int, float)) or not 0 < reach <= 1:
            raise ValueError(f"reach: expected a share above 0, up to 1, got {reach!r}")
        self._classes: Any = None
        self._lpips: Any = None
        if task in ("semantic", "keypoints"):
            if palette is None:
                raise ValueError(f"palette: {task} needs one, see palette_of")
            self.palette = check_palette(palette)
        if task == "semantic":
            from torchmetrics.classification import MulticlassJaccardIndex

            self._classes = MulticlassJaccardIndex(len(check_palette(palette or ())), average="macro")
        if features == "inception" and find_spec("torch_fidelity") is None:
            raise ImportError("fid: Inception's features need torch-fidelity, which is not installed")
        if lpips is not None:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            try:
                network: Any = lpips
                self._lpips = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)
            except ModuleNotFoundError as error:
                raise ImportError(f"lpips: {error}") from error
        self._measured: list[dict[str, float]] = []
        # Of each picture: errors of its keypoints, and whether they are within reach.
        self._points: list[tuple[np.ndarray, np.ndarray]] = []
        self._found: list[Image.Image] = []
        self._truths: list[Image.Image] = []

    def update(self, data: Any, truth: Image.Image) -> dict[str, float]:
        """Add a prediction.

        Args:
            data: as VisualICLOutput.data.
            truth: the ground truth's picture, of the prediction's size.

        Returns:
            The prediction's own measures; distances between sets are in summary() only.

        Raises:
            ValueError: another size, or a truth without keypoints.
        """
        expected = read_task(self.task, truth, palette=self.palette).data
        if self.task != "detection" and self.task != "keypoints" and np.shape(data) != np.shape(expected):
            raise ValueError(f"data: expected the truth's shape {np.shape(expected)}, got {np.shape(data)}")
        measured = getattr(self, f"_{self.task}")(data, expected, truth.size)
        self._measured.append(measured)
        return measured

    def summary(self) -> dict[str, float]:
        """The measures of all predictions.

        Raises:
            ValueError: there is no prediction; or fewer than two, where a Fréchet distance is asked for.
        """
        if not self._measured:
            raise ValueError("predictions: expected at least one, got none")
        found = {name: float(np.mean([m[name] for m in self._measured])) for name in self._measured[0]}
        if self._classes is not None:
            found["miou"] = float(self._classes.compute())
        if self._points:
            errors, correct = (np.concatenate(parts) for parts in zip(*self._points, strict=True))
            found = {"mse": float((errors**2).mean()), "pck": float(correct.mean())}
        if self.features is not None and self.task == "colourisation":
            if len(self._found) < 2:
                raise ValueError("predictions: a Fréchet distance needs at least two")
            name = "fid" if self.features == "inception" else "fid_latents"
            features: Any = 2048 if self.features == "inception" else self.features
            found[name] = frechet_distance(features, self._found, self._truths)
        return found

    def _segmentation(
        self, data: np.ndarray, expected: np.ndarray, size: tuple[int, int]
    ) -> dict[str, float]:
        from torchmetrics.functional.classification import binary_jaccard_index

        # Where both are empty, the prediction is right: 1.
        iou = binary_jaccard_index(_tensor(data).int(), _tensor(expected).int(), zero_division=1)
        return {"miou": float(iou)}

    def _detection(self, data: Any, expected: Any, size: tuple[int, int]) -> dict[str, float]:
        return self._segmentation(_filled(data, size), _filled(expected, size), size)

    def _semantic(self, data: np.ndarray, expected: np.ndarray, size: tuple[int, int]) -> dict[str, float]:
        return {"miou": float(self._classes(_tensor(data), _tensor(expected)))}

    def _keypoints(self, data: Any, expected: Any, size: tuple[int, int]) -> dict[str, float]:
        known = ~np.isnan(expected).any(axis=1)
        if not known.any():
            raise ValueError("truth: expected at least one keypoint, found none in the palette's colours")
        # A point that was not found counts as one in the middle of the picture, since leaving it out would
        # make finding nothing the best answer. It is never correct, even if the middle is.
        missing = np.isnan(data).any(axis=1)[known]
        places = np.where(np.isnan(data), (np.array(size) - 1) / 2, data)
        errors = np.linalg.norm(places - expected, axis=1)[known] / max(size)
        correct = (errors <= self.reach) & ~missing
        self._points.append((errors, correct))
        return {"mse": float((errors**2).mean()), "pck": float(correct.mean())}

    def _edges(self, data: np.ndarray, expected: np.ndarray, size: tuple[int, int]) -> dict[str, float]:
        from torchmetrics.functional.regression import mean_squared_error

        return {"mse": float(mean_squared_error(_tensor(data), _tensor(expected)))}

    def _colourisation(
        self, data: np.ndarray, expected: np.ndarray, size: tuple[int, int]
    ) -> dict[str, float]:
        self._truths.append(Image.fromarray(expected))
        self._found.append(Image.fromarray(data))
        # A Fréchet distance needs pictures of one size.
        for pictures in (self._truths, self._found):
            pictures[-1] = im.resize_photo(pictures[-1], self._truths[0].size)
        if self._lpips is None:
            return {}
        a, b = (_tensor(x).permute(2, 0, 1)[None].float() / 255 for x in (data, expected))
        return {"lpips": float(self._lpips(a, b))}


def _filled(box: tuple[int, int, int, int] | None, size: tuple[int, int]) -> np.ndarray:
    """True inside of the box, (height, width) bool."""
    mask = np.zeros(size[::-1], bool)
    if box is not None:
        left, top, right, bottom = box
        mask[top:bottom, left:right] = True
    return mask


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
