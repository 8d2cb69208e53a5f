"""Convolutions by Winograd's minimal filtering: the same sums with a third of the multiplications.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016 (arXiv 1509.09308), section 4.3, F(4x4, 3x3):
tiles d of 6 x 6 values and kernels g of 3 x 3 give 4 x 4 outputs Y = A^T [(G g G^T) * (B^T d B)] A, so that the sum over
channels takes 36 multiplications in the place of 144. In float32 a layer is off by 2e-6 of its size (0.3e-6 by direct sums).

On GPUs the vendors' libraries choose such algorithms themselves; PyTorch on a CPU sums directly.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_BT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
       [0, 4, 0, -5, 0, 1]]  # fmt: skip
_G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6],
      [0, 0, 1]]  # fmt: skip
_AT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
_VALUES_AT_ONCE = 1 << 23  # 32 MiB, so that what one step writes the next still finds in the cache

_ACTIVE: ContextVar[bool] = ContextVar("winograd", default=False)


@contextmanager
def winograd() -> Iterator[None]:
    """Inside, 3 x 3 convolutions of any model are done by Winograd's algorithm where that takes less than half the operations.

    with ds.winograd():
        fm = ds.features(denoiser, "cat.jpg")

    Only in float32 on the CPU (and on meta tensors, where operations are counted), with stride and dilation 1, and where no
    gradients are asked for. Networks are left as they are; the context holds for its thread.
    """
    token = _ACTIVE.set(True)
    try:
        with _Convolutions():
            yield
    finally:
        _ACTIVE.reset(token)


def described(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What to write down of how the convolutions of a model are done: nothing where PyTorch does them."""
    acts = _ACTIVE.get() and device.type == "cpu" and dtype == torch.float32
    return {"convolutions": "winograd"} if acts else {}


def convolved(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "outputs channels 3 3"],
    bias: Float[Tensor, " outputs"] | None = None,
    padding: int = 1,
) -> Float[Tensor, "batch outputs rows columns"]:
    """`F.conv2d` with stride 1 and zeros around, in parts that need little memory beside the result."""
    batch, c = x.shape[:2]
    height, width = (side + 2 * padding - 2 for side in x.shape[2:])
    down, across, outputs = -(-height // 4), -(-width // 4), len(weight)
    bt, g, at = (matrix.to(x.device) for matrix in _matrices())
    most = max(1, _VALUES_AT_ONCE // (36 * c))  # tiles, or kernels of one channel each, at once
    images, rows = max(1, most // (down * across)), min(down, max(1, most // across))
    parts = [(i, r) for i in range(0, batch, images) for r in range(0, down, rows)]
    kernels = weight.reshape(outputs, -1, 9)

    def transformed(first: int, last: int) -> Tensor:
        return torch.mm(g, kernels[first:last].reshape(-1, 9).T).view(36, -1, c)

    # kernels are transformed in pieces where all tiles fit in one part, else beforehand
    pieces = range(0, outputs, min(outputs, most))
    whole = transformed(0, outputs) if len(parts) > 1 else None
    result = x.new_empty(batch, outputs, height, width)
    for i, r in parts:
        d, count = _tiles(x[i : i + images], r, min(rows, down - r), across, padding)
        v = torch.mm(bt, d).view(36, c, -1)
        for o in pieces if whole is None else (0,):
            u = whole if whole is not None else transformed(o, o + pieces.step)
            y = torch.mm(at, torch.bmm(u, v).view(36, -1)).view(4, 4, -1, count, min(rows, down - r), across)
            y = y.permute(3, 2, 4, 0, 5, 1).flatten(4, 5).flatten(2, 3)
            target = result[i : i + images, o : o + y.shape[1], 4 * r : 4 * (r + rows)]
            target.copy_(y[:, :, : target.shape[2], :width])
    return result if bias is None else result.add_(bias[:, None, None])


def _tiles(x: Tensor, first: int, rows: int, across: int, padding: int) -> tuple[Tensor, int]:
    """Overlapping tiles [36, channels * images * rows * across] of some rows of tiles, and the number of images."""
    n, c, _, width = x.shape
    top, left = 4 * first - padding, padding
    bottom = top + 4 * rows + 2
    x = x[:, :, max(0, top) : bottom]
    x = F.pad(x, (left, 4 * (across + 1) - width - left, max(0, -top), 4 * (rows + 1) - x.shape[2] - max(0, -top)))
    # every fourth row and column by itself, so that a tile's places are slices
    s = x.view(n, c, rows + 1, 4, across + 1, 4).permute(3, 5, 1, 0, 2, 4).contiguous()
    d = x.new_empty(6, 6, c, n, rows, across)
    for i in range(6):
        for j in range(6):
            d[i, j] = s[i % 4, j % 4, :, :, i // 4 : i // 4 + rows, j // 4 : j // 4 + across]
    return d.view(36, -1), n


@cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """B^T x B^T [36, 36], G x G [36, 9] and A^T x A^T [16, 36] (Kronecker products): both sides of a tile in one product."""
    made = (torch.tensor(one, dtype=torch.float64, device="cpu") for one in (_BT, _G, _AT))
    bt, g, at = (torch.kron(one, one).float() for one in made)
    return bt, g, at


def _pays(c: int, outputs: int, tiles: int) -> bool:
    """Whether products and transforms take less than half the multiplications of direct sums.

    Those of the transforms count twice: they wait for memory more than they multiply.
    """
    products, transforms = 36 * tiles * c * outputs, 36 * (9 * c * outputs + (36 * c + 16 * outputs) * tiles)
    return products + 2 * transforms < 72 * tiles * c * outputs


class _Convolutions(TorchFunctionMode):
    """Takes the calls of `conv2d` that `winograd` is for; every other call goes its way."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and (found := _convolution(*args, **kwargs)) is not None:
            return found
        return func(*args, **kwargs)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """The convolution, or None where it is left to PyTorch."""
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (input, weight, bias)):
        return None
    ones = [{one} if isinstance(one, int) else set(one) for one in (stride, dilation)]
    pads = {padding} if isinstance(padding, int) else {1} if padding == "same" else set(padding)
    if weight.shape[2:] != (3, 3) or groups != 1 or ones != [{1}, {1}] or pads not in ({0}, {1}):
        return None
    if (
        input.ndim != 4
        or input.shape[1] != weight.shape[1]
        or input.dtype != torch.float32
        or weight.dtype != torch.float32
    ):
        return None
    if input.device.type not in ("cpu", "meta") or torch.is_autocast_enabled("cpu"):
        return None
    pad = pads.pop()
    height, width = (side + 2 * pad - 2 for side in input.shape[2:])
    if min(height, width) < 1 or not _pays(
        input.shape[1], len(weight), input.shape[0] * -(-height // 4) * -(-width // 4)
    ):
        return None
    return convolved(input, weight, bias, pad)
