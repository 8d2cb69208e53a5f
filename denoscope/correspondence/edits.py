"""Edit propagation: what was painted on one picture, carried to others (DIFT, arXiv 2306.03881, section 5.1)."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from denoscope.correspondence.geometric import Matrix, absurd, estimate
from denoscope.correspondence.keypoints import check_convention
from denoscope.correspondence.matching import TIE, comparable
from denoscope.errors import InputError
from denoscope.features import FeatureMap, as_extractor
from denoscope.images import Picture, Points, read, save_result
from denoscope.images.geometry import warp
from denoscope.images.picture import _existing, _opened

FITS = ("homography", "affine", "similarity")
_SCORES_AT_ONCE = 1 << 24  # distances held at a time (64 MiB)
_FEWEST, _SHARE = 8, 0.02  # points that must agree: so many, and so large a share

Rgba = UInt8[np.ndarray, "height width 4"]


@dataclass(frozen=True, eq=False)
class Propagated:
    """The edit on one target. image: the composite, or the untouched target when not ok. sticker: the warped edit alone, RGBA.

    matrix: pixels of the source to pixels of the target; None when nothing could be estimated. ok, reason: whether it is to
    be trusted, and why not. source_points, points: pixels under the edit and the nearest features of the target.
    inliers: which of them agree with the matrix. recipe: how it was made.
    """

    image: Image.Image = field(repr=False)
    sticker: Image.Image = field(repr=False)
    matrix: Matrix | None
    ok: bool
    reason: str
    source_points: Points
    points: Points
    inliers: Bool[Tensor, " points"]
    recipe: dict[str, Any]
    target: Picture = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What is saved as JSON."""
        return {
            "target": str(self.target.path) if self.target.path else None,
            "size": list(self.target.size),
            "ok": self.ok,
            "reason": self.reason,
            "matrix": None if self.matrix is None else self.matrix.tolist(),
            "points": len(self.points),
            "inliers": int(self.inliers.sum()),
            "recipe": {key: value for key, value in self.recipe.items() if key not in ("picture", "size")},
        }

    def draw(self) -> Image.Image:
        """The composite."""
        return self.image

    def save(self, path: str | Path) -> Path:
        """Write by suffix: .json (numbers), .npz (arrays) or an image (the composite)."""
        arrays = {
            "source_points": self.source_points,
            "points": self.points,
            "inliers": self.inliers,
            **({} if self.matrix is None else {"matrix": self.matrix}),
            "recipe": json.dumps(self.recipe),
        }
        return save_result(path, "Propagated edits", self.to_dict, lambda: arrays, lambda: self.image)


def read_edit(edit: str | Path | Image.Image | np.ndarray, size: tuple[int, int]) -> Rgba:
    """An edit as RGBA of the size (width, height) of the picture that it was painted on.

    Raises MissingError, and InputError when it has no transparency, another size, or nothing painted on it.
    """
    what = str(edit) if isinstance(edit, str | Path) else "The edit"
    if isinstance(edit, np.ndarray):
        if edit.dtype != np.uint8 or edit.ndim != 3 or edit.shape[2] != 4:
            raise InputError(f"An edit must be uint8 [height, width, 4] (RGBA), not {edit.dtype} {list(edit.shape)}.")
        rgba = edit
    else:
        if not isinstance(edit, Image.Image):
            with _opened(_existing(edit)) as opened:
                edit = opened.copy()
        image = ImageOps.exif_transpose(edit)
        if not image.has_transparency_data:
            raise InputError(
                f"{what} has no transparency ({image.mode}); save what was painted alone, as a PNG with an alpha channel."
            )
        rgba = np.array(image.convert("RGBA"))
    if rgba.shape[1::-1] != size:
        raise InputError(
            f"{what} is {rgba.shape[1]}x{rgba.shape[0]} but its source {size[0]}x{size[1]}; they must be equally large."
        )
    if not rgba[..., 3].any():
        raise InputError(f"{what} is transparent everywhere, so there is nothing to carry over.")
    return rgba


