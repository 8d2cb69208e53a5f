"""Writing pictures, clips and text: beside, then renamed, so that there is never half a file."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
from PIL import Image

from denoscope.errors import InputError
from denoscope.images.picture import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip, Picture


def atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a path beside `path` (same suffix), then rename; the folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def write(what: Picture | Clip | Image.Image, path: str | Path) -> Path:
    """Write a picture, or a clip as .gif or video (.mp4, .avi, .mkv, .webm), by the suffix of `path`.

    Raises InputError for suffixes that cannot hold it.
    """
    suffix = Path(path).suffix.lower()
    if not isinstance(what, Clip):
        if suffix not in IMAGE_SUFFIXES:
            raise InputError(f"A picture cannot be written as {suffix or 'a file without suffix'}; use .png or .jpg.")
        image = what.image() if isinstance(what, Picture) else what
        return atomically(path, image.save)
    frames = [picture.image() for picture in what]
    if suffix == ".gif":
        duration = round(1000 / what.rate)
        return atomically(
            path, lambda p: frames[0].save(p, save_all=True, append_images=frames[1:], duration=duration, loop=0)
        )
    if suffix not in VIDEO_SUFFIXES:
        raise InputError(f"A clip cannot be written as {suffix or 'a file without suffix'}; use .gif, .mp4 or .avi.")
    return atomically(path, lambda p: _video(what, p))


def _video(clip: Clip, path: Path) -> None:
    code = {".avi": "MJPG", ".webm": "VP80"}.get(path.suffix.lower(), "mp4v")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), clip.rate, clip[0].size)
    if not writer.isOpened():
        raise InputError(f"This OpenCV cannot write {path.suffix} files; use .avi or .gif.")
    for picture in clip:
        writer.write((picture.pixels * 255).round().byte().permute(1, 2, 0).flip(2).contiguous().numpy())
    writer.release()
