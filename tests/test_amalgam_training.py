"""The amalgam of a model's techniques, training its weights on pairs and on pixels, and the command line."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import denoscope as ds
from denoscope.benchmarks.pairs import Pairs
from denoscope.benchmarks.pck import Pair
from denoscope.benchmarks.protocol import Item
from denoscope.correspondence import transfer
from denoscope.errors import InputError
from denoscope.features import Dift, Extractor, Joint, load_extractor, recipe
from denoscope.features.amalgam import Amalgam
from denoscope.features.amalgamation import Assigners, amalgamate, read_assigners
from denoscope.features.fusing import Joined
from denoscope.features.joint import takes_prompts
from denoscope.images import Frame
from denoscope.segmentation import Examples
from denoscope.training.amalgam import AmalgamConfig, cells_of, info_nce, maps_of, train_amalgam
from denoscope.training.checkpoint import Checkpoint
from denoscope.training.pairs import read_training_pairs, split_pairs
from denoscope.training.pixel_amalgam import PixelAmalgamConfig, split_examples, train_pixel_amalgam

TECHNIQUES = {"plain": {}, "cat": {"prompt": "a photo of a cat"}, "later": {"t": 300}}


def tiny(sd, **settings) -> Dift:
    return Dift(sd, recipe(sd, **{"t": 50, "site": "up.1", "ensemble": 1, "size": 64, **settings}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pairs of six photos: crops of smooth pictures, in which the same points are marked."""
    path = tmp_path_factory.mktemp("pairs")
    rng, entries = np.random.default_rng(0), []
    for number in range(3):
        whole = smooth_picture(number, 120, 100)
        corners = [(0, 0), (14, 9)]
        for name, (x, y) in zip("ab", corners, strict=True):
            ds.read((whole.pixels[:, y : y + 84, x : x + 100] * 255).byte().permute(1, 2, 0).numpy()).image().save(
                path / f"{number}{name}.png"
            )
        points = rng.integers((20, 15), (90, 80), (8, 2))
        own, other = points.tolist(), (points - corners[1]).tolist()
        entries.append(
            {"source": f"{number}a.png", "target": f"{number}b.png", "source_points": own, "target_points": other}
        )
        entries.append(
            {"source": f"{number}b.png", "target": f"{number}a.png", "source_points": other, "target_points": own}
        )
    (path / "pairs.json").write_text(json.dumps(entries))
    (path / "some.toml").write_text("[clean]\nt = 20\n[noise]\nt = 950\n")
    return path


def pair_items(folder) -> tuple[Pairs, list[Item]]:
    data = Pairs(folder / "pairs.json", alphas=(0.1,), thresholds=("img",))
    return data, data.items()


def test_amalgam_is_made_of_the_techniques_own_features(sd) -> None:
    picture, base = smooth_picture(0), tiny(sd)
    singles = [Dift(sd, recipe(sd, t=50, site="up.1", ensemble=1, size=64))(picture)]
    singles.append(tiny(sd, prompt="a photo of a cat")(picture))
    singles.append(tiny(sd, t=300)(picture))
    for how in ("mean", "concat", "standard"):
        made, expected = Amalgam(base, TECHNIQUES, how)(picture), amalgamate(singles, how)
        assert torch.allclose(made.values, expected.values, atol=1e-5)
        assert made.frame == expected.frame
    assert made.recipe["techniques"] == ["plain", "cat", "later"]
    assert [m["prompt"] for m in made.recipe["members"]] == [None, "a photo of a cat", None]
    assert isinstance(Amalgam(base, TECHNIQUES, "pca:4")(picture), Joined)


def test_attention_and_joined_sites_lie_beside(sd) -> None:
    picture, base = smooth_picture(0), tiny(sd, site="up.0+up.1")
    one = base(picture)
    made = Amalgam(base, {"plain": {}, "cat": {"prompt": "a cat"}, "attention": {"site": "down.0"}})(picture)
    beside = tiny(sd, site="down.0")(picture)
    assert len(made.values) == len(one.values) + len(beside.values)
    up = beside.values.shape[1] // one.values.shape[1]
    assert up >= 1
    assert torch.allclose(made.values[len(one.values) :], beside.values, atol=1e-5)


