"""Pose propagation: carry the joints of the first frame through a video; percentage of correct keypoints (PCK).

JHMDB as VideoWalk evaluates it (Jabri et al., NeurIPS 2020, arXiv 2006.14613, `eval_pck.py`), and animal videos in the same
way. The published scripts do not reproduce their own paper's numbers, so compare digits across papers with care.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from denoscope.benchmarks.protocol import Features, Item, Record, Row
from denoscope.correspondence.labels import joint_cells, joint_maps
from denoscope.correspondence.propagation import propagate_labels
from denoscope.correspondence.tracking import propagation_settings
from denoscope.errors import InputError, MissingError
from denoscope.images import read
from denoscope.images.draw import contact_sheet
from denoscope.images.draw_tracks import draw_points
from denoscope.images.video import Frames

Poses = Float[Tensor, "frames joints 2"]  # (x, y) in pixels, NaN where lost or not visible

JOINTS = (
    "neck", "belly", "face", "right shoulder", "left shoulder", "right hip", "left hip", "right elbow", "left elbow",
    "right knee", "left knee", "right wrist", "left wrist", "right ankle", "left ankle",
)  # fmt: skip


def normalised_errors(predicted: Poses, truth: Poses) -> Float[Tensor, "frames joints"]:
    """Distance of every joint over 0.6 times the diagonal of the box around the frame's true joints.

    NaN where a joint is lost or not visible; the box is that of the others. Where it has no extent only a distance of 0 is
    right. The first frame is given and not counted: NaN.
    """
    seen = predicted.isfinite().all(2) & truth.isfinite().all(2)
    marks = seen[..., None].expand_as(truth)
    high = truth.masked_fill(~marks, -torch.inf).amax(1)
    low = truth.masked_fill(~marks, torch.inf).amin(1)
    scale = 0.6 * (high - low).norm(dim=1)
    errors = (predicted - truth).norm(dim=2)
    errors = torch.where(errors == 0, 0.0, errors / scale[:, None])
    errors = errors.masked_fill(~seen, torch.nan)
    errors[0] = torch.nan
    return errors


@dataclass(frozen=True, eq=False)
class PoseVideo:
    """frames: pictures in order. truth: pixels, the centre of the top-left one at (0, 0). joints: their names."""

    frames: list[Path]
    truth: Poses
    joints: tuple[str, ...]


@dataclass
class Pose:
    """PCK over videos with joints; what the data sets differ in is where the videos are.

    alphas: shares of the normaliser, the headline first. context, radius: of the propagation; topk, temperature: 0 takes the
    model's own (`propagation_settings`). official: place joints in cells as the published code does (up to a cell off, see
    `joint_maps`, and cells half a cell to the upper left), else exactly.
    """

    root: Path
    alphas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    context: int = 28
    radius: int = 15
    topk: int = 0
    temperature: float = 0.0
    official: bool = True

    name = "pose"
    preset = "temporal"

    def __post_init__(self) -> None:
        self.root = Path(self.root).expanduser()
        if not self.alphas or not all(alpha > 0 for alpha in self.alphas):
            raise InputError("PCK needs at least one positive alpha.")

    @property
    def columns(self) -> list[str]:
        return [f"PCK@{alpha:g}" for alpha in self.alphas]

    def items(self) -> list[Item]:
        raise InputError("Choose a data set.")

    def run(self, item: Item, features: Features) -> Record:
        settings = propagation_settings(getattr(features, "extractor", None))
        settings |= {"context": self.context, "radius": self.radius}
        settings |= {key: getattr(self, key) for key in ("topk", "temperature") if getattr(self, key)}
        return _record(torch.stack(list(propagated_poses(item.data, features, settings, self.official))))

    def copied(self, item: Item) -> Record:
        """Baseline: the first positions, everywhere."""
        return _record(item.data.truth[:1].expand_as(item.data.truth))

    def flowed(self, item: Item) -> Record:
        """Baseline: every joint moved from frame to frame by dense optical flow."""
        return _record(torch.stack(list(flowed_poses(item.data))))

    def rows(self, items: Sequence[Item], records: Sequence[Record]) -> list[Row]:
        """The unweighted mean over joints, then every joint; "count" is how often joints were measured."""
        joints = list(dict.fromkeys(joint for item in items for joint in item.data.joints))
        pooled: dict[str, list[Tensor]] = {joint: [] for joint in joints}
        for item, record in zip(items, records, strict=True):
            for joint, errors in zip(item.data.joints, self._errors(item, record).unbind(1), strict=True):
                pooled[joint].append(errors[~errors.isnan()])
        rows = []
        for joint, parts in pooled.items():
            errors = torch.cat(parts)
            if len(errors):  # one that is never seen has no share
                shares = [100 * (errors <= alpha).double().mean().item() for alpha in self.alphas]
                rows.append({"category": joint, "count": len(errors), **dict(zip(self.columns, shares, strict=True))})
        if not rows:
            raise InputError("No joint is visible both in a first frame and later; there is nothing to measure.")
        means = {column: float(np.mean([row[column] for row in rows])) for column in self.columns}
        return [{"category": "all", "count": sum(row["count"] for row in rows), **means}, *rows]

    def _errors(self, item: Item, record: Record) -> Tensor:
        return normalised_errors(_poses(record), item.data.truth)

    def score(self, item: Item, record: Record) -> float:
        errors = self._errors(item, record)
        errors = errors[~errors.isnan()]
        return (errors <= self.alphas[0]).double().mean().item() if len(errors) else 0.0

    def draw(self, item: Item, record: Record) -> Image.Image:
        """The first, a middle and the last frame: dots are predictions, the lines at them lead to the truth."""
        video: PoseVideo = item.data
        predicted, errors, last = _poses(record), self._errors(item, record), len(video.truth) - 1
        images, titles = [], []
        for index in dict.fromkeys((0, last // 2, last)):
            images.append(draw_points(read(video.frames[index]), predicted[index], [video.truth[index]]))
            right = int((errors[index] <= self.alphas[0]).sum())
            counted = int((~errors[index].isnan()).sum())
            titles.append(f"frame {video.frames[index].stem}" + (f": {right} of {counted} right" if index else ""))
        titles[0] = f"{item.key}, first frame"
        return contact_sheet(images, titles, columns=3, side=426)

    def baselines(self) -> Mapping[str, Callable[[Item], Record]]:
        return {"first position": self.copied, "optical flow": self.flowed}


@dataclass
class JHMDB(Pose):
    """The videos of a list with lines `FRAME_FOLDER JOINT_POSITIONS.mat` (root, or `listed` in the folder root).

    The protocol's own pictures are 320 x 320, with 40 x 40 features: choose `size` and site accordingly.
    """

    listed: str = "testlist_split1.txt"

    name = "jhmdb"

    def items(self) -> list[Item]:
        path = self.root if self.root.is_file() else self.root / self.listed
        if not path.is_file():
            raise MissingError(f"There is no list of videos {path}; name it with --set listed=FILE.")
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        if wrong := [i for i, parts in enumerate(lines, 1) if len(parts) != 2]:
            raise InputError(f"{path}, line {wrong[0]}: a line names a folder of frames and a .mat file.")
        items = []
        for frames, positions in lines:
            folder, mat = (_found(part, path.parent) for part in (frames, positions))
            key = "/".join(folder.parts[-2:])
            truth = _read_mat(mat)
            files = [file for file in Frames(folder).files if file.suffix.lower() == ".png"]
            count = min(len(files), len(truth))
            if count < 2:
                raise InputError(f"{folder} and {mat} have {len(files)} frames and {len(truth)} poses; 2 are needed.")
            items.append(Item(key, folder.parent.name, PoseVideo(files[:count], truth[:count], JOINTS)))
        if not items:
            raise InputError(f"The list {path} is empty.")
        return items


@dataclass
class AnimalVideo(Pose):
    """Folders with frames and keypoints.csv: frame, then PART_x and PART_y in pixels of every part, empty if not visible.

    root: one such folder, or the folder of several. The frames of such sets are picked, not consecutive, so by default
    labels may come from anywhere in the context frames (radius 0).
    """

    radius: int = 0
    official: bool = False

    name = "animal"

    def items(self) -> list[Item]:
        tables = [self.root / "keypoints.csv"] if (self.root / "keypoints.csv").is_file() else []
        tables = tables or sorted(self.root.glob("*/keypoints.csv"))
        if not tables:
            raise MissingError(f"There is no {self.root / 'keypoints.csv'}, nor one in a folder of {self.root}.")
        return [Item(table.parent.name, table.parent.name, _read_table(table)) for table in tables]


def propagated_poses(
    video: PoseVideo, features: Features, settings: Mapping[str, Any], official: bool = False
) -> Iterator[Float[Tensor, "joints 2"]]:
    """Joints of every frame by label propagation. official: cell = pixel * cells / pixels of a side, and back."""
    start = features(read(video.frames[0]), "")
    grid, size = (torch.tensor(two).double() for two in (start.frame.grid, start.frame.picture))

    def values() -> Iterator[Tensor]:
        yield start.values
        for frame in video.frames[1:]:
            yield features(read(frame), "").values

    first = video.truth[0] * grid / size if official else start.frame.to_grid(video.truth[0])
    softs = propagate_labels(values(), joint_maps(first, start.frame.grid, official), **settings)
    for index, soft in enumerate(softs):
        cells = joint_cells(soft).double().cpu()
        found = cells / grid * size if official else start.frame.to_picture(cells)
        found = torch.where((cells < 0).any(1, keepdim=True), torch.nan, found)
        yield found if index else video.truth[0]


def flowed_poses(video: PoseVideo) -> Iterator[Float[Tensor, "joints 2"]]:
    """Joints carried on by DIS optical flow; those that would leave the picture stay at its border."""
    points = video.truth[0].numpy().copy()
    yield torch.from_numpy(points)
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    before = np.array(read(video.frames[0]).image().convert("L"))
    for frame in video.frames[1:]:
        now = np.array(read(frame).image().convert("L"))
        field = flow.calc(before, now, np.zeros((*now.shape, 2), np.float32))
        limit = np.array(now.shape[::-1]) - 1
        at = np.nan_to_num(points).clip(0, limit).round().astype(int)
        points = (points + field[at[:, 1], at[:, 0]]).clip(0, limit)
        before = now
        yield torch.from_numpy(points)


def _record(poses: Poses) -> Record:
    return {"points": [[None if np.isnan(x) else [x, y] for x, y in pose] for pose in poses.tolist()]}


def _poses(record: Record) -> Poses:
    return torch.tensor([[point or [np.nan] * 2 for point in pose] for pose in record["points"]]).double()


def _found(part: str, root: Path) -> Path:
    """A path of the list: as it is, or what of its end lies in the list's own folder (lists name other machines' folders)."""
    path = Path(part)
    tries = [path, *(root.joinpath(*path.parts[i:]) for i in range(path.is_absolute(), len(path.parts)))]
    if found := [one for one in tries if one.exists()]:
        return found[0]
    raise MissingError(f"The list names {part}, but neither that nor its end below {root} is there.")


def _read_mat(path: Path) -> Poses:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        values = np.asarray(loadmat(path)["pos_img"], dtype=np.float64)
    except (MatReadError, KeyError, ValueError, TypeError, OSError, NotImplementedError) as error:
        raise InputError(f"{path} holds no joint positions of JHMDB ({error}).") from None
    if values.ndim != 3 or values.shape[:2] != (2, len(JOINTS)):
        raise InputError(f"{path}: pos_img must be [2, {len(JOINTS)}, frames], not {list(values.shape)}.")
    return torch.from_numpy(values - 1).permute(2, 1, 0).contiguous()  # MATLAB counts from 1


def _read_table(path: Path) -> PoseVideo:
    try:
        header, *rows = [row for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row]
        joints = tuple(name.removesuffix("_x") for name in header[1::2])
        if header[1:] != [f"{joint}_{axis}" for joint in joints for axis in "xy"] or not joints:
            raise ValueError("the header must be frame, then PART_x and PART_y of every part")
        values = [[float(cell) if cell.strip() else np.nan for cell in row[1:]] for row in rows]
        truth = torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(joints), 2)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a table of keypoints ({error}).") from None
    frames = [path.parent / row[0] for row in rows]
    if missing := [frame for frame in frames if not frame.is_file()]:
        raise MissingError(f"{path} names {missing[0].name}, but there is no such file beside it.")
    if len(frames) < 2:
        raise InputError(f"{path} names {len(frames)} frames; a video needs 2 or more.")
    return PoseVideo(frames, truth, joints)
