"""A set in the HPatches layout from single photos, for choosing settings without looking at the pictures they are tested on.

    python experiments/correspondence/synthetic_homographies.py PHOTOS OUT --count 12

Each photo becomes a sequence `v_NAME` (random homographies: turns up to 30 degrees, scales 0.7 to 1.4, some perspective, and a
change of light) and `i_NAME` (light alone).
"""

import argparse
from pathlib import Path

import cv2
import numpy as np


def random_homography(rng: np.random.Generator, side: int) -> np.ndarray:
    angle, scale = np.deg2rad(rng.uniform(-30, 30)), np.exp(rng.uniform(np.log(0.7), np.log(1.4)))
    middle = (side - 1) / 2
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    h = np.eye(3)
    h[:2, :2] = turn
    h[:2, 2] = middle + rng.uniform(-0.1, 0.1, 2) * side - turn @ [middle, middle]
    h[2, :2] = rng.uniform(-4e-4, 4e-4, 2)
    return h / h[2, 2]


def relit(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another exposure, gamma and colour of the light, and some noise."""
    light = rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, 3)
    changed = 255 * np.clip((image / 255) ** rng.uniform(0.7, 1.4) * light, 0, 1)
    return np.clip(changed + rng.normal(0, 3, image.shape), 0, 255).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--views", type=int, default=3)
    given = parser.parse_args()
    files = sorted(p for p in given.photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for number, file in enumerate(files[:: max(1, len(files) // given.count)][: given.count]):
        rng, image = np.random.default_rng(number), cv2.imread(str(file))
        if image is None:
            raise SystemExit(f"{file} is no image.")
        for kind in "vi":
            folder = given.out / f"{kind}_{file.stem}"
            folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / "1.png"), image)
            for k in range(2, given.views + 2):
                h = random_homography(rng, image.shape[0]) if kind == "v" else np.eye(3)
                warped = cv2.warpPerspective(image, h, image.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
                cv2.imwrite(str(folder / f"{k}.png"), relit(warped, rng))
                np.savetxt(folder / f"H_1_{k}", h)


if __name__ == "__main__":
    main()
