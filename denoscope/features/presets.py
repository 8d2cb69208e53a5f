"""Published settings of DIFT (Tang et al., NeurIPS 2023, arXiv 2306.03881) per model family, as data.

size: "WxH", "N" (a square, aspect not kept), "shortN" / "longN" (aspect kept, sides rounded down to multiples of 32), or
"0" (as it is). resample: the filter, see `Picture.resized`.
"""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion": {
        "semantic": {"t": 261, "site": "up.1", "ensemble": 8, "size": "768"},
        "geometric": {"t": 0, "site": "up.2", "ensemble": 8, "size": "768"},
        "temporal": {"t": 51, "site": "up.2", "ensemble": 8, "size": "short480", "resample": "linear"},
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
