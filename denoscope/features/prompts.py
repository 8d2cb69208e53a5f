"""What a picture is said to show: published prompts as data, captions from files, captions written by a model.

A prompt that describes the picture's own content and quality is the cheapest of the techniques of Meng et al., "Suppress
Content Shift", NeurIPS 2024 (arXiv 2410.06719), section 4.1; theirs were one for a whole data set, or Kosmos-2's captions.
"""

import csv
import json
import tomllib
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from denoscope.denoisers.loading import HUB_ID, _quietly
from denoscope.errors import InputError, MissingError
from denoscope.images import Picture

_SPAIR = (
    "a photo of aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dog, horse, motorbike, person, "
    "potted plant, sheep, train, tv monitor"
)
# verbatim from the paper's released commands; "-attention": for attention features, "-plain": beside other techniques
PROMPTS: dict[str, str] = {
    "correspondence": f"{_SPAIR}, high quality, best quality, highly realistic, masterpiece, high resolution",
    "correspondence-attention": _SPAIR,
    "correspondence-plain": "a photo",
    "horse-21": "a horse, high quality, best quality, highly realistic, masterpiece",
    "horse-21-attention": "a photo of a single horse running in a sports field, with a well-equipped rider on its back, seems "
    "they are in a competition, high quality, best quality, highly realistic, masterpiece",
    "horse-21-plain": "a horse",
    "bedroom-28": "a photo of a tidy and well-designed bedroom",
    "bedroom-28-attention": "bedroom, a bed, some bedroom furniture, lights, a door, ceiling, floor, walls, pillow, quilt, "
    "chair and table, window, in good quality",
    "bedroom-28-plain": "a bedroom",
    "ade20k": "a highly realistic photo of the real world. It can be an indoor scene, or an outdoor scene, or a photo of "
    "nature. high quality.",
    "cityscapes": "An urban street scene with multiple lanes, various buildings, traffic lights, cars in the lanes, and "
    "pedestrians, highly realistic.",
    "low-quality": "low quality, low resolution, blurry, draft, grainy, disfigured, deformed, low contrast, underexposed, "
    "overexposed, bad art",
}

NEW_TOKENS = 128  # of a caption, as published
_BEGINNING = "a photo of"  # what captions of models without a chat begin with
_REQUEST = "Describe this picture in detail: what it shows, where, and how it looks."


def resolve(prompt: str | int | None, picture: Picture) -> str | int | None:
    """The prompt, or class number, for a picture.

    prompt: a text, a class number or None, which are as they are; "preset:NAME", one of `PROMPTS`; "@FILE", the picture's
        caption in a file or folder (see `captions`); "caption:MODEL", the words of a transformers image-text-to-text model.

    Raises InputError for unknown presets, pictures without a caption, damaged files and models that write no captions;
    MissingError when there is no such file or model.
    """
    if not isinstance(prompt, str):
        return prompt
    if prompt.startswith("preset:"):
        name = prompt.removeprefix("preset:")
        if name not in PROMPTS:
            raise InputError(f"There is no prompt {name!r}; the published ones are {', '.join(PROMPTS)}.")
        return PROMPTS[name]
    if prompt.startswith("@"):
        return _caption_of(picture, Path(prompt[1:]).expanduser())
    if prompt.startswith("caption:"):
        return _written(picture, prompt.removeprefix("caption:"))
    return prompt


def needs_picture(prompt: str | int | None) -> bool:
    """Whether a prompt is another one for every picture."""
    return isinstance(prompt, str) and prompt.startswith(("@", "caption:"))