def test_amalgam_is_an_extractor_that_says_all(sd) -> None:
    base = tiny(sd)
    one = Amalgam(base, TECHNIQUES)
    assert isinstance(one, Extractor)
    assert takes_prompts(one) is takes_prompts(base) is True
    others = [
        Amalgam(base, TECHNIQUES, "standard"),
        Amalgam(base, {**TECHNIQUES, "later": {"t": 301}}),
        Amalgam(tiny(sd, t=51), TECHNIQUES),
        Amalgam(base, {"plain": {}, "cat": TECHNIQUES["cat"]}),
        Amalgam(Dift(sd, base.recipe, seed=3), TECHNIQUES),
    ]
    said = [json.dumps(extractor.describe(), sort_keys=True) for extractor in (one, *others)]
    assert len(set(said)) == len(said)
    assert json.dumps(Amalgam(tiny(sd), TECHNIQUES).describe(), sort_keys=True) == said[0]
    picture = smooth_picture(0)
    told = one(picture, "a dog")
    assert [m["prompt"] for m in told.recipe["members"]] == ["a dog", "a photo of a cat", "a dog"]
    joined = Joint([one, Amalgam(base, TECHNIQUES, "standard")])(picture)
    assert len(joined.values) == len(told.values) * 4


def test_pairs_under_a_pca_are_matched_together(sd) -> None:
    extractor = Amalgam(tiny(sd), TECHNIQUES, "pca:5")
    one, two = extractor(smooth_picture(0)), extractor(smooth_picture(1))
    found = transfer(one, two, [(20, 20), (50, 30)])
    assert found.target.values.shape[0] == 5


def test_wrong_techniques_are_named(sd, tmp_path) -> None:
    base = tiny(sd)
    with pytest.raises(InputError, match="Technique 'late'.*9999"):
        Amalgam(base, {"late": {"t": 9999}})
    with pytest.raises(InputError, match="Technique 'x'.*no setting 'promt'"):
        Amalgam(base, {"x": {"promt": "a cat"}})
    for none in ({}, {"attention": {}}):
        with pytest.raises(InputError, match="at least one technique"):
            Amalgam(base, none)
    with pytest.raises(InputError, match="mean, concat, standard"):
        Amalgam(base, TECHNIQUES, "average")
    with pytest.raises(FileNotFoundError, match="no trained assigners"):
        Amalgam(base, TECHNIQUES, "missing.safetensors")
    with pytest.raises(InputError, match="only maps of one shape"):
        Amalgam(base, {"plain": {}, "small": {"size": 128}})(smooth_picture(0))


def test_info_nce_is_the_mean_of_two_cross_entropies_over_all_cells() -> None:
    torch.manual_seed(0)
    one, two = torch.randn(7, 3, 4), torch.randn(7, 5, 2)
    at, to = torch.tensor([[0, 0], [3, 2], [1, 1]]), torch.tensor([[1, 4], [0, 0], [1, 1]])
    logits = F.normalize(one.flatten(1).mT, dim=1) @ F.normalize(two.flatten(1).mT, dim=1).mT / 0.07
    i, j = at[:, 1] * 4 + at[:, 0], to[:, 1] * 2 + to[:, 0]
    expected = (F.cross_entropy(logits[i], j) + F.cross_entropy(logits.mT[j], i)) / 2
    assert info_nce(one, two, at, to).item() == pytest.approx(expected.item(), rel=1e-5)


