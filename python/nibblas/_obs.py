"""Second-order scores: how much a layer's output suffers where a weight is removed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["obs_scores"]


def obs_scores(
    w: ArrayLike, x: ArrayLike, *, block: int | None = None, damping: float = 0.01
) -> NDArray[np.float64]:
    """Return the loss that removing each weight costs, for :func:`nibblas.prune`.

    For a layer ``y = x @ w.T`` the squared error of the outputs is quadratic in the weights, with
    the Hessian ``H = x.T @ x`` for every row. Removing a weight and letting the others of its row
    make up for it costs ``w**2 / (2 * inv(H)[k, k])`` (Optimal Brain Surgeon); with `block` only
    weights of the same block of K do, as in oBERT.

    Parameters
    ----------
    w : array_like
        Weights, shape (N, K).
    x : array_like
        Activations of the layer, shape (samples, K).
    block : int, optional
        Length of the blocks of K that are inverted by themselves; all of K by default.
    damping : float, default 0.01
        What is added to the diagonal, as a fraction of its mean: without it the inverse of few
        samples does not exist.

    Returns
    -------
    ndarray
        float64, in the shape of `w`, at least 0.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or `block` or `damping` is not positive.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> x = np.eye(2) * [1.0, 3.0]
    >>> nb.quantizers.obs_scores([[1.0, 1.0]], x, damping=1e-9).round(3)
    array([[0.5, 4.5]])
    """
    weights, acts = np.asarray(w, np.float64), np.asarray(x, np.float64)
    if weights.ndim != 2:
        raise ValueError(f"weights are a matrix: expected 2 dimensions, got shape {weights.shape}")
    k = weights.shape[1]
    if acts.ndim != 2 or acts.shape[1] != k:
        raise ValueError(f"x must have shape (samples, {k}), got {acts.shape}")
    if not (np.isfinite(weights).all() and np.isfinite(acts).all()):
        raise ValueError("weights and activations must be finite")
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
    if block is not None and block < 1:
        raise ValueError(f"block must be a length, got {block}")
    step = k if block is None else block
    # Powers and cross terms of the activations, a block at a time.
    power = float((acts * acts).sum() / max(k, 1))
    extra = damping * (power if power > 0 else 1.0)
    diagonal = np.empty(k)
    for start in range(0, k, max(step, 1)):
        part = acts[:, start : start + step]
        hessian = part.T @ part
        hessian[np.diag_indices_from(hessian)] += extra
        diagonal[start : start + step] = np.diag(np.linalg.inv(hessian))
    return weights * weights / (2 * diagonal)
