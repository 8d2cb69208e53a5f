"""Settings per model family, as data. Those that nobody published say so; they follow the nearest that somebody did.

stable-diffusion, adm: DIFT (Tang et al., NeurIPS 2023, arXiv 2306.03881); "clean": CleanDIFT (Stracke et al., CVPR 2025,
arXiv 2412.03439), the timestep that its U-Net was tuned from. flux: DiTF (Gan et al., NeurIPS 2025, arXiv 2505.18584) with
its blocks 28 and 24, whose input it reads, and its noise levels 0.26 and 0.09, which are timesteps 259 and 89 here.

size: "WxH", "N" (a square, aspect not kept), "shortN" / "longN" (aspect kept, sides rounded down to multiples of 32), or
"0" (as it is). resample: the filter, see `Picture.resized`.
"""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion": {
        "semantic": {"t": 261, "site": "up.1", "ensemble": 8, "size": "768"},
        "geometric": {"t": 0, "site": "up.2", "ensemble": 8, "size": "768"},
        "temporal": {"t": 51, "site": "up.2", "ensemble": 8, "size": "short480", "resample": "linear"},
        "clean": {"t": 261, "site": "up.1", "ensemble": 1, "size": "768", "noise": "none"},
        # Meng et al. (arXiv 2410.06719): for dense prediction, chosen on version 1.5
        "practical": {"t": 50, "site": "practical", "ensemble": 1, "size": "512"},
    },
    # unpublished: as Stable Diffusion, at the same strides
    "stable-diffusion-xl": {
        "semantic": {"t": 261, "site": "up.0", "ensemble": 8, "size": "1024"},
        "geometric": {"t": 0, "site": "up.1", "ensemble": 8, "size": "1024"},
        "temporal": {"t": 51, "site": "up.1", "ensemble": 8, "size": "short480", "resample": "linear"},
        "practical": {"t": 50, "site": "practical", "ensemble": 1, "size": "1024"},
    },
    "flux": {
        "semantic": {"t": 259, "site": "block.27", "ensemble": 8, "size": "long640"},
        "geometric": {"t": 89, "site": "block.23", "ensemble": 8, "size": "long640"},  # unpublished
        "temporal": {
            "t": 89,
            "site": "block.23",
            "ensemble": 1,
            "size": "short960",
            "resample": "linear",
            "prompt": "a photo of a image",
        },
    },
    # unpublished: Flux's noise levels (0.26 and 0.09 after the scheduler's shift of 3) and relative depth, of 24 blocks
    "stable-diffusion-3": {
        "semantic": {"t": 104, "site": "block.11", "ensemble": 8, "size": "long640"},
        "geometric": {"t": 31, "site": "block.9", "ensemble": 8, "size": "long640"},
        "temporal": {"t": 31, "site": "block.9", "ensemble": 1, "size": "short960", "resample": "linear"},
    },
    # unpublished: DIFT's timesteps and Flux's relative depth, of 28 blocks
    "dit": {
        "semantic": {"t": 261, "site": "block.13", "ensemble": 8, "size": "long512"},
        "geometric": {"t": 51, "site": "block.11", "ensemble": 8, "size": "long512"},
        "temporal": {"t": 51, "site": "block.11", "ensemble": 1, "size": "short512", "resample": "linear"},
    },
    "pixart": {
        "semantic": {"t": 261, "site": "block.13", "ensemble": 8, "size": "long640"},
        "geometric": {"t": 51, "site": "block.11", "ensemble": 8, "size": "long640"},
        "temporal": {"t": 51, "site": "block.11", "ensemble": 1, "size": "short960", "resample": "linear"},
    },
    "adm": {
        "semantic": {"t": 101, "site": "out.4", "ensemble": 8, "size": "512"},
        "geometric": {"t": 41, "site": "out.11", "ensemble": 4, "size": "768"},
        "temporal": {"t": 51, "site": "out.7", "ensemble": 4, "size": "short480", "resample": "linear"},
    },
    # a pixel-space model of unknown training; models that know better carry their own presets in denoscope.json
    "pixel": {
        "semantic": {"t": 51, "site": "up.1", "ensemble": 4, "size": "long128"},
        "geometric": {"t": 0, "site": "up.1", "ensemble": 4, "size": "long256"},
        "temporal": {"t": 0, "site": "up.1", "ensemble": 2, "size": "long256"},
    },
}
NAMES = ("semantic", "geometric", "temporal")
