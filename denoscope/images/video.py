"""`Frames`: a video read one picture after another, and a writer that takes one picture after another.

Neither ever holds more than a frame, however long the video is.
"""

import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import ExifTags, GifImagePlugin, Image

from denoscope.errors import InputError, MissingError
from denoscope.images.picture import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip, Picture, read

VIDEOS = VIDEO_SUFFIXES | {".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts"}
ANIMATIONS = {".gif", ".webp", ".png", ".apng", ".tif", ".tiff"}
RATE = 25.0  # of what does not say


class Frames:
    """The frames of a folder of pictures, of a video file or animated image, or of a list of pictures, as Pictures.

    Iterating reads them from the start, every time. rate: frames per second (25 where nothing says). size: (width, height)
    of every frame. count: how many there are, as far as the file says. name(i): of frame i, without suffix. path: where the
    video is, if it is a file or folder.

    Frames of a folder are taken in the order of their names, numbers in them by value.

    Raises MissingError and InputError for what is not there, holds no frames or is no video; while iterating InputError for
    a frame of another size. Of a video that breaks off the frames before the damage are kept, and a warning says so.
    """

    def __init__(self, source: "str | Path | Clip | Frames | Sequence[Any]"):
        self.path: Path | None = None
        self.rate, self.count = RATE, 0
        self.files: list[Path] = []
        if isinstance(source, Frames):
            vars(self).update(vars(source))
            return
        if isinstance(source, str | Path):
            self.path = Path(source).expanduser()
            self._open = self._opened(self.path)
        else:
            self.count = len(source)
            self.rate, self.path = (source.rate, source.path) if isinstance(source, Clip) else (RATE, None)
            self._open = lambda: (read(picture) for picture in source)
        first = next(iter(self._open()), None)
        if first is None:
            raise InputError(f"{self.path or 'The list'} holds no readable frames.")
        self.size = first.size

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Picture]:
        number = 0
        for number, picture in enumerate(self._open(), 1):
            if picture.size != self.size:
                sizes = ["x".join(map(str, size)) for size in (self.size, picture.size)]
                raise InputError(
                    f"Frame {self.name(number - 1)} of {self.path or 'the list'} is {sizes[1]} but the first {sizes[0]}; "
                    "resize them to one size first."
                )
            yield picture
        slack = 1 if self.path and self.path.suffix.lower() in VIDEOS else 0  # some containers count one too many
        if number < self.count - slack:
            warnings.warn(
                f"{self.path} breaks off after {number} of {self.count} frames; those are used.", stacklevel=2
            )

    def name(self, index: int) -> str:
        """The file's name for folders, else the number in five digits."""
        return self.files[index].stem if index < len(self.files) else f"{index:05d}"

    def _opened(self, path: Path) -> Callable[[], Iterator[Picture]]:
        if path.is_dir():
            self.files = sorted((p for p in path.iterdir() if _is_frame(p)), key=_natural)
            self.count = len(self.files)
            if not self.files:
                raise InputError(f"The folder {path} holds no pictures.")
            sizes = {_size(file): file for file in reversed(self.files)}  # now, not after hours of work
            if len(sizes) > 1:
                (one, first), (other, second) = list(sizes.items())[:-3:-1]
                raise InputError(
                    f"The frames of {path} differ in size: {first.name} is {one[0]}x{one[1]} but {second.name} "
                    f"{other[0]}x{other[1]}; resize them to one size first."
                )
            return lambda: (read(file) for file in self.files)
        if not path.exists():
            raise MissingError(f"There is no video {path}.")
        if path.suffix.lower() in VIDEOS:
            video = _capture(path)
            rate, count = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
            video.release()
            self.rate = rate if 0 < rate < 1000 else RATE
            self.count = max(0, int(count)) if np.isfinite(count) else 0
            return lambda: _decoded(path)
        if path.suffix.lower() in ANIMATIONS:
            with _animation(path) as image:
                self.count = getattr(image, "n_frames", 1)
                duration = image.info.get("duration")
            if self.count == 1:
                raise InputError(f"{path} is a single picture; a video needs more frames.")
            self.rate = 1000 / duration if duration else RATE
            return lambda: _shown(path)
        known = ", ".join(sorted(VIDEOS)) + " or .gif"
        raise InputError(f"{path} is not in a known video format; give a folder of pictures, or a file in {known}.")


