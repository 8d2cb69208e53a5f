"""Files of dense ground truth: .flo, .pfm and KITTI's 16-bit PNG; and the layouts of folders that hold them."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float

from denoscope.errors import InputError, MissingError
from denoscope.images import Picture, read
from denoscope.images.picture import IMAGE_SUFFIXES

UNKNOWN = 1e9  # Middlebury: larger motions mean "unknown"
_LOOKED_FOR = (
    "looked for TSS (image1.png, image2.png, flow1.flo), KITTI (image_2 with flow_occ or disp_occ_0), or folders with two "
    "pictures NAME1 and NAME2 and a .flo file, or NAMEL and NAMER and a NAMEGT.png or disp*.png or .pfm"
)


@dataclass(frozen=True)
class DensePair:
    """Two pictures and a file that says where pixels of the source are in the target.

    stereo: the file holds disparities d: (x, y) of the left picture is at (x - d, y) in the right one.
    mask: image that is bright where the truth counts. mirrored: the truth is for the source flipped left to right.
    """

    key: str
    category: str
    source: Path
    target: Path
    truth: Path
    stereo: bool = False
    mask: Path | None = None
    mirrored: bool = False

    def pictures(self) -> tuple[Picture, Picture]:
        source = read(self.source)
        return Picture(source.pixels.flip(2), source.path) if self.mirrored else source, read(self.target)

    def flow(self) -> Float[np.ndarray, "height width 2"]:
        """Motion (dx, dy) in pixels of the source, NaN where unknown."""
        if not self.stereo:
            return read_flow(self.truth)
        disparity = read_disparity(self.truth)
        return np.stack([-disparity, np.where(np.isnan(disparity), np.nan, 0)], -1)

    def known(self, shape: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
        """Where the mask lets the truth count; everywhere without one."""
        if self.mask is None:
            return np.ones(shape, bool)
        inside = read(self.mask).pixels.amax(0).numpy() > 0.5
        if inside.shape != shape:
            raise InputError(f"{self.mask} is {inside.shape[1]}x{inside.shape[0]}, its flow {shape[1]}x{shape[0]}.")
        return inside[:, ::-1] if self.mirrored else inside


def read_flow(path: Path) -> Float[np.ndarray, "height width 2"]:
    """Optical flow from Middlebury's .flo or KITTI's 16-bit PNG: (value - 2^15) / 64, known where the third channel is not 0.

    Not finite values and those above 1e9 are unknown: NaN. Raises MissingError or InputError.
    """
    if not path.is_file():
        raise MissingError(f"There is no flow file {path}.")
    if path.suffix.lower() == ".flo":
        data = path.read_bytes()
        header = np.frombuffer(data[:12], "<i4") if len(data) >= 12 else np.zeros(3, "<i4")
        width, height = int(header[1]), int(header[2])
        if data[:4] != b"PIEH" or not (0 < width < 1 << 16 and 0 < height < 1 << 16):
            raise InputError(f"{path} is no .flo file (it should begin with PIEH, width and height).")
        if len(data) != 12 + 8 * width * height:
            raise InputError(f"{path} is truncated or damaged: {width}x{height} needs {12 + 8 * width * height} bytes.")
        flow = np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)
        known = np.all(np.abs(flow) <= UNKNOWN, axis=-1)  # false for NaN
    else:
        values = _image(path)
        if values.dtype != np.uint16 or values.ndim != 3 or values.shape[2] != 3:
            raise InputError(f"{path} is no KITTI flow, which is a PNG with three channels of 16 bits.")
        flow = ((values[..., :0:-1].astype(np.float32)) - 2**15) / 64  # OpenCV reads blue, green, red
        known = values[..., 0] > 0
    return np.where(known[..., None], flow, np.float32(np.nan))


def read_disparity(path: Path) -> Float[np.ndarray, "height width"]:
    """Disparity in pixels from an 8-bit PNG (pixels), a 16-bit PNG (256ths, KITTI) or a .pfm file (Middlebury 2014).

    0 and what is not finite is unknown: NaN. Raises MissingError or InputError.
    """
    if not path.is_file():
        raise MissingError(f"There is no disparity file {path}.")
    values = _image(path)
    if values.ndim == 3 and values.shape[2] >= 3 and (values[..., :1] == values[..., 1:3]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise InputError(f"{path} is no disparity: it has {values.shape[2]} different channels.")
    disparity = values.astype(np.float32) / (256 if values.dtype == np.uint16 else 1)
    return np.where(np.isfinite(disparity) & (disparity != 0), disparity, np.float32(np.nan))


def _image(path: Path) -> np.ndarray:
    values = cv2.imdecode(np.frombuffer(path.read_bytes() or b" ", np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise InputError(f"{path} cannot be read as an image; it is damaged or of another kind.")
    return values


def find_pairs(root: str | Path) -> list[DensePair]:
    """All pairs below a folder, sorted by where they lie. In every folder, the first of these that fits:

    1. TSS: image1, image2 and flow1.flo (1 to 2) or flow2.flo (2 to 1). mask1 and mask2, where they are, restrict the pixels
       of either picture; where flip_gt.txt says 1 the source is mirrored. The category is the parent folder's name.
    2. KITTI: image_2 (or colored_0) beside flow_occ (or flow_noc) with NAME_10.png and NAME_11.png, and beside disp_occ_0,
       disp_occ (or noc) with image_3 (or colored_1). The categories are "flow" and "stereo".
    3. Flow: one .flo file and two pictures of which one's name ends in 1 and the other's in 2 ("flow").
    4. Stereo: pictures whose names end in L and R, or im0 and im1, or view1 and view5, with a truth whose name ends in GT or
       begins with disp (disp0, disp1 for the left picture; .png or .pfm) ("stereo").

    Raises MissingError saying what was looked for.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise MissingError(f"There is no folder {root}.")
    found: list[DensePair] = []
    for folder in sorted([root, *(path for path in root.rglob("*") if path.is_dir())]):
        name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
        found += _tss(folder, name) or _kitti(folder, name) or _flow(folder, name) or _stereo(folder, name)
    if not found:
        raise MissingError(f"{root} holds no dense ground truth: {_LOOKED_FOR}.")
    return found