def captions(path: Path) -> dict[str, str | int]:
    """Captions by picture name from JSON or TOML (one table of names and captions), CSV (columns name, caption; with or without
    those words as a heading), or a folder of NAME.txt. Class numbers may stand for captions in JSON and TOML.

    Raises MissingError when it is not there, InputError when it is damaged or holds none.
    """
    if not path.exists():
        raise MissingError(
            f"There is no file of captions {path}; write for example {{'cat.jpg': 'a cat'}} into a .json."
        )
    try:
        if path.is_dir():
            found: Any = {file.stem: file.read_text("utf-8").strip() for file in sorted(path.glob("*.txt"))}
        elif path.suffix.lower() == ".json":
            found = json.loads(path.read_text("utf-8-sig"))
        elif path.suffix.lower() == ".toml":
            found = tomllib.loads(path.read_text("utf-8-sig"))
        elif path.suffix.lower() == ".csv":
            found = _rows(path)
        else:
            raise InputError(f"Captions are read from .json, .csv or .toml files or folders of .txt, not from {path}.")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict) or not all(
        isinstance(caption, str) or (isinstance(caption, int) and not isinstance(caption, bool))
        for caption in found.values()
    ):
        raise InputError(f"{path} must hold one table of picture names and captions, {{'cat.jpg': 'a cat', …}}.")
    if not found:
        raise InputError(f"{path} holds no captions.")
    return found


def _rows(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if wrong := next((row for row in rows if len(row) != 2), None):
        raise InputError(
            f"{path}: {','.join(wrong)!r} is no line of a name and a caption; put a caption with commas into quotes."
        )
    if rows and [cell.strip().lower() for cell in rows[0]] == ["name", "caption"]:
        rows = rows[1:]
    return {name.strip(): caption.strip() for name, caption in rows}


@lru_cache(maxsize=8)
def _captions(path: Path, changed: int) -> dict[str, str | int]:
    return captions(path)


def _caption_of(picture: Picture, path: Path) -> str | int:
    if picture.path is None:
        raise InputError(f"A picture that was not read from a file has no name to find its caption in {path} by.")
    # read once, and again when somebody has changed it; of folders every file counts
    newest = max((file.stat().st_mtime_ns for file in [path, *path.glob("*.txt")]), default=0) if path.exists() else 0
    found = _captions(path, newest)
    whole = PurePath(picture.path)
    for count in range(
        len(whole.parts), 0, -1
    ):  # the longest name wins: "cat/1.jpg" before "1.jpg", with suffix before without
        name = PurePath(*whole.parts[-count:])
        for key in (name.as_posix(), name.with_suffix("").as_posix()):
            if key in found:
                return found[key]
    raise InputError(
        f"{path} has no caption for {whole.name}; add one under the name {whole.name!r} or {whole.stem!r}."
    )


@lru_cache(maxsize=1)
def _writer(model: str) -> Any:
    """The captioning pipeline, loaded once."""
    path = Path(model).expanduser()
    if not path.is_dir() and (path.exists() or not HUB_ID.fullmatch(model)):
        raise MissingError(f"There is no captioning model {model!r}; give a transformers folder or a hub id.")
    import transformers

    source, safe = str(path) if path.is_dir() else model, {"use_safetensors": True}
    return _quietly(model, lambda: transformers.pipeline("image-text-to-text", model=source, model_kwargs=safe))


_made: dict[tuple[str, int], str] = {}


def _written(picture: Picture, model: str) -> str:
    """A caption by a model, greedy; made once for a picture."""
    if (model, picture.digest) not in _made:
        write = _writer(model)
        image, chat = picture.image(), getattr(write.processor, "chat_template", None) is not None
        if chat:
            content = [{"type": "image", "image": image}, {"type": "text", "text": _REQUEST}]
            given: dict[str, Any] = {"text": [{"role": "user", "content": content}], "return_full_text": False}
        else:
            given = {"images": image, "text": _BEGINNING}
        try:
            made = write(**given, generate_kwargs={"do_sample": False, "max_new_tokens": NEW_TOKENS})
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise InputError(f"{model} cannot describe {picture.name}: {str(error).splitlines()[0]}") from error
        text = " ".join(str(made[0]["generated_text"]).split())
        if not text:
            raise InputError(f"{model} says nothing about {picture.name}; use another model or a file of captions.")
        _made[model, picture.digest] = text
    return _made[model, picture.digest]
