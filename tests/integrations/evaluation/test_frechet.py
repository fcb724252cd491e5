"""The Fréchet distance of two sets of pictures, with the autoencoder's features."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")
from flashbrush.integrations.evaluation.frechet import LatentStatistics, frechet_distance
from flashbrush.integrations.evaluation.insertion.items import held_out


def test_frechet_distance_is_0_for_equal_sets(pipe) -> None:
    truths = [item.truth for item in held_out(40)]
    features = LatentStatistics(pipe.pipe.vae)
    dark = [Image.fromarray((np.asarray(picture) * 0.5).astype(np.uint8)) for picture in truths]
    same, far = (frechet_distance(features, found, truths) for found in (truths, dark))
    assert abs(same) < 1e-3 and far > 0.1
