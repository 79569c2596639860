"""A detector's score as StableHLO: loads with jax alone, without jaxad or flax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.core import Method, Spec


def export_score(
    method: Method, state: Any, spec: Spec, *, batch_size: int | None = None, platforms: Sequence[str] = ("cpu",)
) -> bytes:
    """Serialises images uint8 (B, ...) -> (image scores (B,), maps (B, H, W)) with the detector baked in.

    Args:
      method, state: the detector.
      spec: of the data; fixes the picture's shape.
      batch_size: fixed B, or None for any.
      platforms: where the artefact shall run: "cpu", "cuda", "tpu".

    Returns:
      Bytes for `jax.export.deserialize`. They load in this jax version and newer ones.

    Raises:
      RuntimeError: the artefact's scores differ from the detector's.
    """
    from jax import export

    def run(images):
        return tuple(method.score(state, images.astype(jnp.float32) / 255))

    (batch,) = export.symbolic_shape("b") if batch_size is None else (batch_size,)
    shape = jax.ShapeDtypeStruct((batch, *spec.image), jnp.uint8)
    artefact = export.export(jax.jit(run), platforms=list(platforms))(shape).serialize()
    probe = np.random.default_rng(0).integers(0, 256, (batch_size or 2, *spec.image), np.uint8)
    expected, got = jax.jit(run)(probe), export.deserialize(artefact).call(probe)
    if not all(np.allclose(e, g, rtol=1e-4, atol=1e-6) for e, g in zip(expected, got, strict=True)):
        raise RuntimeError(
            f"{method.name}: the exported artefact scores differently from the detector; it was not kept."
        )
    return bytes(artefact)
