"""Inner products and norms of per-sample weight gradients, without keeping those gradients.

The gradient of sample i with respect to the weights of a linear layer is a product L_i^T R_i of what went in and what
came back, T positions each: L (B, T, C) and R (B, T, D). Two ways to reduce it against a reference (C, D):
  * direct: form L_i^T R_i, reduce, drop it. 2TCD + 4CD operations, CD numbers a sample.
  * ghost: the inner product is that of L_i reference with R_i, the squared norm that of two Gram matrices.
    2TCD + 2T^2 (C + D) operations, 2T^2 numbers a sample.
Since the gradient formed for its norm gives the inner product for nothing, ghost saves work only where T < sqrt(2CD /
(C + D)); otherwise it can only save memory.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxad.core import Array

IMPLS = ("auto", "direct", "ghost")
EPSILON = 1e-8  # of torch's cosine_similarity


def choose(impl: str, positions: int, left: int, right: int, *, budget: float = math.inf) -> str:
    """Resolves "auto" at trace time from T, C and D.

    Args:
      impl: "auto", "direct" or "ghost".
      positions, left, right: T, C and D.
      budget: numbers that a sample may take.

    Returns:
      "direct" or "ghost".

    Raises:
      ValueError: an unknown name.
    """
    if impl not in IMPLS:
        raise ValueError(f"cos_impl={impl!r} is unknown; expected one of {IMPLS}. Pass cos_impl='auto'.")
    if impl != "auto":
        return impl
    is_cheaper = positions <= math.sqrt(2 * left * right / (left + right))
    is_smaller = left * right > budget and positions**2 < left * right / 2
    return "ghost" if is_cheaper or is_smaller else "direct"


def gradient_moments(left: Array, right: Array, reference: Array, *, impl: str = "auto") -> tuple[Array, Array]:
    """Inner product with a reference, and squared norm, of each sample's L_i^T R_i.

    Args:
      left: (B, T, C).
      right: (B, T, D).
      reference: (C, D).
      impl: "direct", "ghost" or "auto".

    Returns:
      (inner products (B,), squared norms (B,)), of at least float32 whatever the inputs are.
    """
    wide = jnp.promote_types(left.dtype, jnp.float32)
    if choose(impl, left.shape[1], left.shape[2], right.shape[2]) == "direct":
        gradients = jnp.einsum("btc,btd->bcd", left, right, preferred_element_type=wide)
        return (gradients * reference).sum(axis=(1, 2)), (gradients**2).sum(axis=(1, 2))
    forward = jnp.einsum("btc,cd->btd", left, reference.astype(left.dtype), preferred_element_type=wide)
    grams = [jnp.einsum("btc,bsc->bts", x, x, preferred_element_type=wide) for x in (left, right)]
    return (forward * right).sum(axis=(1, 2)), (grams[0] * grams[1]).sum(axis=(1, 2))


def safe_cosine(dot: Array, square_a: Array, square_b: Array, *, eps_mode: str = "norm") -> Array:
    """Cosine from an inner product and two squared norms, kept finite, gradients too, where a norm is 0.

    Args:
      dot, square_a, square_b: arrays of one shape.
      eps_mode: what is kept above 1e-8: each "norm" (torch >= 2) or their "product" (torch 1), which shrinks the
        cosine of very short gradients.
    """
    if eps_mode == "product":
        return dot / jnp.sqrt(jnp.maximum(square_a * square_b, EPSILON**2))
    return dot / jnp.sqrt(jnp.maximum(square_a, EPSILON**2)) / jnp.sqrt(jnp.maximum(square_b, EPSILON**2))
