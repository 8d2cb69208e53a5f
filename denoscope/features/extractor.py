"""`Extractor`: anything that turns a picture into a `FeatureMap`; matching and benchmarks need not know what it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from denoscope.denoisers import winograd
from denoscope.denoisers.noise import Noise
from denoscope.denoisers.protocol import Denoiser
from denoscope.encoders.protocol import Encoder
from denoscope.errors import InputError
from denoscope.features.amalgamation import aggregate
from denoscope.features.dift import Draws, Recipe, Size, feature_maps, recipe
from denoscope.features.encoding import EncoderFeatures, encoder_recipe
from denoscope.features.feature_map import FeatureMap
from denoscope.features.sets import expand
from denoscope.features.technique import contents
from denoscope.features.weights import weights_digest
from denoscope.images import Picture, read
from denoscope.images.picture import Resample


@runtime_checkable
class Extractor(Protocol):
    """name: short, for tables and file names."""

    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, Any]:
        """JSON values that decide the features of a picture, all of them: two extractors that say the same make the same."""
        ...

    def __call__(self, picture: Picture, prompt: str | int | None = None) -> FeatureMap:
        """Features of a picture. prompt: what it shows, in the place of the extractor's own; many have no use for it."""
        ...


@dataclass(frozen=True, eq=False)
class Dift:
    """DIFT features of a denoiser at a recipe (see `features`)."""

    denoiser: Denoiser
    recipe: Recipe
    noise: Draws = None
    seed: int = 0
    chunk: int | None = None

    @property
    def name(self) -> str:
        return self.denoiser.name

    def describe(self) -> dict[str, Any]:
        dtype = str(self.denoiser.dtype).removeprefix("torch.")
        noise = "given" if isinstance(self.noise, Noise) else self.noise or self.recipe.noise
        own = {"model": self.name, "weights": weights_digest(self.denoiser), "dtype": dtype}
        own |= winograd.described(self.denoiser.device, self.denoiser.dtype)
        files = contents(self.recipe.prompt, self.recipe.control, self.recipe.lora)
        seed = self.seed if self.recipe.seed is None else self.recipe.seed
        return {**own, **self.recipe.described(), "seed": seed, "noise": noise, **({"files": files} if files else {})}

    def __call__(self, picture: Picture, prompt: str | int | None = None) -> FeatureMap:
        maps = list(self.at(expand(self.denoiser, self.recipe.site), picture, prompt).values())
        return maps[0] if len(maps) == 1 else aggregate(maps)

    def at(self, sites: Sequence[str], picture: Picture, prompt: str | int | None = None) -> dict[str, FeatureMap]:
        """Several sites from the same forward passes."""
        chosen = self.recipe if prompt is None else replace(self.recipe, prompt=prompt)
        return feature_maps(self.denoiser, picture, chosen, sites, self.noise, self.seed, self.chunk)


def as_extractor(
    model: Any,
    *,
    noise: Noise | Literal["none"] | None = None,
    seed: int = 0,
    chunk: int | None = None,
    **options: Any,
) -> Extractor:
    """The extractor that the options of `features` make of a model; an extractor is itself and takes none.

    Raises InputError for what is no model, and for options that it cannot take.
    """
    if isinstance(model, Denoiser):
        if isinstance(noise, Noise):
            members = noise.members
            if options.get("ensemble") not in (None, members):
                raise InputError(f"The noise has {members} members but the ensemble {options['ensemble']}.")
            options["ensemble"] = members
        elif noise == "none":
            options |= {"ensemble": 1, "noise": "none"}
        elif noise is not None:
            raise InputError('noise must be a denoscope.Noise, "none" or None.')
        return Dift(model, recipe(model, **options), noise, seed, chunk)
    if isinstance(model, Encoder):
        return EncoderFeatures(model, encoder_recipe(model, noise=noise, **options))
    if isinstance(model, Extractor):
        if given := [name for name, value in options.items() if value is not None]:
            raise InputError(f"{model.name} is set up already; {given[0]} cannot be changed.")
        return model
    raise InputError(f"{type(model).__name__} is no model; give what denoscope.load or denoscope.load_encoder returns.")


def features(
    model: Any,
    picture: Any,
    preset: str | None = None,
    t: int | None = None,
    site: str | None = None,
    ensemble: int | None = None,
    prompt: str | int | None = None,
    size: Size | list[int] | None = None,
    noise: Noise | Literal["none"] | None = None,
    seed: int = 0,
    chunk: int | None = None,
    resample: Resample | None = None,
    adaln: bool | None = None,
    massive: str | None = None,
    **technique: Any,
) -> FeatureMap:
    """Dense features of one picture.

    model: a Denoiser, an Encoder (of which it has the preset, site, size and resample), or any Extractor. picture: a Picture,
        or anything that `denoscope.read` takes.
    preset: "semantic" (default), "geometric" or "temporal": settings of the model's family, published where there are any;
        "clean" for CleanDIFT checkpoints, "practical" for dense prediction (Stable Diffusion).
    t, site, ensemble, prompt, size: replace the preset's; see `resolve_size` for sizes, `sets` for sites and sets of them
        (several are enlarged to the largest and concatenated), `prompts` for prompts. The prompt is empty by default.
    noise: explicit draws (their number is the ensemble); "none" feeds the clean latents at timestep t, the mode of the
        autoencoder's posterior (CleanDIFT checkpoints, whose own code samples it: `Noise(None, draws)`); by default draws
        named by (seed, picture content, t, member), the same on every machine and in every batch.
    chunk: ensemble members per forward pass; by default as many as fit.
    resample: filter of the resizing, see `Picture.resized`.
    adaln, massive: what is done to the output of transformer blocks (DiT, PixArt, SD3, Flux), as DiTF does: modulated as the
        layer that reads it does; and before that its massive channels set to zero ("zero"; "keep"; or channels, "154,1446").
        Both by default; see `ditf`.
    technique: control, lora, denoise_from, img2img, second_t, guidance, timestep_mode, pool, long_prompts; see `Recipe`.

    A picture whose sides are no multiple of the network's stride yields ceil(side / stride) cells; nothing is cropped.

    Raises InputError for settings that the model cannot take and for features that are not finite.
    """
    settings = {"preset": preset, "t": t, "site": site, "ensemble": ensemble, "prompt": prompt, "size": size}
    settings |= {"adaln": adaln, "massive": massive, **technique}
    return as_extractor(model, noise=noise, seed=seed, chunk=chunk, resample=resample, **settings)(read(picture))
