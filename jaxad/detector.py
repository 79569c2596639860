"""A trained detector: method, state, calibration and the pictures it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxad import score
from jaxad.core import Method, Scores, Source, Spec


class Detector(NamedTuple):
    """A trained method, ready to score."""

    method: Method
    state: Any
    calibration: score.Calibration | None  # None without held-out normals
    spec: Spec

    def score(self, images: np.ndarray, *, batch_size: int | None = None) -> Scores:
        """Scores pictures: uint8 (N, H, W, C), or (N, T, H, W, C) for clips, of the size the detector was trained on.

        Returns:
          Scores: raw image scores (N,) and maps (N, H, W), NumPy float32.

        Raises:
          ValueError: another shape, or values that are not uint8.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.spec.image:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; the detector expects uint8 (N, {str(self.spec.image)[1:]}. "
                "Resize them, or read files with jaxad.data.read_images."
            )
        labels = np.full(images.shape[0], -1, np.int32)
        source = Source(image=images, label=labels)
        if len(self.spec.image) == 4:  # clips: frames in a row, one start for each clip
            clip = self.spec.image[0]
            frames = images.reshape(-1, *images.shape[2:])
            starts = np.arange(0, frames.shape[0], clip, dtype=np.int32)
            source = Source(image=frames, label=np.repeat(labels, clip), start=starts, clip=clip)
        return score.score_dataset(
            self.method, self.state, jax.device_put(source), batch_size=batch_size or batch_size_for(self.spec)
        )


def batch_size_for(spec: Spec) -> int:
    """Samples scored at a time: 32, fewer where samples are large."""
    return max(1, min(32, 2**22 // int(np.prod(spec.image))))