def nearest(source: FeatureMap, target: FeatureMap, points: Points) -> Points:
    """For every source point the target pixel whose interpolated feature is nearest to it, by Euclidean distance.

    The first in row-major order wins among those whose squared distance is within 1e-6 of the least. The enlarged map is
    never built (see `FeatureMap.squared_distance`).
    """
    w, h = target.frame.picture
    found = []
    for some in source.at(points).split(max(1, _SCORES_AT_ONCE // (w * h))):
        flat = target.squared_distance(some).flatten(1)
        index = (flat <= flat.amin(1, keepdim=True) + TIE).to(torch.uint8).argmax(1)
        found.append(torch.stack([index % w, index // w], 1).double().cpu())
    return torch.cat(found)


def normalised(fm: FeatureMap, convention: str = "exact") -> FeatureMap:
    """The map with features of unit length in every cell.

    convention: "exact", or "official", where the published notebook puts the centres of the outermost cells on the centres of
    the outermost pixels (`align_corners=True`), which shifts what lies towards the border by up to half a cell.
    """
    frame = fm.frame
    if convention == "official":
        both = zip(frame.grid, frame.picture, strict=True)
        sx, sy = ((cells - 1) / max(1, pixels - 1) for cells, pixels in both)
        frame = replace(frame, scale=(sx, sy), offset=(0.5 - 0.5 * sx, 0.5 - 0.5 * sy))
    return replace(fm, values=F.normalize(fm.values.float(), dim=0), frame=frame)


def propagate(
    edit: Rgba,
    source: FeatureMap,
    target: FeatureMap,
    picture: Picture,
    *,
    points: int = 1000,
    fit: str = "homography",
    method: str = "ransac",
    threshold: float | int = 5.0,
    cycle: float | int | None = None,
    convention: str = "exact",
    seed: int = 0,
    force: bool = False,
) -> Propagated:
    """Carry an edit from the picture of one feature map to that of another; see `propagate_edit` for the arguments.

    edit: RGBA as large as the source. picture: the target.
    """
    comparable(source, target, force)
    _check(points, fit, cycle, convention)
    ys, xs = edit[..., 3].nonzero()
    under = torch.from_numpy(np.stack([xs, ys], 1).astype(np.float64))
    chosen = under[torch.randperm(len(under), generator=torch.Generator().manual_seed(seed))[:points]]
    one, two = normalised(source, convention), normalised(target, convention)
    found = nearest(one, two, chosen)
    if cycle is not None:
        kept = (nearest(two, one, found) - chosen).norm(dim=1) <= cycle
        chosen, found = chosen[kept], found[kept]
    made = estimate(chosen, found, fit, method, threshold)
    ok, reason = made.ok, made.reason
    if ok:
        agreeing, least = int(made.inliers.sum()), max(_FEWEST, round(_SHARE * len(chosen)))
        left, top, right, bottom = xs.min() - 0.5, ys.min() - 0.5, xs.max() + 0.5, ys.max() + 0.5
        box = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=torch.float64)
        assert made.matrix is not None
        reason = absurd(made.matrix, box, source.frame.picture, picture.size)
        reason = f"only {agreeing} of {len(chosen)} points agree" if agreeing < least else reason
        ok = not reason
    sticker = np.zeros((picture.height, picture.width, 4), np.uint8)
    if ok and made.matrix is not None:
        straight = convention == "official"
        sticker = (
            cv2.warpPerspective(edit, made.matrix, picture.size) if straight else warp(edit, made.matrix, picture.size)
        )
    settings = {"points": points, "fit": fit, "method": method, "threshold": float(threshold), "cycle": cycle}
    return Propagated(
        image=composite(picture, sticker),
        sticker=Image.fromarray(sticker),
        matrix=made.matrix,
        ok=ok,
        reason=reason,
        source_points=chosen,
        points=found,
        inliers=made.inliers,
        recipe={**target.recipe, **settings, "convention": convention, "point_seed": seed},
        target=picture,
    )


def composite(picture: Picture, sticker: Rgba) -> Image.Image:
    """The picture with RGBA of its size laid over it."""
    alpha = sticker[..., 3:] / 255
    mixed = alpha * sticker[..., :3] + (1 - alpha) * np.array(picture.image())
    return Image.fromarray(mixed.round().astype(np.uint8))


def _check(points: int, fit: str, cycle: float | int | None, convention: str) -> None:
    if points < 1:
        raise InputError(f"Ask for at least 1 point under the edit, not {points}.")
    if fit not in FITS:
        raise InputError(f"Unknown fit {fit!r}; an edit is moved by one of {', '.join(FITS)}.")
    if cycle is not None and not cycle >= 0:
        raise InputError(f"The cycle distance must be 0 or more pixels, not {cycle}.")
    check_convention(convention)


def propagate_edit(
    model: Any,
    edit: str | Path | Image.Image | np.ndarray,
    source: Any,
    targets: Any,
    *,
    points: int = 1000,
    fit: str = "homography",
    method: str = "ransac",
    threshold: float | int = 5.0,
    cycle: float | int | None = None,
    convention: str = "exact",
    seed: int = 0,
    **options: Any,
) -> Any:
    """Carry what was painted on one picture to others; a list of targets gives a list of `Propagated`.

    Nearest neighbours of at most `points` random pixels under the edit (alpha > 0), by Euclidean distance of unit-length
    features, decide a homography, under which the edit is warped and laid over the target.

    model: a Denoiser, or any Extractor. edit: RGBA image as large as the source. source, targets: what `denoscope.read` takes.
    fit: "homography" (as published), or "affine" or "similarity", which few or coarse matches cannot distort as much.
    method, threshold: see `estimate`. cycle: use only points that come back to within so many source pixels when matched back.
    convention: "official" samples features and warps colours as the published notebook does. seed: of the random pixels and
    of the noise. `options` are those of `denoscope.features`.

    An edit that cannot be placed is a result with `ok=False` and a reason. Raises InputError for wrong arguments, and for
    edits without transparency or of another size than the source.
    """
    extract = as_extractor(model, seed=seed, **options)
    _check(points, fit, cycle, convention)
    estimate(np.zeros((0, 2)), np.zeros((0, 2)), fit, method, threshold)  # mistakes before the expensive part
    original, many = read(source), isinstance(targets, list | tuple)
    rgba = read_edit(edit, original.size)
    pictures = [read(one) for one in (targets if many else [targets])]
    first = extract(original)
    found = [
        propagate(
            rgba,
            first,
            extract(picture),
            picture,
            points=points,
            fit=fit,
            method=method,
            threshold=threshold,
            cycle=cycle,
            convention=convention,
            seed=seed,
        )
        for picture in pictures
    ]
    return found if many else found[0]
