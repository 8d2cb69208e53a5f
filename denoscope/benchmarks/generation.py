"""How good generated pictures are: Fréchet distance, inception score, precision and recall, on the features of any network.

Everything is computed from features [samples, dimensions], taken wherever one likes: pool_3 of Inception (2048-d) for the FID
of papers, the first 7 channels of its mixed_6 (2023-d) for sFID, any other network for one's own comparisons. The readers
accept the files of the guided-diffusion evaluator (Dhariwal and Nichol, arXiv 2105.05233).
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor

from denoscope.errors import InputError, MissingError
from denoscope.images import read
from denoscope.images.picture import IMAGE_SUFFIXES

Features = Float[Tensor, "_samples _dimensions"]  # the underscore: two sets differ
Images = UInt8[np.ndarray, "samples height width 3"]
Labels = Int64[np.ndarray, " samples"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and (unbiased) covariance of features, in float64."""

    mu: Float64[Tensor, " dimensions"]
    sigma: Float64[Tensor, "dimensions dimensions"]

    @classmethod
    def of(cls, features: Features) -> "Statistics":
        """Raises InputError for fewer than two samples and for values that are not finite."""
        if len(features) < 2:
            raise InputError(f"There is {len(features)} sample with features; a covariance needs at least 2.")
        features = _finite(features)
        return cls(features.mean(0), torch.atleast_2d(features.T.cov()))


@dataclass(frozen=True, eq=False)
class Reference:
    """What real pictures are represented by: the pictures, statistics of their features, or both.

    pool: of pool_3 (`mu, sigma`), for FID. spatial: of mixed_6 (`mu_s, sigma_s`), for sFID.
    """

    images: Images | None = None
    pool: Statistics | None = None
    spatial: Statistics | None = None