def _picture(folder: Path, stem: str) -> Path | None:
    return next((path for s in sorted(IMAGE_SUFFIXES) if (path := folder / f"{stem}{s}").is_file()), None)


def _tss(folder: Path, name: str) -> list[DensePair]:
    one, two = _picture(folder, "image1"), _picture(folder, "image2")
    if one is None or two is None:
        return []
    flip = folder / "flip_gt.txt"
    mirrored = flip.is_file() and flip.read_text().strip().startswith("1")
    return [
        DensePair(
            f"{name}/{i}", folder.resolve().parent.name, source, target, truth,
            mask=_picture(folder, f"mask{i}"), mirrored=mirrored,
        )
        for i, source, target in ((1, one, two), (2, two, one))
        if (truth := folder / f"flow{i}.flo").is_file()
    ]  # fmt: skip


def _kitti(folder: Path, name: str) -> list[DensePair]:
    left = next((folder / n for n in ("image_2", "colored_0", "image_0") if (folder / n).is_dir()), None)
    if left is None:
        return []
    found = []
    right = folder / {"image_2": "image_3", "colored_0": "colored_1", "image_0": "image_1"}[left.name]
    for truths, stereo in (
        (("flow_occ", "flow_noc"), False),
        (("disp_occ_0", "disp_noc_0", "disp_occ", "disp_noc"), True),
    ):
        truth = next((folder / n for n in truths if (folder / n).is_dir()), None)
        for file in sorted(truth.glob("*_10.png")) if truth else []:
            target = right / file.name if stereo else left / file.name.replace("_10.", "_11.")
            for path in (left / file.name, target):
                if not path.is_file():
                    raise MissingError(f"{file} needs the picture {path}, which is not there.")
            kind = "stereo" if stereo else "flow"
            found.append(DensePair(f"{name}/{kind}/{file.stem}", kind, left / file.name, target, file, stereo))
    return found


def _flow(folder: Path, name: str) -> list[DensePair]:
    truths = sorted(folder.glob("*.flo"))
    if len(truths) != 1:
        return []
    stems = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    pairs = [
        (path, stems[stem[:-1] + "2"]) for stem, path in stems.items() if stem[-1] == "1" and stem[:-1] + "2" in stems
    ]
    if len(pairs) != 1:
        raise MissingError(
            f"{truths[0]} needs two pictures beside it, NAME1 and NAME2; {len(pairs)} such pairs are there."
        )
    return [DensePair(name, "flow", *pairs[0], truths[0])]


def _stereo(folder: Path, name: str) -> list[DensePair]:
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in {*IMAGE_SUFFIXES, ".pfm"}}
    truths = [
        path for stem, path in files.items() if stem.endswith("GT") or stem in ("disp", "disp0", "disp1", "disp0GT")
    ]
    pairs = [
        (path, files[right])
        for stem, path in files.items()
        if (right := {"im0": "im1", "view1": "view5"}.get(stem, stem[:-1] + "R" if stem[-1] == "L" else "")) in files
    ]
    return [DensePair(name, "stereo", *pairs[0], truths[0], True)] if truths and pairs else []