def _is_frame(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _size(path: Path) -> tuple[int, int]:
    """(width, height) from the header."""
    try:
        with Image.open(path) as image:
            # a PNG would be decoded for this, and cameras do not write any
            turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return (image.height, image.width) if turned else image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} is damaged or no image ({error}); a folder of frames must hold all of them."
        ) from None


def _natural(path: Path) -> list[tuple[int, str]]:
    """2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def _capture(path: Path) -> cv2.VideoCapture:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # damage is told in a sentence of our own
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise InputError(f"{path} cannot be read as a video; it is damaged, or in a format that OpenCV cannot decode.")
    return video


def _decoded(path: Path) -> Iterator[Picture]:
    video = _capture(path)
    try:
        while True:
            more, frame = video.read()
            if not more:
                return
            yield read(np.ascontiguousarray(frame[..., ::-1] if frame.ndim == 3 else frame))
    finally:
        video.release()


def _animation(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an animation ({error}).") from None


def _shown(path: Path) -> Iterator[Picture]:
    with _animation(path) as image:
        for index in itertools.count():
            try:
                image.seek(index)
                image.load()
                frame = image.copy()
            except (EOFError, OSError, SyntaxError, ValueError):  # the end, or damage
                return
            yield read(frame)


@contextmanager
def video_writer(path: str | Path, rate: int | float = RATE) -> Iterator[Callable[[Image.Image], None]]:
    """A function that appends a picture to a video (.mp4, .avi, .mkv, .webm) or .gif, all pictures of one size.

    It is written beside `path` and renamed at the end; when something goes wrong inside the context, nothing is left.
    Odd sides lose their last row or column in a video, which most decoders demand; a .gif keeps them.

    Raises InputError for other suffixes, and where this OpenCV cannot write the format.
    """
    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES | {".gif"}:
        raise InputError(
            f"A video cannot be written as {path.suffix or 'a file without suffix'}; use .mp4, .avi or .gif."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    sink = (_Gif if path.suffix.lower() == ".gif" else _Video)(beside, float(rate))
    try:
        yield sink.add
        sink.close()
        if beside.exists():
            beside.replace(path)
    finally:
        sink.close()
        beside.unlink(missing_ok=True)


class _Video:
    def __init__(self, path: Path, rate: float):
        self.path, self.rate = path, rate
        self.writer: cv2.VideoWriter | None = None

    def add(self, image: Image.Image) -> None:
        width, height = (max(2, side // 2 * 2) for side in image.size)
        if self.writer is None:
            code = {".avi": "MJPG", ".webm": "VP80"}.get(self.path.suffix.lower(), "mp4v")
            self.writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*code), self.rate, (width, height))
            if not self.writer.isOpened():
                raise InputError(f"This OpenCV cannot write {self.path.suffix} files; use .avi or .gif.")
        pixels = np.array(image.convert("RGB").crop((0, 0, width, height)))
        self.writer.write(np.ascontiguousarray(pixels[..., ::-1]))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()


class _Gif:
    """Pillow's own writer collects all frames first; its building blocks do not."""

    def __init__(self, path: Path, rate: float):
        self.path, self.duration = path, max(20, round(1000 / rate / 10) * 10)  # in steps of 10 ms; less is not shown
        self.file: Any = None

    def add(self, image: Image.Image) -> None:
        frame = image.convert("RGB").quantize(255)
        if self.file is None:
            self.file = self.path.open("wb")
            header, _ = GifImagePlugin.getheader(frame, info={"loop": 0, "duration": self.duration})
            self.file.writelines(header)
        options = {"duration": self.duration, "include_color_table": True}
        self.file.writelines(GifImagePlugin.getdata(frame, **options))

    def close(self) -> None:
        if self.file is not None and not self.file.closed:
            self.file.write(b";")
            self.file.close()
