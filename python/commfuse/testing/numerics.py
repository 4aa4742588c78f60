"""How right a result is: against float64, and not worse than plain torch in the same dtype."""

from __future__ import annotations

import hashlib

import torch


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest deviation, as a fraction of the reference's largest magnitude.

    Args:
        actual: any dtype.
        reference: float64, of the same shape; its values are taken for the truth.

    Returns:
        0 for empty tensors; inf where ``actual`` is not finite, or not of the reference's shape.

    Example:
        >>> error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0], dtype=torch.float64))
        0.25
    """
    if actual.shape != reference.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    deviation = (actual.double() - reference).abs().max().item()
    if deviation != deviation:
        return float("inf")
    scale = reference.abs().max().item()
    return deviation / scale if scale else (float("inf") if deviation else 0.0)


def complaint(
    actual: torch.Tensor,
    composition: torch.Tensor,
    reference: torch.Tensor,
    factor: float = 2.0,
) -> str | None:
    """Why ``actual`` is not accurate enough, or None.

    It may err by ``factor`` times what the plain composition errs. That one may be right by chance,
    so that it counts with half a unit in the last place of the largest value at least: what
    rounding the truth to the dtype can cost.

    Args:
        actual: the result to judge.
        composition: the same by unfused torch calls in the same dtype.
        reference: the same in float64.
        factor: see above.

    Example:
        >>> complaint(ours, torchs, reference) is None
        True
    """
    if actual.dtype != composition.dtype:
        return f"dtype {actual.dtype}, expected {composition.dtype}"
    if actual.shape != reference.shape:
        return f"shape {list(actual.shape)}, expected {list(reference.shape)}"
    if not actual.is_floating_point():
        return None if torch.equal(actual, reference.to(actual.dtype)) else "other integers"
    rounding = torch.finfo(actual.dtype).eps / 2
    ours, allowed = error(actual, reference), max(error(composition, reference), rounding)
    if ours <= factor * allowed:
        return None
    return f"error {ours:.3g} of the largest value; {factor:g} x {allowed:.3g} is allowed"


def assert_accurate(
    actual: torch.Tensor,
    composition: torch.Tensor,
    reference: torch.Tensor,
    factor: float = 2.0,
) -> None:
    """Raises AssertionError with the :func:`complaint`, if there is one."""
    message = complaint(actual, composition, reference, factor)
    assert message is None, message


def digest(*tensors: torch.Tensor) -> str:
    """A name for exact bits, shapes and dtypes: equal on two ranks only if all of these are.

    Example:
        >>> digest(torch.zeros(2)) == digest(-torch.zeros(2))
        False
    """
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        hasher.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
