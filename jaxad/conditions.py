"""The condition-shift protocol: does a detector tell the same scenes under other conditions from clean ones?

It learns from clean pictures (`normal_class="all"` for sets of classes). Negatives are clean test pictures, positives
the same ones corrupted; one image AUROC for each kind and level (see `jaxad.data.corruptions`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad import metrics
from jaxad.core import Method, Source, as_arrays, take
from jaxad.data import corruptions


def condition_shift(
    key: Any,
    method: Method,
    state: Any,
    clean: Source,
    *,
    kinds: Sequence[str] = tuple(corruptions.KINDS),
    levels: Sequence[float] = corruptions.LEVELS,
    variants: Mapping[str, Mapping[str, float]] | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Measures how well corrupted pictures are told from clean ones.

    Args:
      key: for the corruptions' noise.
      method: the method that made `state`.
      state: the detector.
      clean: N pictures to corrupt, normal ones; no clips.
      kinds: of `corruptions.KINDS`.
      levels: numbers in [0, 5].
      variants: name -> fields of the config that count in scoring only, put into the state; None: {"score": {}}.
      batch_size: pictures at a time.

    Returns:
      A row for each kind, level and variant: {"kind", "level", "variant", "image_auroc"}.

    Raises:
      ValueError: clips, an unknown kind, a variant's field that is compiled in.
    """
    if clean.start is not None:
        raise ValueError("conditions: the source holds clips; expected pictures. Load the data without clip.")
    states = {name: _with_fields(name, state, fields) for name, fields in (variants or {"score": {}}).items()}
    score = jax.jit(lambda state, images: method.score(state, images).image)
    count = len(clean)
    rows_at = [np.minimum(np.arange(i, i + batch_size), count - 1) for i in range(0, count, batch_size)]
    batches = [jax.jit(take)(clean, jnp.asarray(rows))[0] for rows in rows_at]

    def scores_of(state: Any, images: Sequence[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(score(state, batch)) for batch in images])[:count]

    before = {name: scores_of(own, batches) for name, own in states.items()}
    labels, found = np.repeat([0, 1], count), []
    for kind in kinds:
        change = jax.jit(functools.partial(corruptions.corrupt, kind=kind))
        for level in levels:
            changed = [change(jax.random.fold_in(key, i), b, level=float(level)) for i, b in enumerate(batches)]
            for name, own in states.items():
                scored = np.concatenate([before[name], scores_of(own, changed)])
                auroc = metrics.image_metrics(scored, labels)["auroc"]
                found.append({"kind": kind, "level": level, "variant": name, "image_auroc": auroc})
    return found


def _with_fields(name: str, state: Any, fields: Mapping[str, float]) -> Any:
    cfg = state.cfg
    free = [f.name for f in dataclasses.fields(cfg) if not f.metadata.get("static")]
    wrong = [field for field in fields if field not in free]
    if wrong:
        raise ValueError(
            f"conditions: variant {name!r} sets {wrong}, which cannot change in a trained detector; expected some of "
            f"{free}. Train another detector for it."
        )
    return state._replace(cfg=as_arrays(dataclasses.replace(cfg, **fields)))
