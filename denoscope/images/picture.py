"""`Picture` and `Clip`: images as the user has them, whatever file or array they came from."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from denoscope.errors import InputError, MissingError

MAX_PIXELS = 100_000_000
Resample = Literal["bicubic", "linear"]
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


@dataclass(frozen=True, eq=False)
class Picture:
    """One RGB image.

    pixels: float32 in [0, 1]; EXIF orientation applied, alpha composited on white, other colour modes converted.
    path: where it was read from, if it was a file.
    """

    pixels: Float[Tensor, "3 height width"]
    path: Path | None = None

    @property
    def width(self) -> int:
        return self.pixels.shape[2]

    @property
    def height(self) -> int:
        return self.pixels.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), the order of Pillow."""
        return self.width, self.height

    @property
    def name(self) -> str:
        return self.path.stem if self.path else "picture"

    def image(self) -> Image.Image:
        """The picture as an 8-bit Pillow image."""
        return Image.fromarray((self.pixels * 255).round().byte().permute(1, 2, 0).numpy())

    def resized(self, size: tuple[int, int], resample: Resample = "bicubic") -> Float[Tensor, "3 height width"]:
        """Pixels in [-1, 1] at (width, height), resampled on 8 bits.

        resample: "bicubic" is Pillow's default filter (antialiased), exactly the input of the published DIFT code
            (`Image.resize`, then `(x / 255 - 0.5) * 2`); "linear" is OpenCV's `resize` (bilinear, not antialiased), that of
            the published video code.
        """
        image = self.image()
        if size == self.size:
            pixels = np.array(image)
        else:
            pixels = np.array(image.resize(size)) if resample == "bicubic" else cv2.resize(np.array(image), size)
        return (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) * 2

    @cached_property
    def digest(self) -> int:
        """63 bits that name the content, the same wherever the picture came from; keys the noise drawn for it."""
        header = np.array(self.pixels.shape, dtype="<i8").tobytes()
        content = (self.pixels * 255).round().byte().contiguous().numpy().tobytes()
        return int.from_bytes(hashlib.blake2b(header + content, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, eq=False)
class Clip:
    """A video or animation: pixels as in `Picture` with a frame axis in front, and the frame rate in Hz."""

    pixels: Float[Tensor, "frames 3 height width"]
    rate: float
    path: Path | None = None

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __getitem__(self, index: int) -> Picture:
        return Picture(self.pixels[index], self.path)

    def __iter__(self) -> Iterator[Picture]:
        return (self[index] for index in range(len(self)))


def read(source: str | Path | Image.Image | np.ndarray | Tensor | Picture) -> Picture:
    """Read a picture from a path, a Pillow image, an array `[H, W]` / `[H, W, 1|3|4]` or a tensor `[3, H, W]`.

    Arrays are uint8, uint16 or float in [0, 1]; tensors float in [0, 1]. Of an animation the first frame is taken.

    Raises MissingError when the file is not there; InputError when it is not an image, is damaged, or has more than
    `MAX_PIXELS` pixels, and when an array has the wrong shape, type or range.
    """
    match source:
        case Picture():
            return source
        case Image.Image():
            return Picture(_from_image(source, "the given image"))
        case Tensor():
            if source.ndim != 3 or source.shape[0] != 3:
                raise InputError(f"A tensor picture must be [3, height, width], not {list(source.shape)}.")
            return Picture(_from_array(source.detach().cpu().permute(1, 2, 0).numpy(), "the given tensor"))
        case np.ndarray():
            return Picture(_from_array(source, "the given array"))
        case _:
            path = _existing(source)
            if path.is_dir():
                raise InputError(f"{path} is a folder; name an image file in it.")
            with _opened(path) as image:
                return Picture(_from_image(image, str(path)), path)


def read_clip(source: str | Path, limit: int | None = None) -> Clip:
    """Read a clip from a video file, an animated image or a folder of frames (sorted by name), at most `limit` frames.

    Raises as `read` does, and InputError when the frames differ in size or there are none.
    """
    path = _existing(source)
    rate = 25.0
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)[:limit]
        frames = [read(file).pixels for file in files]
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        video = cv2.VideoCapture(str(path))
        rate = video.get(cv2.CAP_PROP_FPS) or rate
        frames = []
        while limit is None or len(frames) < limit:
            more, frame = video.read()
            if not more:
                break
            frames.append(_from_array(frame[..., ::-1], str(path)))
        video.release()
    else:
        with _opened(path, frame=None) as image:
            frames = []
            for index in range(min(getattr(image, "n_frames", 1), limit or 1 << 30)):
                image.seek(index)
                frames.append(_from_image(image.copy(), str(path)))
            rate = 1000 / image.info["duration"] if image.info.get("duration") else rate
    if not frames:
        raise InputError(f"{path} holds no readable frames.")
    if len({frame.shape for frame in frames}) > 1:
        raise InputError(f"The frames of {path} differ in size; resize them to one size first.")
    return Clip(torch.stack(frames), float(rate), path)


