"""Noise as a pure function of (seed, item, timestep, member), and explicit draws.

Each member of an ensemble has its own generator, seeded by a hash of what it is for: a draw never depends on batch size, batch
position, memory layout or device (drawn on the CPU in float32, then moved).
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from denoscope.errors import InputError


def draw(shape: tuple[int, ...], *key: int | str) -> Float[Tensor, "..."]:
    """Standard normal float32 values named by `key`, e.g. (seed, item, timestep, member, "diffusion")."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


@dataclass(frozen=True, eq=False)
class Noise:
    """Explicit draws for one picture, in latent shape.

    diffusion: `eps` of `x_t = a_t x_0 + s_t eps`, one per ensemble member; None leaves x_0 as it is.
    posterior: draws that sample the autoencoder's posterior, one per member; None takes its mode.
    """

    diffusion: Float[Tensor, "members channels height width"] | None
    posterior: Float[Tensor, "members channels height width"] | None = None

    def __post_init__(self) -> None:
        for draws in (self.diffusion, self.posterior):
            if draws is not None and draws.ndim != 4:
                raise InputError(f"Noise must be [members, channels, height, width], not {list(draws.shape)}.")
        if self.diffusion is None and self.posterior is None:
            raise InputError('This noise has no draws at all; write noise="none" for clean latents.')
        one, two = self.posterior, self.diffusion
        if one is not None and two is not None and one.shape != two.shape:
            raise InputError(f"Posterior noise {list(one.shape)} and diffusion noise {list(two.shape)} differ.")

    @property
    def members(self) -> int:
        return self._draws.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latents of one member."""
        return tuple(self._draws.shape[1:])

    @property
    def _draws(self) -> Tensor:
        draws = self.diffusion if self.diffusion is not None else self.posterior
        assert draws is not None
        return draws

    @classmethod
    def draw(cls, shape: tuple[int, ...], seed: int, item: int, t: int, members: int, posterior: bool) -> "Noise":
        """Draws for `members` members of latent `shape` [channels, height, width]."""

        def stack(name: str) -> Tensor:
            return torch.stack([draw(shape, seed, item, t, member, name) for member in range(members)])

        return cls(stack("diffusion"), stack("posterior") if posterior else None)
