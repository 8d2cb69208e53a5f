"""What made a feature: telling one set of weights from another, and the versions of the libraries."""

import hashlib
from functools import cache
from importlib.metadata import version

from torch import nn


def weights_digest(network: nn.Module) -> str:
    """16 hexadecimal digits of the names, shapes and first values of all parameters; "meta" for networks without weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in network.named_parameters():
        if parameter.device.type == "meta":
            return "meta"
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    """Of the libraries that decide the numbers; looking them up takes milliseconds."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}