def _existing(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise MissingError(f"There is no file {path}.")
    return path


def _opened(path: Path, frame: int | None = 0) -> Image.Image:
    """Open and decode an image file, turning Pillow's many complaints into one sentence each."""
    too_large = InputError(f"{path} has more than {MAX_PIXELS // 1_000_000} megapixels; make it smaller first.")
    image = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise too_large
        if frame is not None and getattr(image, "n_frames", 1) > 1:
            warnings.warn(f"{path} is an animation; its first frame is used.", stacklevel=3)
        image.load()
        return image
    except BaseException as error:
        if image is not None:
            image.close()
        if isinstance(error, Image.DecompressionBombError):
            raise too_large from None
        if isinstance(error, UnidentifiedImageError):
            raise InputError(f"{path} is not an image that can be read (PNG, JPEG, WebP, TIFF, GIF …).") from None
        if isinstance(error, (OSError, SyntaxError, ValueError, EOFError)) and not isinstance(error, InputError):
            raise InputError(f"{path} is truncated or damaged ({error}); save it again.") from None
        raise


def _from_image(image: Image.Image, what: str) -> Float[Tensor, "3 height width"]:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        # Pillow gives 16-bit greyscale as I;16 or, through some decoders, as 32-bit integers
        return _from_array(values if image.mode == "F" else values.clip(0, 65535).astype(np.uint16), what)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return _from_array(np.array(image), what)


def _from_array(array: np.ndarray, what: str) -> Float[Tensor, "3 height width"]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"An image array must be [height, width] or [height, width, 1|3|4]; {what} is {array.shape}.")
    if array.dtype in (np.uint8, np.uint16):
        values = array.astype(np.float32) / np.iinfo(array.dtype).max
    elif np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float32)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise InputError(f"Float pixels must be finite and lie in [0, 1]; rescale {what} first.")
    elif array.dtype == bool:
        values = array.astype(np.float32)
    else:
        raise InputError(f"Pixels must be uint8, uint16 or float in [0, 1]; {what} is {array.dtype}.")
    colour, alpha = (values[..., :3], values[..., 3:]) if values.shape[2] == 4 else (values, None)
    if alpha is not None:
        colour = colour * alpha + (1 - alpha)
    planes = np.broadcast_to(colour, (*colour.shape[:2], 3)).transpose(2, 0, 1)
    return torch.from_numpy(np.array(planes, order="C"))  # a copy: never the caller's memory


def read_mask(
    source: str | Path | Image.Image | np.ndarray, size: tuple[int, int]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """A boolean mask `[H, W]` from an image (brighter than half = inside, transparent = outside), as large as its picture."""
    if isinstance(source, str | Path):
        with _opened(_existing(source)) as image:
            return read_mask(image.copy(), size)
    if isinstance(source, Image.Image) and source.has_transparency_data:
        black = Image.new("RGBA", source.size, "black")
        source = Image.alpha_composite(black, source.convert("RGBA")).convert("RGB")
    inside = read(source).pixels.amax(0).numpy() > 0.5
    if inside.shape[::-1] != size:
        raise InputError(f"The mask is {inside.shape[1]}x{inside.shape[0]} but its picture {size[0]}x{size[1]}.")
    if not inside.any():
        raise InputError("The mask is black everywhere; paint the region to match in white.")
    return inside
