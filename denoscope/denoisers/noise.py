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

    diffusion: `eps` of `x_t = a_t x_0 + s_t eps`, one per ensemble member.
    posterior: draws that sample the autoencoder's posterior, one per member; None takes its mode.
    """

    diffusion: Float[Tensor, "members channels height width"]
    posterior: Float[Tensor, "members channels height width"] | None = None

    def __post_init__(self) -> None:
        if self.diffusion.ndim != 4:
            raise InputError(f"Noise must be [members, channels, height, width], not {list(self.diffusion.shape)}.")
        if self.posterior is not None and self.posterior.shape != self.diffusion.shape:
            raise InputError(
                f"Posterior noise {list(self.posterior.shape)} and diffusion noise {list(self.diffusion.shape)} differ."
            )

    @classmethod
    def draw(cls, shape: tuple[int, ...], seed: int, item: int, t: int, members: int, posterior: bool) -> "Noise":
        """Draws for `members` members of latent `shape` [channels, height, width]."""

        def stack(name: str) -> Tensor:
            return torch.stack([draw(shape, seed, item, t, member, name) for member in range(members)])

        return cls(stack("diffusion"), stack("posterior") if posterior else None)
