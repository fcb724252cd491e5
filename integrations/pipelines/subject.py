"""Finding the subject of a picture by its name: Grounding DINO finds the box, SAM the outline."""

from __future__ import annotations

import os
from typing import Any

import torch
from PIL import Image

from .images import check_mask, flatten

DETECTOR = "IDEA-Research/grounding-dino-base"
SEGMENTER = "facebook/sam-vit-huge"


class SubjectFinder:
    """Finds the mask of a subject by its name, with Grounding DINO and SAM.

    Default thresholds, 0.35 for boxes and 0.25 for text, are those of In-Context Brush's released code. Of
    the boxes that pass both, the one with the highest score is taken.

    Examples:
        ```python
        finder = SubjectFinder.from_pretrained(device="cuda")
        mask = finder(Image.open("cat.jpg"), "a cat")
        ```

    Args:
        detector: a zero-shot object detection model of transformers.
        detector_processor: its processor.
        segmenter: a SAM model.
        segmenter_processor: its processor.
    """

    def __init__(
        self, detector: Any, detector_processor: Any, segmenter: Any, segmenter_processor: Any
    ) -> None:
        self.detector, self.detector_processor = detector.eval(), detector_processor
        self.segmenter, self.segmenter_processor = segmenter.eval(), segmenter_processor

    @classmethod
    def from_pretrained(
        cls,
        detector: str | os.PathLike[str] = DETECTOR,
        segmenter: str | os.PathLike[str] = SEGMENTER,
        *,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> SubjectFinder:
        """Load both models from hub ids or folders; safetensors only.

        Args:
            detector: hub id or folder of the object detection model.
            segmenter: hub id or folder of the SAM model.
            device: where the models run, in float32.
            options: passed on to every from_pretrained (revision, cache_dir, local_files_only ...).

        Raises:
            OSError: not found.
        """
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, SamModel, SamProcessor

        sam: Any = SamModel.from_pretrained(segmenter, use_safetensors=True, **options)
        return cls(
            AutoModelForZeroShotObjectDetection.from_pretrained(detector, use_safetensors=True, **options).to(
                device
            ),
            AutoProcessor.from_pretrained(detector, **options),
            sam.to(device),
            SamProcessor.from_pretrained(segmenter, **options),
        )

    def __call__(
        self, image: Image.Image, name: str, *, box_threshold: float = 0.35, text_threshold: float = 0.25
    ) -> Image.Image:
        """The mask of the subject called `name`, of the image's size.

        Args:
            image: RGB or RGBA.
            name: what to look for, in a few words.
            box_threshold: as in find().
            text_threshold: as in find().

        Raises:
            ValueError: an empty name; nothing of that name is found; its outline is empty or everything.
        """
        box = self.find(image, name, box_threshold=box_threshold, text_threshold=text_threshold)
        return check_mask(self.outline(image, box), f"subject_name: the outline of {name!r}")

    @torch.inference_mode()
    def find(
        self, image: Image.Image, name: str, *, box_threshold: float = 0.35, text_threshold: float = 0.25
    ) -> tuple[float, float, float, float]:
        """The box of the best match.

        Args:
            image: RGB or RGBA.
            name: what to look for, in a few words.
            box_threshold: least score of a box, in [0, 1].
            text_threshold: least score of a word of the name for a box, in [0, 1]; a box without a word is
                dropped.

        Returns:
            (left, top, right, bottom) in pixels.

        Raises:
            ValueError: an empty name, or no box passes both thresholds.
        """
        if not isinstance(name, str) or not name.strip(" ."):
            raise ValueError(f"subject_name: expected a few words, got {name!r}")
        picture = flatten(image)
        text = name.strip(" .").lower() + "."  # the form that Grounding DINO was trained on
        inputs = self.detector_processor(images=picture, text=text, return_tensors="pt").to(
            self.detector.device
        )
        found = self.detector_processor.post_process_grounded_object_detection(
            self.detector(**inputs),
            inputs["input_ids"],
            threshold=box_threshold,
            text_threshold=text_threshold,
            target_sizes=[(picture.height, picture.width)],
        )[0]
        named = [i for i, label in enumerate(found["text_labels"]) if label.strip(" .")]
        if not named:
            raise ValueError(
                f"subject_name: no {name!r} found in the picture (box threshold {box_threshold:g}, "
                f"text threshold {text_threshold:g}); give a mask, other words, or lower thresholds"
            )
        best = max(named, key=lambda i: float(found["scores"][i]))
        left, top, right, bottom = found["boxes"][best].tolist()
        return max(left, 0.0), max(top, 0.0), min(right, picture.width), min(bottom, picture.height)

    @torch.inference_mode()
    def outline(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        """The mask of what fills a box: SAM's best of three proposals.

        Args:
            image: RGB or RGBA.
            box: (left, top, right, bottom) in pixels.
        """
        picture = flatten(image)
        inputs = self.segmenter_processor(picture, input_boxes=[[list(box)]], return_tensors="pt")
        inputs = inputs.to(self.segmenter.device)
        outputs = self.segmenter(**inputs, multimask_output=True)
        masks = self.segmenter_processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
        )[0]  # (1, 3, height, width) bool
        best = int(outputs.iou_scores.reshape(-1).argmax())
        return Image.fromarray(masks[0, best].numpy().astype("uint8") * 255)
