"""The tables of this folder from what `run.sh` left in OUT.

python experiments/correspondence/tables.py OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TITLES = {
    "spair": "spair_style, every category, empty prompt: PCK, percent",
    "spair_prompt": "spair_style, birds and faces, prompt “a photo of a {category}”",
    "spair_flip": "spair_style, birds, empty prompt, with flip alignment",
    "birds": "birds, 200 random pairs of the dev set",
    "faces": "faces, 200 random pairs of the dev set, cropped at random",
    "hpatches": "hpatches_style, LMEDS as published: share of homographies within P pixels, share of matches within P pixels",
    "hpatches_magsac": "hpatches_style, USAC-MAGSAC",
    "dense": "dense_gt: end-point error in pixels, shares in percent",
    "animal": "animal_video: PCK, percent",
    "davis": "davis, four videos: J and F, percent",
}


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def table(report: dict[str, Any]) -> list[str]:
    """One line a method and, below, one line a category for the first method."""
    columns = report["columns"]
    lines = ["| method | count | " + " | ".join(columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    for number, (method, rows) in enumerate(report["rows"].items()):
        for row in rows if number == 0 else rows[:1]:
            label = method if row is rows[0] else f"– {row['category']}"
            lines.append(f"| {label} | {row['count']} | " + " | ".join(cell(row.get(c)) for c in columns) + " |")
    return lines


def by_category(report: dict[str, Any]) -> list[str]:
    """The headline for every method and category."""
    headline, rows = report["columns"][0], report["rows"]
    categories = [row["category"] for row in next(iter(rows.values()))[1:]]
    if len(categories) < 2 or len(rows) < 2:
        return []
    lines = ["", f"{headline} by category:", "", "| | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
    for category in categories:
        values = [next(row for row in some if row["category"] == category) for some in rows.values()]
        lines.append(f"| {category} ({values[0]['count']}) | " + " | ".join(cell(v[headline]) for v in values) + " |")
    return lines


def main() -> None:
    out = Path(sys.argv[1])
    lines = ["# Tables", "", "Made by `run.sh` and `tables.py` of this folder; read them with the [README](README.md)."]
    for name, title in TITLES.items():
        for path in sorted((out / name).glob("*.json")):
            report = json.loads(path.read_text())
            lines += ["", f"## {title}", "", *table(report), *by_category(report)]
    for name in ("sweep_birds", "sweep_faces"):
        path = out / name / "keypoints-sweep.json"
        if path.is_file():
            cells = json.loads(path.read_text())["cells"]
            lines += ["", f"## {name.replace('_', ', ')}: PCK@0.1 of 60 pairs", "", "| site | ensemble | "]
            times = sorted({c["t"] for c in cells})
            lines[-1] += " | ".join(f"t={t}" for t in times) + " |"
            lines.append("|---|---|" + "---|" * len(times))
            for site, members in dict.fromkeys((c["site"], c["ensemble"]) for c in cells):
                row = {c["t"]: c["kp@0.1"] for c in cells if (c["site"], c["ensemble"]) == (site, members)}
                lines.append(f"| {site} | {members} | " + " | ".join(f"{row[t]:.1f}" for t in times) + " |")
    (HERE / "tables.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
