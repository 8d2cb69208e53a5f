"""Settings of encoders per family and task, as data: what is published, and where nothing is, a choice marked so.

site: `{last}` is the number of the last block and `{late}` of the one three quarters down (9 of 12). size, resample: as for
denoisers; "longN" keeps the aspect where the published code pads the picture to a square of that side.
"""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # semantic: keys of block 9, Amir et al., "Deep ViT Features as Dense Visual Descriptors", arXiv 2112.05814 (224 pixels with
    # patches every 4 pixels there; a picture twice as large has as many cells). temporal: DINO's own evaluation on DAVIS (Caron
    # et al., arXiv 2104.14294, eval_video_segmentation.py). geometric: not published.
    "dino": {
        "semantic": {"site": "block.{late}.key", "size": "448"},
        "geometric": {"site": "block.{late}.key", "size": "long640"},
        "temporal": {
            "site": "out",
            "size": "short480",
            "resample": "linear",
            "propagation": {"context": 7, "radius": 12, "topk": 5, "temperature": 0.1},
        },
    },
    # semantic: tokens of the last block before the norm at 840 pixels: sd-dino (Zhang et al., arXiv 2305.15347) and GeoAware-SC
    # (arXiv 2311.17034). geometric, temporal: not published.
    "dinov2": {
        "semantic": {"site": "block.{last}", "size": "long840"},
        "geometric": {"site": "block.{late}", "size": "long840"},
        "temporal": {"site": "out", "size": "short476", "resample": "linear"},
    },
    # temporal: short side 960, normed tokens (DINOv3's notebook on segmentation tracking). semantic, geometric: not published.
    "dinov3": {
        "semantic": {"site": "out", "size": "long768"},
        "geometric": {"site": "out", "size": "long960"},
        "temporal": {
            "site": "out",
            "size": "short960",
            "resample": "linear",
            "propagation": {"context": 7, "radius": 12, "topk": 5, "temperature": 0.2},
        },
    },
    "dinov3-convnext": {
        "semantic": {"site": "down.2", "size": "long768"},  # none is published
        "geometric": {"site": "down.1", "size": "long960"},
        "temporal": {"site": "down.2", "size": "short960", "resample": "linear"},
    },
    # None is published in detail: DIFT's OpenCLIP baseline does not say its block.
    "clip": {
        "semantic": {"site": "block.{late}", "size": "long672"},
        "geometric": {"site": "block.{late}", "size": "long672"},
        "temporal": {"site": "block.{late}", "size": "long672", "resample": "linear"},
    },
    # the neck, at the canvas's side, is how SAM itself sees a picture (Kirillov et al., arXiv 2304.02643); for correspondence
    # none is published
    "sam": {
        "semantic": {"site": "out", "size": "long{canvas}"},
        "geometric": {"site": "out", "size": "long{canvas}"},
        "temporal": {"site": "out", "size": "long{canvas}", "resample": "linear"},
    },
}
