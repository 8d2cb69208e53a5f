"""Writing pictures, clips and text: beside, then renamed, so that there is never half a file."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
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


def save_result(
    path: str | Path,
    what: str,
    document: Callable[[], Mapping[str, Any]],
    arrays: Callable[[], Mapping[str, Any]],
    image: Callable[[], Image.Image],
    rows: Callable[[], tuple[Sequence[str], Sequence[Mapping[str, Any]]]] | None = None,
) -> Path:
    """Write a result by suffix: .json (`document`), .npz (`arrays`), an image, or .csv (`rows`: columns and lines).

    what: the plural of its name, for the InputError about other suffixes.
    """
    path, out = Path(path), io.BytesIO()
    suffix = path.suffix.lower()
    if suffix == ".json":
        out.write((json.dumps(document(), indent=2) + "\n").encode())
    elif suffix == ".csv" and rows is not None:
        text, (columns, lines) = io.StringIO(newline=""), rows()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(lines)
        out.write(text.getvalue().encode())
    elif suffix == ".npz":
        found: dict[str, Any] = {name: np.asarray(values) for name, values in arrays().items()}
        np.savez(out, **found)
    elif suffix in (".png", ".jpg", ".jpeg", ".webp"):
        image().save(out, {".jpg": "jpeg"}.get(suffix, suffix[1:]))
    else:
        known = ".json, .npz, .png, .jpg or .webp" if rows is None else ".json, .csv, .npz, .png, .jpg or .webp"
        raise InputError(f"{what} are saved as {known}, not {suffix or 'without suffix'}.")
    return atomically(path, lambda beside: beside.write_bytes(out.getvalue()))


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
