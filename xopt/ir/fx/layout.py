"""Ops that make, move, pick and join elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from xopt.ir.fx.elementwise import DTYPES

Ints: TypeAlias = Tensor | Sequence[int] | int


def integers(value: Ints | None) -> list[int]:
    """The integers of a tensor or an attribute; [] for None."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [int(item) for item in value.reshape(-1).tolist()]
    return [value] if isinstance(value, int) else list(value)


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes of the axes start to end, int64."""
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64, device=x.device)


def size(x: Tensor) -> Tensor:
    """Number of elements, int64."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """View with another shape; 0 copies a size (unless ``allowzero``), -1 is what is left."""
    target = integers(shape)
    if not allowzero:
        target = [x.shape[axis] if target_size == 0 else target_size for axis, target_size in enumerate(target)]
    return x.reshape(target)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Matrix of the axes before and from ``axis``."""
    rows = 1
    for extent in x.shape[: axis + x.ndim if axis < 0 else axis]:
        rows *= extent
    return x.reshape(rows, -1)


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Permute axes; reverse them without ``perm``."""
    return x.permute(tuple(perm) if perm is not None else tuple(reversed(range(x.ndim))))


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Drop axes of size 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(integers(axes)))


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """Put in axes of size 1, counted in the result."""
    places = integers(axes)
    rank = x.ndim + len(places)
    for axis in sorted(place % rank for place in places):
        x = x.unsqueeze(axis)
    return x


def concat(*parts: Tensor, axis: int) -> Tensor:
    """Join along an axis."""
    return torch.cat(parts, dim=axis)


def split(
    x: Tensor, split: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> tuple[Tensor, ...]:
    """Parts along an axis, of the sizes given or equal (the last may be smaller)."""
    sizes: list[int] | int = -(-x.shape[axis] // (num_outputs or outputs)) if split is None else integers(split)
    parts: tuple[Tensor, ...] = torch.split(x, sizes, dim=axis)
    return parts


def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    """Ranges along axes, with numpy's clamping; negative steps run backward."""
    first, last = integers(starts), integers(ends)
    along = integers(axes) if axes is not None else list(range(len(first)))
    stride = integers(steps) if steps is not None else [1] * len(first)
    for begin, end, axis, step in zip(first, last, along, stride):
        start, stop, step = slice(begin, end if end > -(2**62) else None, step).indices(x.shape[axis])
        if step > 0:
            x = x.narrow(axis, start, max(stop - start, 0))
            x = x if step == 1 else x[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
        else:
            x = x.index_select(axis, torch.arange(start, min(start, stop), step, device=x.device))
    return x


def _from_front(indices: Tensor, extent: int) -> Tensor:
    return torch.where(indices < 0, indices + extent, indices).to(torch.int64)


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Slices of an axis; the indices' shape takes the axis' place."""
    axis = axis % x.ndim
    rows = x.index_select(axis, _from_front(indices.reshape(-1), x.shape[axis]))
    return rows.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """``out[i][j] = x[index[i][j]][j]`` along an axis."""
    return torch.gather(x, axis, _from_front(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices at the index tuples of the last axis; the first ``batch_dims`` axes are walked together."""
    depth = indices.shape[-1]
    lead = [
        torch.arange(n, device=x.device).reshape([-1 if i == axis else 1 for i in range(indices.ndim - 1)])
        for axis, n in enumerate(indices.shape[:batch_dims])
    ]
    picks = [_from_front(indices[..., i], x.shape[batch_dims + i]) for i in range(depth)]
    return x[tuple(lead + picks)]


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Copy of x with updates put (or reduced) at the index tuples of the last axis."""
    where = tuple(_from_front(indices[..., i], x.shape[i]) for i in range(indices.shape[-1]))
    if reduction in ("none", "add"):
        return x.index_put(where, updates, accumulate=reduction == "add")
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    inner = x.shape[indices.shape[-1] :]
    for index, extent in zip(where, x.shape):
        flat = flat * extent + index
    rows = x.reshape(-1, inner.numel())
    target = flat.reshape(-1, 1).expand(-1, inner.numel())
    kind = {"mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return rows.scatter_reduce(0, target, updates.reshape(-1, inner.numel()), kind).reshape(x.shape)


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """Copy of x with ``x[index[i][j]][j] = updates[i][j]`` along an axis."""
    where = _from_front(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, where, updates)
    kind = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return x.scatter_reduce(axis, where, updates, kind)


def expand(x: Tensor, shape: Ints) -> Tensor:
    """Broadcast against a shape (in both directions)."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(integers(shape))))


def tile(x: Tensor, repeats: Ints) -> Tensor:
    """Repeat along each axis."""
    return x.repeat(integers(repeats))


def pad(
    x: Tensor, pads: Ints, value: Tensor | float | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    """Add elements at the ends of axes (negative: remove): a constant, the edge, its reflection, or the other end."""
    amounts = integers(pads)
    along = [axis % x.ndim for axis in integers(axes)] if axes is not None else list(range(x.ndim))
    for axis, before, after in zip(along, amounts, amounts[len(along) :]):
        extent = x.shape[axis]
        place = torch.arange(-before, extent + after, device=x.device)
        if mode == "constant":
            padding = [0, 0] * (x.ndim - axis - 1) + [before, after]
            x = F.pad(x, padding, value=0.0 if value is None else float(value))
        elif mode == "edge":
            x = x.index_select(axis, place.clamp(0, extent - 1))
        elif mode == "wrap":
            x = x.index_select(axis, place % extent)
        else:
            period = place % max(2 * (extent - 1), 1)
            x = x.index_select(axis, torch.minimum(period, 2 * (extent - 1) - period))
    return x


def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Numbers from start to limit (exclusive)."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    """A shape filled with one value (float 0 when not given)."""
    fill = torch.zeros(1) if value is None else value
    return torch.full(integers(shape), fill.item(), dtype=fill.dtype, device=shape.device)


def constant(
    *,
    value: Tensor | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
) -> Tensor:
    """A tensor written in the node."""
    if value is not None:
        return value
    if value_int is not None or value_ints is not None:
        return torch.tensor(value_ints if value_int is None else value_int, dtype=torch.int64)
    return torch.tensor(value_floats if value_float is None else value_float, dtype=torch.float32)


def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """``values[1]`` at the index along a new axis of size depth, ``values[0]`` elsewhere."""
    count = int(depth.item())
    place = _from_front(indices.to(torch.int64), count).unsqueeze(axis)
    grid = torch.arange(count, device=indices.device).reshape(
        [-1 if i == axis % place.ndim else 1 for i in range(place.ndim)]
    )
    return torch.where(grid == place, values[1], values[0])


def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """Upper or lower triangle of the last two axes, zeros elsewhere."""
    offset = 0 if k is None else int(k.item())
    return torch.triu(x, offset) if upper else torch.tril(x, offset)


def nonzero(x: Tensor) -> Tensor:
    """Indices of nonzero elements, int64 [rank, count]."""
    return torch.nonzero(x).t()


def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on diagonal ``k``, in the shape of x."""
    ones = torch.ones_like(x).triu(k).tril(k)
    return ones if dtype is None else ones.to(DTYPES[ir.DataType(dtype)])


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """[N, C, H, W] -> [N, C/b², H*b, W*b]."""
    n, c, h, w = x.shape
    inner = c // blocksize**2
    if mode == "DCR":
        return (
            x.reshape(n, blocksize, blocksize, inner, h, w)
            .permute(0, 3, 4, 1, 5, 2)
            .reshape(n, inner, h * blocksize, -1)
        )
    return (
        x.reshape(n, inner, blocksize, blocksize, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, inner, h * blocksize, -1)
    )


def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    """[N, C, H, W] -> [N, C*b², H/b, W/b]."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


def grid_sample(
    x: Tensor, grid: Tensor, *, mode: str = "linear", padding_mode: str = "zeros", align_corners: int = 0
) -> Tensor:
    """Sample [N, C, ...] at the places of ``grid``, which are from -1 to 1."""
    kind = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid, kind, padding_mode, bool(align_corners))


def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    antialias: int = 0,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    """Resample the spatial axes of [N, C, ...] (forms accepted by :func:`resize_problem`)."""
    by_sizes = sizes is not None and sizes.numel() > 0
    if by_sizes:
        target: list[int] = integers(sizes)[-(x.ndim - 2) :]
    else:
        assert scales is not None  # ONNX asks for one of the two
        target = [int(extent * scale) for extent, scale in zip(x.shape[2:], scales.tolist()[2:])]
    if mode == "nearest":
        return F.interpolate(x, size=target, mode="nearest")
    kind = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear"}.get(
        (mode, x.ndim), "bicubic"
    )
    aligned = coordinate_transformation_mode == "align_corners"
    return F.interpolate(x, size=target, mode=kind, align_corners=aligned, antialias=bool(antialias))


def resize_problem(
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    keep_aspect_ratio_policy: str = "stretch",
    **_: Any,
) -> str | None:
    """Why torch's interpolation is not this Resize, or None."""
    if exclude_outside or keep_aspect_ratio_policy != "stretch":
        return "exclude_outside or keep_aspect_ratio_policy"
    if mode == "nearest":
        plain = coordinate_transformation_mode == "asymmetric" and nearest_mode == "floor"
        return None if plain else f"nearest with {coordinate_transformation_mode}, {nearest_mode}"
    if mode == "cubic" and abs(cubic_coeff_a + 0.75) > 1e-6:
        return f"cubic_coeff_a={cubic_coeff_a}"
    known = ("half_pixel", "pytorch_half_pixel", "align_corners")
    return None if coordinate_transformation_mode in known else coordinate_transformation_mode


TABLE: dict[str, Callable[..., Any]] = {
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "GridSample": grid_sample,
    "NonZero": nonzero,
    "OneHot": one_hot,
    "Pad": pad,
    "Range": range_,
    "Reshape": reshape,
    "Resize": resize,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "Shape": shape,
    "Size": size,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
CHECKS: dict[str, Callable[..., str | None]] = {"Resize": resize_problem}