def frechet_distance(a: Features | Statistics, b: Features | Statistics) -> float:
    """`|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^{1/2})` (Heusel et al., arXiv 1706.08500), in float64.

    (S_a S_b)^{1/2} has the eigenvalues of the singular values of `R_a^T R_b` with `S = R R^T`, so that singular covariances
    (fewer samples than dimensions) lose no digits and nothing becomes complex.
    Raises InputError when the features differ in dimensions, are too few, or are not finite.
    """
    a, b = (one if isinstance(one, Statistics) else Statistics.of(one) for one in (a, b))
    if a.mu.shape != b.mu.shape:
        raise InputError(f"Features of {len(a.mu)} and {len(b.mu)} dimensions cannot be compared; use one network.")
    both = torch.linalg.svdvals(_root(a.sigma).T @ _root(b.sigma)).sum()
    distance = (a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * both
    return max(distance.item(), 0.0)


def _root(sigma: Tensor) -> Tensor:
    """R with `R R^T = sigma`, where what rounding made negative counts as 0."""
    values, vectors = torch.linalg.eigh(sigma)
    return vectors * values.clamp_min(0).sqrt()


def noise_floor(real: Features, count: int | None = None, seeds: int = 5) -> float:
    """Fréchet distance of two random parts of the real features, mean over `seeds` divisions: less is noise.

    count: samples in one part, the others being the rest (as many as were generated: what a perfect model would get); by
    default a half.
    """
    count = len(real) // 2 if count is None else count
    if seeds < 1 or not 2 <= count <= len(real) - 2:
        raise InputError(
            f"A noise floor needs at least 2 samples in both parts and 1 seed, not {count} of {len(real)}."
        )
    orders = [torch.randperm(len(real), generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    return sum(frechet_distance(real[order[:count]], real[order[count:]]) for order in orders) / seeds


def inception_score(probabilities: Float[Tensor, "samples classes"], splits: int = 10) -> tuple[float, float]:
    """(mean, standard deviation) of `exp(E KL(p(y|x) | p(y)))` over consecutive splits (Salimans et al., arXiv 1606.03498).

    The evaluator of guided-diffusion splits by 5000 samples, so 50 000 are 10 splits. Samples are taken in their order.
    Raises InputError when rows are no probabilities, or for more splits than samples.
    """
    p = _finite(probabilities)
    if (p < 0).any() or (p.sum(1) - 1).abs().max() > 1e-3:
        raise InputError(
            "The inception score takes probabilities, one row a sample that sums to 1; apply softmax first."
        )
    if not 1 <= splits <= len(p):
        raise InputError(f"{splits} splits of {len(p)} samples are impossible; use from 1 to {len(p)}.")
    scores = []
    for part in p.tensor_split(splits):
        marginal = part.mean(0, keepdim=True)
        scores.append((part.xlogy(part) - part.xlogy(marginal)).sum(1).mean().exp())
    together = torch.stack(scores)
    return together.mean().item(), together.std(correction=0).item()


def precision_recall(real: Features, fake: Features, k: int = 3, memory: int = 2**27) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    The manifold of a set is the union of balls around its samples that reach to their k-th nearest neighbour in the set.
    precision: share of `fake` in the manifold of `real` (fidelity); recall: share of `real` in that of `fake` (diversity).
    memory: bytes of distances at a time. Raises InputError when a set has not more than k samples, or dimensions differ.
    """
    if real.shape[1] != fake.shape[1]:
        raise InputError(f"Features of {real.shape[1]} and {fake.shape[1]} dimensions cannot be compared.")
    if not 1 <= k < min(len(real), len(fake)):
        raise InputError(
            f"k is {k}; it must be from 1 to {min(len(real), len(fake)) - 1}, the samples there are less 1."
        )
    centre = _finite(real).mean(0)
    real, fake = _finite(real) - centre, _finite(fake) - centre
    precision = _inside(fake, real, _radii(real, k, memory), memory)
    recall = _inside(real, fake, _radii(fake, k, memory), memory)
    return precision.double().mean().item(), recall.double().mean().item()


def _squared(x: Tensor, y: Tensor, memory: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, squared distances of some rows of x to all of y); what is only rounding is 0."""
    own, others = x.square().sum(1, keepdim=True), y.square().sum(1)
    rows = max(1, memory // (8 * len(y)))
    for low in range(0, len(x), rows):
        scale = own[low : low + rows] + others
        squared = scale - 2 * x[low : low + rows] @ y.T
        yield low, squared.where(squared > 1e-12 * scale, 0)


def _radii(x: Tensor, k: int, memory: int) -> Tensor:
    """Squared distance to the k-th nearest other sample."""
    found = []
    for low, squared in _squared(x, x, memory):
        rows = torch.arange(len(squared))
        squared[rows, low + rows] = float("inf")
        found.append(squared.kthvalue(k).values)
    return torch.cat(found)


def _inside(x: Tensor, centres: Tensor, radii: Tensor, memory: int) -> Bool[Tensor, " samples"]:
    return torch.cat([(squared <= radii).any(1) for _, squared in _squared(x, centres, memory)])


def evaluate_generation(
    features_fake: Features,
    features_real: Features | Statistics,
    *,
    probabilities: Float[Tensor, "samples classes"] | None = None,
    k: int = 3,
    splits: int = 10,
) -> dict[str, float]:
    """One row of a table: `fid`; `precision` and `recall` unless the real set is only known by its statistics;
    `inception_score` when the class probabilities of the generated pictures are given; `samples`.
    """
    row = {"samples": float(len(features_fake)), "fid": frechet_distance(features_fake, features_real)}
    if not isinstance(features_real, Statistics):
        row["precision"], row["recall"] = precision_recall(features_real, features_fake, k)
    if probabilities is not None:
        row["inception_score"] = inception_score(probabilities, splits)[0]
    return row


def read_samples(path: str | Path) -> tuple[Images, Labels | None]:
    """(pictures, labels or None) of an .npz file of guided-diffusion (`arr_0`, and `arr_1` where there are labels), or of a
    folder of images of one size in the order of their names.

    Raises MissingError when there is nothing, InputError when it is damaged or something else.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path), None
    arrays = _read_arrays(path, ("arr_0", "arr_1"))
    if "arr_0" not in arrays:
        raise InputError(
            f"{path} holds no pictures; samples are the array arr_0 of an .npz file, or a folder of images."
        )
    images = _images(path, arrays["arr_0"])
    labels = arrays.get("arr_1")
    if labels is None:
        return images, None
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise InputError(
            f"{path}: arr_1 must hold a whole number for each of {len(images)} samples, not {_shown(labels)}."
        )
    return images, labels.astype(np.int64)


def read_reference(path: str | Path) -> Reference:
    """The reference batch of an evaluation: an .npz file with pictures (`arr_0`), with statistics (`mu, sigma`, and
    `mu_s, sigma_s`), or both, as published for ImageNet; or a folder of images.

    Raises MissingError when there is nothing, InputError when it is damaged or something else.
    """
    path = Path(path)
    if path.is_dir():
        return Reference(_read_folder(path))
    arrays = _read_arrays(path, ("arr_0", "mu", "sigma", "mu_s", "sigma_s"))
    images = _images(path, arrays["arr_0"]) if "arr_0" in arrays else None
    pool, spatial = (_statistics(path, arrays, "mu" + end, "sigma" + end) for end in ("", "_s"))
    if images is None and pool is None:
        raise InputError(f"{path} is no reference; it must hold pictures (arr_0) or statistics (mu and sigma).")
    return Reference(images, pool, spatial)


def _read_folder(path: Path) -> Images:
    suitable = (file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(file for file in suitable if not file.name.startswith("."))
    if not files:
        raise MissingError(f"The folder {path} holds no images.")
    images = [np.asarray(read(file).image()) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(f"{file} is not of the size of {files[0].name}; all samples must be of one size.")
    return np.stack(images)


def _read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise MissingError(f"There is no file or folder {path}.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in names if name in stored}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path} is not an .npz file of arrays, or is damaged.") from None


def _shown(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _images(path: Path, array: np.ndarray) -> Images:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise InputError(f"{path}: arr_0 must hold pictures, uint8 [samples, height, width, 3], not {_shown(array)}.")
    return array


def _statistics(path: Path, arrays: Mapping[str, np.ndarray], mu: str, sigma: str) -> Statistics | None:
    if mu not in arrays and sigma not in arrays:
        return None
    if mu not in arrays or sigma not in arrays:
        raise InputError(f"{path} holds only one of {mu} and {sigma}; a Fréchet distance needs both.")
    mean, covariance = arrays[mu], arrays[sigma]
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f" or covariance.shape != mean.shape * 2 or mean.ndim != 1:
        raise InputError(
            f"{path}: {mu} and {sigma} must be numbers [d] and [d, d], not {_shown(mean)} and {_shown(covariance)}."
        )
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise InputError(f"{path}: {mu} or {sigma} holds values that are not finite.")
    return Statistics(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double())


def _finite(features: Features) -> Float64[Tensor, "_samples _dimensions"]:
    if not features.isfinite().all():
        raise InputError("The features hold values that are not finite; look at the pictures they were taken from.")
    return features.detach().cpu().double()
