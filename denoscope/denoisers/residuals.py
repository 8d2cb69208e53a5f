"""ControlNets inside a forward pass: what each adds to the network's activations, summed, for the rows that it acts on.

Zhang, Rao and Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023 (arXiv 2302.05543): a trained
copy of the network's first half sees the same noisy latents, timestep and prompt, and a picture besides.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from denoscope.denoisers.protocol import ControlInput

Rows = Any  # a slice, or numbers
Run = Callable[[Any, Tensor, Rows], Sequence[Tensor | None]]


def summed(controls: Sequence[ControlInput], run: Run) -> list[Tensor | None] | None:
    """Sums over ControlNets of their scaled residuals; None when none of them acts.

    run: (network, image, rows) to the residuals of those rows, None where there is none. Rows of scale 0 get exactly 0.
    """
    total: list[Tensor | None] | None = None
    for control in controls:
        batch, scale = control.scale.shape[0], control.scale
        acting = scale.nonzero().flatten()
        if not len(acting):
            continue
        rows: Rows = slice(None) if len(acting) == batch else acting
        image = control.image[rows].to(next(control.network.parameters()))
        found = [_scaled(made, scale[rows], rows, batch) for made in run(control.network, image, rows)]
        total = found if total is None else [_plus(one, two) for one, two in zip(total, found, strict=True)]
    return total


def of_rows(given: Any, rows: Rows, batch: int) -> Any:
    """The rows of everything in the arguments of a network that has a row for each of `batch` samples."""
    if isinstance(given, Mapping):
        return {name: of_rows(value, rows, batch) for name, value in given.items()}
    if isinstance(given, Tensor) and given.ndim and given.shape[0] == batch:
        return given[rows]
    return given


def per_block(residuals: Sequence[Tensor] | None, which: Sequence[int]) -> list[Tensor | None]:
    """One residual for each block of the network, by number: ControlNets have fewer blocks and act on several with each."""
    return [residuals[k] for k in which] if residuals else [None] * len(which)


def _scaled(made: Tensor | None, scale: Tensor, rows: Rows, batch: int) -> Tensor | None:
    if made is None:
        return None
    value = (made * scale.to(made.device).view(-1, *[1] * (made.ndim - 1))).to(made.dtype)
    if value.shape[0] == batch:
        return value
    return value.new_zeros(batch, *value.shape[1:]).index_copy(0, rows.to(value.device), value)


def _plus(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one + two
