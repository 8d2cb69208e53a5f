"""Class names and class 0 of the sets that label-scarce segmentation is measured on, as published with them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LabelScarce:
    """names: of all labels, in order. ignore: the label that does not count; 255 for none."""

    names: tuple[str, ...]
    ignore: int = 255


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


CAMVID = _split("sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist")

_BEDROOM = """background, bed, bed footboard, bed headboard, bed side rail, carpet, ceiling, chandelier or fan blade, curtain,
cushion, floor, table, table top, picture or mirror, pillow, lamp column, lamp shade, wall, window, curtain rod, window frame,
chair, picture or mirror frame, plinth, door or door frame, pouf, wardrobe, plant, table staff"""
_HORSE = """background, person, back, barrel, bridle, chest, ear, eye, forelock, head, hoof, leg, mane, muzzle, neck, nostril,
tail, thigh, saddle, shoulder, leg protection"""
_CAT = "background, back, belly, chest, leg, paw, head, ear, eye, mouth, tongue, nose, tail, whiskers, neck"
_CELEBA = """background, cloth, right ear, eyeglasses, hair, hat, left brow, left ear, left eye, lower lip, mouth, neck,
necklace, nose, right brow, right ear ring, right eye, skin, upper lip"""
_FFHQ = """background, head, cheek, chin, ear, ear helix, ear lobule, eye bottom lid, eyelashes, iris, pupil, sclera, tear duct,
eye top lid, eyebrow, forehead, frown, hair, sideburns, jaw, moustache, inferior lip, oral commissure, superior lip, teeth,
neck, nose, ala of nose, nose bridge, nose tip, nostril, philtrum, temple, wrinkles"""
_ADE_BEDROOM = """wall, bed, floor, table, lamp, ceiling, painting, windowpane, pillow, curtain, cushion, door, chair, cabinet,
chest, mirror, rug, armchair, book, sconce, plant, wardrobe, clock, light, flower, vase, fan, box, shelf, television"""

# ddpm-segmentation counts 29 labels in Bedroom-28 and leaves the background out; so do we (the content-shift code counts 28
# with none left out, for which the label "table staff" is out of range)
SETS = {
    "bedroom_28": LabelScarce(_split(_BEDROOM), 0),
    "horse_21": LabelScarce(_split(_HORSE)),
    "cat_15": LabelScarce(_split(_CAT)),
    "celeba_19": LabelScarce(_split(_CELEBA)),
    "ffhq_34": LabelScarce(_split(_FFHQ)),
    "ade_bedroom_30": LabelScarce(_split(_ADE_BEDROOM)),
}
