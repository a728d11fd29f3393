"""Which layer gets how many bits: the least loss within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["allocate"]

_Floats = NDArray[np.float64]

#: Sums of costs in another order may differ in their last bits.
_SLACK = 1e-12


def allocate(
    losses: ArrayLike, costs: ArrayLike, budget: float, *, tied: Iterable[Sequence[int]] = ()
) -> NDArray[np.intp]:
    """Choose one of several formats for each layer, with the least loss that a budget allows.

    The sum of the chosen losses is the least of all choices whose costs sum to the budget or less:
    the integer program of HAWQ, solved exactly. Choices are put together layer by layer; of those
    that cost no less and lose no less than another none is kept, nor of those that cannot beat the
    best one known, by the bound that a price for the cost gives. Hundreds of layers take well below
    a second.

    Parameters
    ----------
    losses : array_like
        What each choice loses, shape (layers, choices): squared errors of the weights times the
        mean trace of the Hessian, for example. ``inf`` for a choice that a layer does not have.
    costs : array_like
        What each choice costs, in the same shape: bytes, operations, or seconds.
    budget : float
        The largest sum of costs.
    tied : iterable of sequences of int, optional
        Layers that have to choose alike, such as those that meet at an addition.

    Returns
    -------
    ndarray
        The column that each layer chooses, integers of shape (layers,).

    Raises
    ------
    ValueError
        If shapes do not fit, a number is NaN, a cost is not finite, or no choice is within the
        budget.
    IndexError
        If a tied layer does not exist.

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.quantizers.allocate([[9.0, 1.0], [4.0, 1.0], [5.0, 4.0]], [[4, 8]] * 3, 17)
    array([1, 0, 0])
    """
    loss, cost = np.asarray(losses, np.float64), np.asarray(costs, np.float64)
    if loss.ndim != 2 or loss.shape[1] == 0 or loss.shape != cost.shape:
        raise ValueError(
            "losses and costs must have the same shape (layers, choices), "
            f"got {loss.shape} and {cost.shape}"
        )
    if np.isnan(loss).any() or np.isneginf(loss).any() or not np.isfinite(cost).all():
        raise ValueError("losses must be numbers or inf, costs must be finite")
    if np.isnan(budget):
        raise ValueError("the budget is NaN")
    member = _groups(len(loss), tied)
    groups = int(member.max(initial=-1)) + 1
    loss, cost = _sums(loss, member, groups), _sums(cost, member, groups)
    limit = budget + _SLACK * float(np.abs(cost).sum())
    # A choice that a layer lacks must not be the cheap one.
    cheapest = np.where(np.isfinite(loss), cost, np.inf).min(axis=1)
    if not cheapest.sum() <= limit:
        raise ValueError(f"the cheapest choices cost {cheapest.sum():g}, the budget is {budget:g}")
    price, best = _price(loss, cost, limit)
    return _search(loss, cost, limit, cheapest, price, best)[member]


def _groups(layers: int, tied: Iterable[Sequence[int]]) -> NDArray[np.intp]:
    """Return the group of each layer, counted in the order of their first layers."""
    first = np.arange(layers)
    for tie in tied:
        index = [int(i) for i in tie]
        if any(not 0 <= i < layers for i in index):
            raise IndexError(f"tied layers {index} of {layers} layers")
        for i in index[1:]:
            first[first == first[i]] = first[index[0]]
    return np.unique(first, return_inverse=True)[1].reshape(layers)


def _sums(of: _Floats, member: NDArray[np.intp], groups: int) -> _Floats:
    total = np.zeros((groups, of.shape[1]))
    np.add.at(total, member, of)
    return total


def _price(loss: _Floats, cost: _Floats, limit: float) -> tuple[float, float]:
    """Return a price for the cost that bounds the loss well, and a loss that is to be had."""

    def choose(price: float) -> tuple[float, float]:
        total = loss + price * cost
        # Of equal ones the cheapest.
        least = total == total.min(axis=1, keepdims=True)
        pick = np.argmin(np.where(least, cost, np.inf), axis=1)
        rows = np.arange(len(loss))
        return float(loss[rows, pick].sum()), float(cost[rows, pick].sum())

    low, high = 0.0, 1.0
    found, paid = choose(low)
    if paid <= limit:
        return low, found
    best = np.inf
    for _ in range(200):
        found, paid = choose(high)
        if paid <= limit:
            best = found
            break
        low, high = high, high * 4
    else:
        return high, best
    for _ in range(100):
        middle = (low + high) / 2
        found, paid = choose(middle)
        if paid <= limit:
            high, best = middle, min(best, found)
        else:
            low = middle
    return high, best


def _search(
    loss: _Floats, cost: _Floats, limit: float, cheapest: _Floats, price: float, best: float
) -> NDArray[np.intp]:
    """Return the choice of each group."""
    groups, choices = loss.shape
    rest_cost = np.append(np.cumsum(cheapest[::-1])[::-1], 0.0)
    priced = (loss + price * cost).min(axis=1)
    rest = np.append(np.cumsum(priced[::-1])[::-1], 0.0)
    scale = float(np.abs(loss[np.isfinite(loss)]).sum() + price * np.abs(cost).sum())
    lost, paid = np.zeros(1), np.zeros(1)
    trail = []
    for i in range(groups):
        lost, paid = (lost[:, None] + loss[i]).ravel(), (paid[:, None] + cost[i]).ravel()
        bound = lost + rest[i + 1]
        if price > 0:
            bound += price * (paid - limit)
        keep = (paid + rest_cost[i + 1] <= limit) & (bound <= best + _SLACK * scale)
        kept = np.flatnonzero(keep & np.isfinite(lost))
        kept = kept[np.lexsort((lost[kept], paid[kept]))]
        least = np.minimum.accumulate(lost[kept])
        kept = kept[np.append(True, lost[kept][1:] < least[:-1])]
        lost, paid = lost[kept], paid[kept]
        trail.append(kept)
    at = int(np.argmin(lost))
    picked = np.empty(groups, np.intp)
    for i in reversed(range(groups)):
        at, picked[i] = divmod(int(trail[i][at]), choices)
    return picked
