"""The SPair-71k evaluation side by side with the authors' script: wall time and peak memory, in one run.

    python benchmarks/evaluation.py --data SPAIR --official CHECKOUT --pairs 12   # a checkout of github.com/Tsingularity/dift

SPAIR is SPair-71k or a folder in its layout. Both sides match the same random maps of the shape that Stable Diffusion 2.1 gives
(1280 x 48 x 48), mostly common to all pictures so that some points are right; making features is timed by `dift.py`. The
authors' `eval_spair.main` runs untouched in a process of its own, on a copy of the chosen pairs, with its feature classes
replaced by the given maps and CUDA calls left out. The PCK that both print must agree to the printed digits, else the exit
status is 1.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from denoscope import FeatureMap, Frame
from denoscope.benchmarks.running import Method, evaluate, spread
from denoscope.benchmarks.spair import SPair

CHANNELS, CELLS = 1280, 48


def features_of(name: str, cells: int) -> torch.Tensor:
    """The map of the picture of that name, [1, channels, cells, cells]: most of it is common to all pictures."""

    def drawn(text: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())
        return torch.randn(1, CHANNELS, cells // 4, cells // 4, generator=torch.Generator().manual_seed(seed))

    return F.interpolate(2 * drawn("common") + drawn(name), (cells, cells), mode="bicubic")


def subset(data: Path, count: int, where: Path) -> Path:
    """A folder in the layout with `count` pairs spread over the data set."""
    root = where / "SPair-71k"
    for item in spread(SPair(data).items(), count):
        for picture in (item.data.source, item.data.target):
            folder = root / "JPEGImages" / item.category
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, folder)
        (root / "PairAnnotation" / "test").mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "PairAnnotation" / "test" / f"{item.key}.json", root / "PairAnnotation" / "test")
    return root


def official(root: Path, checkout: Path, cells: int, work: Path) -> dict[str, float]:
    """PCK per image and per point, as the authors' script prints them."""

    class Given:
        def __init__(self, **_: Any):
            pass

        def forward(self, picture: Any, **_: Any) -> torch.Tensor:
            return features_of(Path(picture.filename).name, cells)

    stubs = {}
    for name, kind in (("dift_sd", "SDFeaturizer4Eval"), ("dift_adm", "ADMFeaturizer4Eval")):
        stubs[f"src.models.{name}"] = ModuleType(name)
        setattr(stubs[f"src.models.{name}"], kind, Given)
    spec: Any = importlib.util.spec_from_file_location("eval_spair", checkout / "eval_spair.py")
    module = importlib.util.module_from_spec(spec)
    settings = {"dift_model": "sd", "img_size": [768, 768], "t": 261, "up_ft_index": 1, "ensemble_size": 8}
    arguments = argparse.Namespace(dataset_path=str(root), save_path=str(work / "features"), **settings)
    printed = io.StringIO()
    with mock.patch.dict(sys.modules, stubs), mock.patch.object(torch.cuda, "set_device"):
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(printed):
            module.main(arguments)
    found = re.findall(r"^All per (image|point) PCK@0.1: ([\d.]+)$", printed.getvalue(), re.MULTILINE)
    return {flavour: float(value) for flavour, value in found}


def ours(root: Path, _: Path, cells: int, work: Path) -> dict[str, float]:
    benchmark = SPair(root)

    def features(picture: Any, category: str) -> FeatureMap:
        values = features_of(picture.path.name, cells)[0]
        return FeatureMap(values, Frame.of(picture.size).resize((cells, cells)))

    run = Method("given", lambda item: benchmark.run(item, features), {})
    row = evaluate(benchmark, [run], work).rows["given"][0]
    return {"image": round(row["bbox@0.1"], 2), "point": round(row["bbox@0.1 point"], 2)}


def timed(side: str, root: Path, checkout: Path, cells: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as work:
        before = getrusage(RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        found = {"official": official, "denoscope": ours}[side](root, checkout, cells, Path(work))
        seconds = time.perf_counter() - start
    return {"side": side, "seconds": seconds, "mib": (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1024, "pck": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--official", type=Path, help="checkout of Tsingularity/dift; without it only ours is timed")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--cells", type=int, default=CELLS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for the table (.json)")
    given = parser.parse_args()
    sides = [*(["official"] if given.official else []), "denoscope"]
    with tempfile.TemporaryDirectory() as folder:
        root = subset(given.data, given.pairs, Path(folder))
        rows = []
        for side in sides:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                checkout = given.official or Path()
                rows.append(pool.submit(timed, side, root, checkout, given.cells, given.threads).result())
    table = Table(box=None)
    for column in ("", "seconds", "peak MiB", "PCK image", "PCK point", "time ×", "memory ×"):
        table.add_column(column, justify="right")
    for row in rows:
        ratios = [f"{rows[0][key] / row[key]:.3g}" for key in ("seconds", "mib")]
        values = [f"{row['seconds']:.3g}", f"{row['mib']:,.0f}", *(f"{row['pck'][k]:.2f}" for k in ("image", "point"))]
        table.add_row(row["side"], *values, *ratios)
    Console().print(table)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["pck"] != rows[0]["pck"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
