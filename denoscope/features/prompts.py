"""What a picture is said to show: published prompts as data, captions from files, captions written by a model.

A prompt that describes the picture's own content and quality is the cheapest of the techniques of Meng et al., "Suppress
Content Shift", NeurIPS 2024 (arXiv 2410.06719), section 4.1; theirs were one for a whole data set, or Kosmos-2's captions.
"""

import csv
import json
import tomllib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from PIL.Image import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from denoscope.denoisers.loading import HUB_ID, _json, _quietly, resolve_device
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
_GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS}
_BEGINNING = "a photo of"  # what captions of models without a chat begin with
_KOSMOS = "<grounding>An image of"  # what Kosmos-2 was trained to go on from (Peng et al., arXiv 2306.14824)
_REQUEST = "Describe this picture in detail: what it shows, where, and how it looks."


def resolve(prompt: str | int | None, picture: Picture | None) -> str | int | None:
    """The prompt, or class number, for a picture; for none where no picture is needed (`needs_picture`).

    prompt: a text, a class number or None, which are as they are; "preset:NAME", one of `PROMPTS`; "@FILE", the picture's
        caption in a file or folder (see `captions`); "caption:MODEL", the words of a transformers image-text-to-text model
        (with a processor, or an encoder of pictures with a decoder of words).

    Raises InputError for unknown presets, pictures without a caption, damaged files and models that write no captions;
    MissingError when there is no such file or model.
    """
    if not isinstance(prompt, str):
        return prompt
    if prompt.startswith("preset:"):
        return _published(prompt.removeprefix("preset:"))
    if picture is None and needs_picture(prompt):
        raise InputError(
            f"The prompt {prompt} is another one for each picture, and there is none; give the prompt itself."
        )
    if picture is None:
        return prompt
    if prompt.startswith("@"):
        return _caption_of(picture, Path(prompt[1:]).expanduser())
    if prompt.startswith("caption:"):
        return _written(picture, prompt.removeprefix("caption:"))
    return prompt


def check_prompt(prompt: str | int | None) -> None:
    """Raise what `resolve` would raise for any picture, before there is one; of a captioning model no weights are read."""
    if not isinstance(prompt, str):
        return
    if prompt.startswith("preset:"):
        _published(prompt.removeprefix("preset:"))
    elif prompt.startswith("@"):
        _read(Path(prompt[1:]).expanduser())
    elif prompt.startswith("caption:"):
        _captioner(prompt.removeprefix("caption:"))


def _published(name: str) -> str:
    if name not in PROMPTS:
        raise InputError(f"There is no prompt {name!r}; the published ones are {', '.join(PROMPTS)}.")
    return PROMPTS[name]


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


def _read(path: Path) -> dict[str, str | int]:
    """Captions, read once, and again when somebody has changed them; of folders every file counts."""
    newest = max((file.stat().st_mtime_ns for file in [path, *path.glob("*.txt")]), default=0) if path.exists() else 0
    return _captions(path, newest)


def _caption_of(picture: Picture, path: Path) -> str | int:
    if picture.path is None:
        raise InputError(f"A picture that was not read from a file has no name to find its caption in {path} by.")
    found = _read(path)
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


@lru_cache(maxsize=8)
def _captioner(model: str) -> tuple[str, str]:
    """The folder or hub id of a captioning model, and its kind; its configuration says whether it is one."""
    path = Path(model).expanduser()
    if not path.is_dir() and (path.exists() or not HUB_ID.fullmatch(model)):
        raise MissingError(f"There is no captioning model {model!r}; give a transformers folder or a hub id.")
    source = str(path) if path.is_dir() else model
    config = _json(source, "config.json")
    if config is None:
        raise MissingError(f"{model} holds no config.json; give the folder of the captioning model itself.")
    if (kind := str(config.get("model_type"))) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise InputError(f"{model} ({kind}) writes no captions; use an image-text-to-text model of transformers.")
    return source, kind


@lru_cache(maxsize=1)
def _writer(model: str) -> Callable[[Image], str]:
    """From a picture to the words of a captioning model, which is loaded once; greedy."""
    source, kind = _captioner(model)
    load = _decoder if kind == "vision-encoder-decoder" else _pipeline
    return _quietly(model, lambda: load(source, kind))


def _pipeline(source: str, kind: str) -> Callable[[Image], str]:
    """Models that go on with a text, or answer in a chat, by transformers' own pipeline."""
    import transformers

    write: Any = transformers.pipeline("image-text-to-text", model=source, model_kwargs={"use_safetensors": True})
    chat = getattr(write.processor, "chat_template", None) is not None

    def say(image: Image) -> str:
        if chat:
            content = [{"type": "image", "image": image}, {"type": "text", "text": _REQUEST}]
            given: dict[str, Any] = {"text": [{"role": "user", "content": content}], "return_full_text": False}
        else:
            given = {"images": image, "text": _KOSMOS if kind == "kosmos-2" else _BEGINNING}
        text = write(**given, generate_kwargs=dict(_GREEDY))[0]["generated_text"]
        if kind == "kosmos-2":  # without the marks of phrases and places
            text, _ = write.processor.post_process_generation(text)
        return str(text)

    return say


def _decoder(source: str, kind: str) -> Callable[[Image], str]:
    """Encoders of pictures with a decoder of words that goes on from nothing; they have no processor, and so no pipeline."""
    import transformers

    network: Any = transformers.VisionEncoderDecoderModel.from_pretrained(source, use_safetensors=True)
    network = network.eval().to(resolve_device())
    images = transformers.AutoImageProcessor.from_pretrained(source)
    words = transformers.AutoTokenizer.from_pretrained(source)

    def say(image: Image) -> str:
        pixels = images(image, return_tensors="pt")["pixel_values"].to(network.device, network.dtype)
        return words.decode(network.generate(pixels, **_GREEDY)[0], skip_special_tokens=True)

    return say


_made: dict[tuple[str, int], str] = {}


def _written(picture: Picture, model: str) -> str:
    """A caption by a model; made once for a picture."""
    if (model, picture.digest) not in _made:
        say = _writer(model)
        try:
            text = " ".join(say(picture.image()).split())
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise InputError(f"{model} cannot describe {picture.name}: {str(error).splitlines()[0]}") from error
        if not text:
            raise InputError(f"{model} says nothing about {picture.name}; use another model or a file of captions.")
        _made[model, picture.digest] = text
    return _made[model, picture.digest]