@given(st.integers(1, 90), st.integers(1, 70), st.integers(1, 16), st.integers(1, 16), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_points_lie_in_their_cells(width, height, across, down, x, y) -> None:
    frame = Frame.of((width, height)).resize((across, down))
    point = torch.tensor([[x * width - 0.5, y * height - 0.5]], dtype=torch.float64).clamp(-0.5 + 1e-9)
    (found,), (official,) = cells_of(frame, point).tolist(), cells_of(frame, point, True).tolist()
    for cell, of, side, cells, pixels in zip(found, official, (x, y), frame.grid, frame.picture, strict=True):
        assert 0 <= cell < cells
        assert 0 <= of < cells
        assert cell - 1e-6 <= side * cells <= cell + 1 + 1e-6
        assert abs(cell - of) <= 1 + cells / pixels / 2  # half a pixel, in cells, and the rounding


def test_official_cells_are_scaled_clipped_and_rounded() -> None:
    frame = Frame.of((640, 480)).resize((64, 64))
    points = torch.tensor([[333.0, 111.0], [639.0, 479.0], [0.0, 4.0]]).double()
    assert cells_of(frame, points, official=True).tolist() == [[33, 15], [63, 63], [0, 1]]


def test_split_shares_no_photo() -> None:
    def item(a: int, b: int) -> Item:
        one = torch.zeros(1, 2, dtype=torch.float64)
        return Item(f"{a}-{b}", "", Pair(f"v{a}", f"w{b}", "", one, one, (0, 0, 1, 1), (5, 5), key=f"000-{a}-{b}"))

    items = [item(a, b) for a in range(8) for b in range(8) if a != b]
    train, validation = split_pairs(items, 0.4, 3)
    photos = [{name for i in part for name in i.data.key.split("-")[1:]} for part in (train, validation)]
    assert train
    assert validation
    assert not photos[0] & photos[1]
    assert split_pairs(items, 0.4, 3)[0] == train
    with pytest.raises(InputError, match="give validation pairs"):
        split_pairs([item(0, 1), item(1, 2), item(2, 0)])


def test_training_learns_which_map_to_trust(seedling, folder, tmp_path) -> None:
    """One technique is noisy: the other gets the weight, and matches get better than those of the mean."""
    base = Dift(seedling, recipe(seedling, t=20, site="up.1", ensemble=1, size="long48"))
    extractor = Amalgam(base, {"clean": {}, "noise": {"t": 500}})
    data, items = pair_items(folder)
    train, validation = items[:4], items[4:]
    config = AmalgamConfig(steps=60, every=20, head="nn", lr=3e-3)
    made = train_amalgam(extractor, data, train, validation, tmp_path / "w.safetensors", tmp_path / "f", config=config)
    trained, mean, noise = (made.validation[name]["img@0.1"] for name in ("trained", "mean", "noise"))
    assert trained > mean > noise
    learned = Amalgam(base, extractor.techniques, made.path)
    parts = maps_of(Amalgam(base, extractor.techniques, "concat")(data.picture(items[4].data.source)))[0]
    weights = read_assigners(made.path)(parts[None]).weights[0]
    assert weights[:, 0].mean() > 0.6, weights.mean(2)
    row = data.rows(validation, [data.run(item, lambda p, _: learned(p)) for item in validation])[0]
    assert row["img@0.1"] == trained  # the extractor makes what was measured
    assert [look["step"] for look in made.looks] == [20, 40, 60]
    assert made.looks[-1]["loss"] < made.looks[0]["loss"]
    assert made.best == max(made.looks, key=lambda look: look["img@0.1"])["step"]
    assert json.loads((tmp_path / "w.json").read_text())["best"] == made.best


@pytest.mark.parametrize("official", [False, True])
def test_a_stopped_training_ends_as_one_that_was_not(sd, folder, tmp_path, official) -> None:
    extractor = Amalgam(tiny(sd), TECHNIQUES)
    data, items = pair_items(folder)
    config = AmalgamConfig(steps=12, every=4, official=official, count=2, gamma2=0 if official else 0.01)

    def go(name: str, **options) -> None:
        train_amalgam(
            extractor, data, items[:3], items[3:], tmp_path / name, folder / "features", config=config, **options
        )

    def stop(step: int, loss: float, seconds: float) -> None:
        if step == 10:
            raise KeyboardInterrupt

    go("whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        go("cut.safetensors", report=stop)
    assert not (tmp_path / "cut.safetensors").exists()
    steps = []
    go("cut.safetensors", report=lambda step, loss, seconds: steps.append(step))
    assert steps == [9, 10, 11, 12]  # on from the last look
    one, other = (read_assigners(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not list(tmp_path.glob("*checkpoint*"))
    with pytest.raises(InputError, match="already there"):
        go("cut.safetensors")


@pytest.mark.parametrize("killed", [5, 6])
def test_a_training_goes_on_between_looks_too(sd, folder, tmp_path, killed) -> None:
    """With a checkpoint after every step; the mean loss of a look counts the steps before the stop."""
    extractor = Amalgam(tiny(sd), TECHNIQUES)
    data, items = pair_items(folder)
    told, config = [], AmalgamConfig(steps=7, every=4)

    def go(name: str, **options):
        out = tmp_path / f"{name}.safetensors"
        return train_amalgam(extractor, data, items[:3], items[3:], out, folder / "f", config=config, **options)

    def stop(step: int, loss: float, seconds: float) -> None:
        if step == killed:
            raise KeyboardInterrupt

    whole = go("whole")
    checkpoint = Checkpoint(tmp_path / "cut.safetensors", told.append, seconds=0)
    with pytest.raises(KeyboardInterrupt):
        go("cut", report=stop, checkpoint=checkpoint)
    cut = go("cut", checkpoint=checkpoint)
    assert told == [killed - 1]
    assert cut.looks == whole.looks
    one, other = (read_assigners(made.path).state_dict() for made in (whole, cut))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert checkpoint.path.is_file()  # until whoever gave it removes it: what follows may be stopped too
    again = go("cut", checkpoint=checkpoint)
    assert (told, again.looks) == ([killed - 1, 7], whole.looks)
    checkpoint.remove()
    with pytest.raises(InputError, match="already there"):
        go("cut", checkpoint=checkpoint)


def test_a_checkpoint_of_another_training_is_not_taken(sd, folder, tmp_path) -> None:
    extractor = Amalgam(tiny(sd), TECHNIQUES)
    data, items = pair_items(folder)

    def go(seed: int, **options) -> None:
        config = AmalgamConfig(steps=3, every=1, seed=seed)
        train_amalgam(
            extractor,
            data,
            items[:3],
            items[3:],
            tmp_path / "w.safetensors",
            folder / "features",
            config=config,
            **options,
        )

    def stop(step: int, loss: float, seconds: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(0, report=stop)
    with pytest.raises(InputError, match="other settings"):
        go(1)
    moved = json.loads((folder / "pairs.json").read_text())
    moved[0]["source_points"][0][0] += 1  # a correction of the pairs counts too
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    own, items = items, Pairs(tmp_path / "moved.json", pictures=str(folder), alphas=(0.1,), thresholds=("img",)).items()
    assert [item.key for item in items] == [item.key for item in own]
    with pytest.raises(InputError, match="other settings"):
        go(0)
    items = own
    (tmp_path / "w.checkpoint.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="damaged; the training begins anew"):
        go(1)


def test_features_are_made_once(sd, folder, tmp_path) -> None:
    extractor = Amalgam(tiny(sd), TECHNIQUES)
    data, items = pair_items(folder)
    told = []
    for name in ("a", "b"):
        train_amalgam(
            extractor, data, items[:1], items[1:2], tmp_path / f"{name}.safetensors", tmp_path / "f",
            config=AmalgamConfig(steps=1), prepared=lambda made, all_: told.append((made, all_)),
        )  # fmt: skip
    assert told == [(1, 2), (2, 2)] * 2
    files = list((tmp_path / "f").iterdir())
    assert len(files) == 2


def test_wrong_settings_of_the_training_are_named(sd, folder, tmp_path) -> None:
    extractor = Amalgam(tiny(sd), TECHNIQUES)
    data, items = pair_items(folder)
    for wrong in (
        {"steps": 0},
        {"lr": 0},
        {"lr": float("nan")},
        {"official": True, "gamma1": 0.1},
        {"gamma2": float("inf")},
    ):
        with pytest.raises(InputError):
            AmalgamConfig(**wrong)
    with pytest.raises(InputError, match=r"saved as \.safetensors"):
        train_amalgam(extractor, data, items, items, tmp_path / "w.pt", tmp_path / "f")
    with pytest.raises(InputError, match="at least one pair"):
        train_amalgam(extractor, data, items, [], tmp_path / "w.safetensors", tmp_path / "f")
    other = Amalgam(tiny(sd), {"plain": {}, "small": {"size": 128}})
    with pytest.raises(InputError, match="only maps of one shape"):
        train_amalgam(other, data, items[:2], items[2:], tmp_path / "w.safetensors", tmp_path / "f")


def test_lists_of_pairs_are_read_and_kept_apart(folder) -> None:
    data, train, validation, test = read_training_pairs(folder / "pairs.json", test=folder / "pairs.json", seed=1)
    photos = [{n for item in part for n in (item.data.source, item.data.target)} for part in (train, validation)]
    assert train
    assert validation
    assert not photos[0] & photos[1]
    assert len(test) == 6
    assert data.thresholds == ("img",)
    official, *_ = read_training_pairs(folder / "pairs.json", official=True, seed=1)
    assert official.square == 512
    assert official.thresholds == ("img", "bbox")


def scene_examples(count: int = 4) -> Examples:
    """Pictures whose left half is dark and whose right half is light, and masks that say so."""
    pairs = []
    for seed in range(count):
        pixels = smooth_picture(seed, 48, 48).pixels * 0.3
        edge = 16 + 4 * seed
        pixels[:, :, edge:] += 0.6
        labels = np.zeros((48, 48), np.int64)
        labels[:, edge:] = 1
        pairs.append((ds.read((pixels * 255).byte().permute(1, 2, 0).numpy()), labels))
    return Examples.of(pairs, ["dark", "light"])


def test_pixels_learn_which_map_to_trust(seedling, tmp_path) -> None:
    base = Dift(seedling, recipe(seedling, t=20, site="up.1", ensemble=1, size="long48"))
    extractor = Amalgam(base, {"clean": {}, "noise": {"t": 950}, "attention": {"t": 30}})
    train, validation = split_examples(scene_examples(), 0.25, 1)
    assert (len(train), len(validation)) == (3, 1)
    told = train_pixel_amalgam(
        extractor, train, validation, tmp_path / "p.safetensors", tmp_path / "f",
        config=PixelAmalgamConfig(steps=120, every=40, lr=3e-3),
    )  # fmt: skip
    assert max(look["right"] for look in told["looks"]) > 0.85
    made = Amalgam(base, extractor.techniques, tmp_path / "p.safetensors")(validation.examples[0].read())
    single = base(validation.examples[0].read())
    assert made.values.shape[0] == 2 * single.values.shape[0]
    assert made.recipe["amalgam"]["pixels"] is True


def test_pixels_by_the_official_loss(sd, tmp_path) -> None:
    extractor = Amalgam(tiny(sd), TECHNIQUES)
    parts = split_examples(scene_examples(2))
    config = PixelAmalgamConfig(steps=7, every=3, official=True, count=2)
    told = train_pixel_amalgam(extractor, *parts, tmp_path / "p.safetensors", tmp_path / "f", config=config, pixels=30)
    assert [look["step"] for look in told["looks"]] == [3, 6, 7]
    assert all(3**-0.5 - 1e-6 <= look["norm"] <= 1 for look in told["looks"])
    with pytest.raises(InputError, match="already there"):
        train_pixel_amalgam(extractor, *parts, tmp_path / "p.safetensors", tmp_path / "f")
    with pytest.raises(InputError, match="cannot be divided"):
        split_examples(replace(parts[0], examples=parts[0].examples[:1]))


_PIXELS = """
import os, signal, sys
import denoscope as ds
from pathlib import Path
from denoscope.features import Dift, recipe
from denoscope.features.amalgam import Amalgam
from denoscope.segmentation import read_examples
from denoscope.training.checkpoint import Checkpoint
from denoscope.training.pixel_amalgam import PixelAmalgamConfig, split_examples, train_pixel_amalgam

model, folder, out, official, killed = sys.argv[1:]
sd = ds.load(model, device="cpu")
base = Dift(sd, recipe(sd, t=50, site="up.1", ensemble=1, size=64))
extractor = Amalgam(base, {"plain": {}, "later": {"t": 300}})
config = PixelAmalgamConfig(steps=11, every=4, official=official == "yes")

def report(step, loss, seconds):
    print(step, flush=True)
    if step == int(killed):
        os.kill(os.getpid(), signal.SIGKILL)

train_pixel_amalgam(
    extractor, *split_examples(read_examples(folder)), out, Path(out).with_name("f"), config=config, pixels=40, report=report,
    checkpoint=Checkpoint(Path(out), lambda step: print("at", step), seconds=0),
)
"""


@pytest.mark.parametrize("official", ["no", "yes"])
def test_a_killed_training_of_pixels_ends_as_one_that_was_not(tmp_path, official) -> None:
    for k, example in enumerate(scene_examples(3).examples):
        example.read().image().save(tmp_path / f"{k}.png")
        np.save(tmp_path / f"{k}.npy", example.labels)

    def go(name: str, killed: int) -> tuple[int, list[str]]:
        model = GOLDEN / "dift-sd" / "pipeline"
        asked = [model, tmp_path, tmp_path / f"{name}.safetensors", official, killed]
        command = [sys.executable, "-W", "ignore", "-c", _PIXELS, *map(str, asked)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return done.returncode, done.stdout.split()

    assert go("whole", 0) == (0, list(map(str, range(1, 12))))
    assert go("cut", 6)[0] == -signal.SIGKILL
    assert not (tmp_path / "cut.safetensors").exists()
    assert go("cut", 0) == (0, ["at", "6", *map(str, range(7, 12))])
    one, other = (read_assigners(tmp_path / f"{name}.safetensors") for name in ("whole", "cut"))
    values = other.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())
    assert one.made["looks"] == other.made["looks"]


def test_a_command_that_was_stopped_goes_on(run, folder, tmp_path, monkeypatch) -> None:
    """Stopped after the report is written and before the weights are: neither is in the way of going on."""
    asked = ["train", "amalgam", "--techniques", folder / "some.toml", "--out", tmp_path / "w.safetensors"]
    asked += ["--size", "long48", "--ensemble", 1, "--pairs", folder / "pairs.json", "--steps", 2, "--every", 1]
    asked += ["--seed", 1, "--head", "nn"]

    def stopped(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as inside:
        inside.setattr(Assigners, "save", stopped)
        status, _, wrong = run(*asked)
    assert status
    assert "train: stopped; the same command goes on from what was kept last." in wrong
    assert (tmp_path / "w.json").exists()
    assert not (tmp_path / "w.safetensors").exists()
    status, said, wrong = run(*asked)
    assert status == 0, wrong
    assert f"Goes on at step 2, which {tmp_path / 'w.checkpoint.pt'} holds." in said
    assert sorted(path.name for path in tmp_path.glob("w*")) == ["w-features", "w.json", "w.safetensors", "w.toml"]


def test_command_trains_and_the_recipe_is_used_by_others(run, folder, tmp_path) -> None:
    out = tmp_path / "w.safetensors"
    common = [
        "train",
        "amalgam",
        "--techniques",
        folder / "some.toml",
        "--out",
        out,
        "--size",
        "long48",
        "--ensemble",
        1,
    ]
    status, said, _ = run(
        *common, "--pairs", folder / "pairs.json", "--steps", 4, "--every", 2, "--seed", 1, "--head", "nn"
    )
    assert status == 0
    assert "features of" in said
    for word in ("trained", "mean", "clean", "noise", "img@0.1", "--recipe"):
        assert word in said
    assert "or --head nn" not in said  # it was asked for
    recipe_file = tmp_path / "w.toml"
    assert 'amalgamate = "w.safetensors"' in recipe_file.read_text()
    status, said, wrong = run(
        "match",
        folder / "0a.png",
        folder / "0b.png",
        "--points",
        "40,40;60,50",
        "--recipe",
        recipe_file,
        "--out",
        tmp_path / "m",
    )
    assert status == 0, wrong
    status, _, wrong = run(*common, "--pairs", folder / "pairs.json")
    assert status == 2
    assert "already there" in wrong


def test_command_names_what_is_wrong(run, folder, tmp_path) -> None:
    common = ["train", "amalgam", "--techniques", folder / "some.toml", "--out", tmp_path / "w.safetensors"]
    for options, words in (
        ([], "--pairs or --examples"),
        (["--pairs", folder / "pairs.json", "--examples", folder], "--pairs or --examples"),
        (["--pairs", folder / "none.json"], "none.json"),
        (["--examples", tmp_path / "none"], "none"),
        (["--pairs", folder / "pairs.json", "--steps", 0], "at least 1"),
        (["--pairs", folder / "pairs.json", "--head", "mlp"], "Error: head is conv or nn, not 'mlp'."),
        (["--pairs", folder / "pairs.json", "--count", 0], "the number of assigners, is 0; it must be at least 1"),
        (["--examples", folder, "--count", 0], "the number of assigners, is 0; it must be at least 1"),
        (["--pairs", folder / "pairs.json", "--model", "rgb"], "for a diffusion model by itself"),
        (["--examples", folder, "--test", folder], "--test is for pairs"),
    ):
        status, _, wrong = run(*common, *options)
        assert status == 2
        assert words in " ".join(wrong.split())
    status, _, wrong = run(
        "train",
        "amalgam",
        "--techniques",
        tmp_path / "no.toml",
        "--pairs",
        folder / "pairs.json",
        "--out",
        tmp_path / "x.safetensors",
    )
    assert status == 2
    assert "no.toml" in wrong


def test_recipe_file_of_ways_without_training(folder, tmp_path) -> None:
    extractor = load_extractor(
        "seedling", "cpu", amalgamate="standard", techniques={"a": {"t": 20}, "b": {"t": 60}}, size="long48", ensemble=1
    )
    assert isinstance(extractor, Amalgam)
    assert extractor.name == "seedling@standard"
    one, two = (extractor(ds.read(folder / name)) for name in ("0a.png", "0b.png"))
    assert transfer(one, two, [(40, 40)]).points.shape == (1, 2)
