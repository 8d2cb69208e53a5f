"""The names that generic-diffusion-feature gives to activations, and ours.

"GDF" is the code of Meng et al., "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features", NeurIPS
2024 (arXiv 2410.03558); its names are those in which published sets of activations are written.
"""

import re
from collections.abc import Collection

from denoscope.errors import InputError

# GDF's last words of a transformer block and ours; FLUX.1's attention is neither self nor cross there
_ROLES = {
    "self-q": "query", "self-k": "key", "self-v": "value", "self-map": "self_map", "cross-q": "cross_query",
    "cross-map": "cross_map", "ffn-inner": "feed_forward", "q": "query", "k": "key", "v": "value", "out": "",
}  # fmt: skip
_GDF = re.compile(
    r"(?P<stage>down|up|mid)(-level(?P<level>\d+))?(-repeat(?P<repeat>\d+))?-"
    r"((?P<sampler>downsampler|upsampler)-out|res-(?P<res>increment|out)|vit-(block(?P<block>\d+)-)?(?P<role>[\w-]+))"
    r"|vit-block(?P<number>\d+)-(?P<part>[\w-]+)"
)


def is_gdf(name: str) -> bool:
    """Whether a name is written as GDF writes them."""
    return re.match(r"(down|up|mid|vit|unet|vae)-", name) is not None


def site_of(gdf_id: str, known: Collection[str] = ()) -> str:
    """Our name of a GDF activation: "up-level1-repeat1-vit-block0-cross-q" is "up.1.attn.1.cross_query".

    known: site names of the network; needed where its layers have several blocks (SDXL), "up.1.attn.1.block.0.cross_query".

    GDF's released code gives, for the double blocks of FLUX.1, the normalised input of the feed-forward layer as "out"; here
    "out" is the output of the block, as it is everywhere else.

    Raises InputError for what is no such name, or names something that has no place in the picture.
    """
    if re.search(r"cross-[kv]$", gdf_id):
        raise InputError(
            f"{gdf_id}: keys and values of cross-attention belong to the words of the prompt, not to places in the picture; "
            "choose cross-q or cross-map."
        )
    if gdf_id.startswith("unet-"):
        raise InputError(
            f"{gdf_id}: the U-Net's own input, first convolution and output are no features (the published code never "
            "collects them); choose an activation of a level, such as up-level1-repeat1-res-out."
        )
    if gdf_id == "vae-out":
        raise InputError(
            "vae-out: a picture decoded one sampling step later is no activation; the Img2Img check of 'denoscope shift' "
            "makes such pictures."
        )
    found = _GDF.fullmatch(gdf_id)
    role = found and (found["role"] or found["part"])
    if found is None or (role is not None and role not in _ROLES):
        raise InputError(
            f"{gdf_id!r} is no activation; write for example up-level1-repeat2-res-out, up-level0-upsampler-out, "
            f"mid-vit-out or up-level2-repeat1-vit-block0-ROLE with ROLE one of {', '.join(_ROLES)}."
        )
    end = f".{_ROLES[role]}" if role and _ROLES[role] else ""
    if found["number"]:
        return f"block.{int(found['number'])}{end}"
    place = found["stage"] + (f".{int(found['level'])}" if found["level"] else "")
    if found["sampler"]:
        return place
    if found["res"]:
        return f"{place}.resnet.{int(found['repeat'] or 0)}" + (".increment" if found["res"] == "increment" else "")
    layer = f"{place}.attn.{int(found['repeat'] or 0)}"
    if found["block"] is None:
        return layer
    own = f"{layer}.block.{int(found['block'])}{end}"
    short = f"{layer}{end}"  # layers of one block leave it out
    return short if int(found["block"]) == 0 and end and own not in known else own


def gdf_of(site: str, known: Collection[str] = ()) -> str | None:
    """GDF's name of one of our sites, None where it has none.

    known: site names of the network, which tell the last level (which has no up- or downsampler) and whether a transformer has
    cross-attention of its own (PixArt) or not (FLUX.1).
    """
    roles = {ours: gdf for gdf, ours in reversed(_ROLES.items()) if ours}
    if found := re.fullmatch(r"block\.(\d+)(?:\.(\w+))?", site):
        role = "out" if found[2] is None else roles.get(found[2])
        joint = f"block.{found[1]}.cross_map" in known and f"block.{found[1]}.cross_query" not in known
        if joint and role in ("self-q", "self-k", "self-v"):
            role = role.removeprefix("self-")
        return role and f"vit-block{found[1]}-{role}"
    if found := re.fullmatch(r"(down|up)\.(\d+)", site):
        last = known and f"{found[1]}.{int(found[2]) + 1}" not in known
        return None if last else f"{found[1]}-level{found[2]}-{found[1]}sampler-out"
    if not (found := re.fullmatch(r"(?:(down|up)\.(\d+)|mid)\.(resnet|attn)\.(\d+)(.*)", site)):
        return None
    stage, level, kind, repeat, rest = found.groups()
    place = "mid" if stage is None else f"{stage}-level{level}"
    if kind == "resnet":
        return f"{place}-repeat{repeat}-res-{'increment' if rest else 'out'}"
    layer = f"{place}-vit" if stage is None else f"{place}-repeat{repeat}-vit"
    if not rest:
        return f"{layer}-out"
    found = re.fullmatch(r"(?:\.block\.(\d+))?(?:\.(\w+))?", rest)
    role = None if found is None else "out" if found[2] is None else roles.get(found[2])
    return f"{layer}-block{found[1] or 0}-{role}" if found is not None and role else None
