"""The classifier of pixels: the published networks, their training and votes, and segmentation from a few examples."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file
from scenes import Patches
from torch import nn

import denoscope as ds
from denoscope.features.amalgamation import ChannelAssigner, mixed, mixing_weights
from denoscope.features.baselines import BASELINES
from denoscope.features.recipes import absolute, missing, read_recipe, write_recipe
from denoscope.images import Frame
from denoscope.segmentation.ensemble import (
    PixelEnsemble,
    _order,
    classified,
    disagreement,
    fit,
    uncertainty,
    vote,
)
from denoscope.segmentation.examples import _check_edges
from denoscope.segmentation.few_shot import differences
from denoscope.segmentation.masks import Classes, overlay
from denoscope.segmentation.pixels import PixelStore, chosen_pixels

HEADS = GOLDEN / "content-shift-heads"


# against the published code


@pytest.fixture(scope="module")
def recorded():
    return load_file(HEADS / "fixture.safetensors"), json.loads((HEADS / "expected.json").read_text())["pix"]


def recorded_networks(fixture):
    """State dicts of the three networks without their assigners."""
    return [
        {
            name.removeprefix(f"pix{k}.sd."): value
            for name, value in fixture.items()
            if name.startswith(f"pix{k}.sd.layers")
        }
        for k in range(3)
    ]


def test_logits_vote_and_uncertainty_are_the_recorded_ones(recorded):
    fixture, expected = recorded
    networks = PixelEnsemble.stacked(recorded_networks(fixture))
    assert (networks.models, networks.channels, networks.classes) == (3, 19, expected["classes"])
    logits = []
    for k in range(3):  # every network has weight assigners of its own
        parts = []
        for own, name in (("pix.x", "weight_assigner"), ("pix.ddpm", "weight_assigner_ddpm")):
            f = ChannelAssigner(fixture[own].shape[2], pixels=True).eval()
            start = f"pix{k}.sd.{name}.0."
            f.load_state_dict(
                {n.removeprefix(start): v for n, v in fixture.items() if n.startswith(start)}, strict=False
            )
            with torch.no_grad():
                parts.append(mixed(mixing_weights(f, fixture[own]), fixture[own]))
        logits.append(networks.logits(torch.cat(parts, 1))[k])
        assert (logits[k] - fixture[f"pix{k}.logits"]).abs().max() < 1e-5 * fixture[f"pix{k}.logits"].abs().max()
    found = torch.stack(logits)
    assert torch.equal(vote(found).view(16, 16), fixture["pix.seg"].long())
    assert uncertainty(disagreement(found)) == pytest.approx(expected["uncertainty"], abs=1e-5)


class Published(nn.Sequential):
    """The layers of the published classifier."""

    def __init__(self, channels, classes):
        one, two = (128, 32) if classes < 30 else (256, 128)
        super().__init__(
            nn.Linear(channels, one), nn.ReLU(), nn.BatchNorm1d(one), nn.Linear(one, two), nn.ReLU(),
            nn.BatchNorm1d(two), nn.Linear(two, classes),
        )  # fmt: skip


def trained_alone(start, store, member, epochs, seed):
    """The published training, of one network: its state and how many batches it saw."""
    network = Published(store.channels, start.classes)
    network.load_state_dict(
        {n.removeprefix("layers."): v[member].clone() for n, v in start.weights.items()}, strict=False
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    best, waited, steps = 1e7, 0, 0
    for epoch in range(epochs):
        order = _order(len(store), seed, member, epoch).long()
        for begin in range(0, len(store) - 63, 64):
            features, labels = store.take(order[begin : begin + 64])
            optimizer.zero_grad()
            loss = F.cross_entropy(network(features), labels)
            loss.backward()
            optimizer.step()
            steps += 1
            if epoch > 3:
                best, waited = (loss.item(), 0) if loss.item() < best else (best, waited + 1)
                if waited > 50:
                    return network.state_dict(), steps
    return network.state_dict(), steps


def store_of(folder, pictures=2, channels=6, classes=3, noise=0.7):
    """Pixels of which some channels tell the class."""
    store = PixelStore(folder, "float32")
    for k in range(pictures):
        rng = np.random.default_rng(k)
        labels = rng.integers(0, classes, (20, 24)).astype(np.int16)
        values = torch.from_numpy(rng.normal(size=(channels, 20, 24)) * noise).float()
        for number in range(classes):
            values[number, torch.from_numpy(labels == number)] += 1
        store.add(ds.FeatureMap(values, Frame.of((24, 20))), labels, chosen_pixels(labels), k)
    return store


def test_networks_trained_together_are_those_trained_alone(tmp_path):
    store = store_of(tmp_path)
    start = PixelEnsemble.initial(store.channels, 3, models=3, seed=5)
    left = []
    found = fit(store, 3, models=3, epochs=12, seed=5, report=lambda step, running: left.append(running))
    lengths = []
    for member in range(3):
        alone, steps = trained_alone(start, store, member, 12, 5)
        lengths.append(steps)
        for name, value in alone.items():
            if "num_batches" not in name:
                own = found.weights[f"layers.{name}"][member]
                assert (own - value).norm() <= 1e-5 * value.norm(), (member, name)
    assert len(set(lengths)) > 1  # some stop before the others
    assert [sum(steps > k for steps in lengths) for k in range(1, max(lengths) + 1)][:-1] == left[:-1]


@pytest.mark.parametrize(("classes", "widths"), [(29, [128, 32]), (30, [256, 128])])
def test_initial_weights(classes, widths):
    one, two = (
        PixelEnsemble.initial(40, classes, models=3, seed=1),
        PixelEnsemble.initial(40, classes, models=5, seed=1),
    )
    assert [one.weights[f"layers.{k}.weight"].shape[1] for k in (0, 3, 6)] == [*widths, classes]
    assert one.weights["layers.0.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert torch.equal(one.weights["layers.3.weight"], two.weights["layers.3.weight"][:3])
    assert not torch.equal(one.weights["layers.3.weight"][0], one.weights["layers.3.weight"][1])


# votes

logit_lists = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(2, 5), st.integers(0, 10_000))


@given(logit_lists)
def test_votes_and_disagreement(drawn):
    models, pixels, classes, seed = drawn
    logits = 3 * torch.randn(models, pixels, classes, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(vote(logits), logits.argmax(2).mode(0).values)
    unsure = disagreement(logits)
    assert (unsure >= 0).all()
    assert (unsure <= np.log(min(models, classes)) + 1e-5).all()
    same = logits[:1].expand(models, -1, -1)
    assert torch.equal(vote(same), logits[0].argmax(1))
    assert disagreement(same).max() < 1e-5
    published = unsure.sort().values[-(pixels // 10) :].mean() if pixels >= 10 else unsure.max()
    assert uncertainty(unsure) == pytest.approx(published.item(), abs=1e-6)


@settings(max_examples=10)
@given(st.sampled_from([(3, 2), (9, 7), (30, 22)]), st.integers(0, 99))
def test_reading_cells_before_or_after_enlarging_is_the_same(grid, seed):
    size = (31, 23)
    values = torch.randn(5, grid[1], grid[0], generator=torch.Generator().manual_seed(seed))
    fm = ds.FeatureMap(values, Frame.of((62, 46)).resize(grid))
    networks = PixelEnsemble.initial(5, 4, models=3, seed=seed)
    networks.weights["layers.2.running_mean"].normal_(generator=torch.Generator().manual_seed(seed))
    labels, doubt = classified(networks, fm, size)
    whole = F.interpolate(values[None], size[::-1], mode="bilinear", align_corners=False)[0].flatten(1).mT
    logits = networks.logits(whole)
    margin = logits.topk(2).values.diff().abs().amin((0, 2)).view(size[::-1])
    clear = margin.numpy() > 1e-5  # elsewhere rounding decides
    assert np.array_equal(labels[clear], vote(logits).view(size[::-1]).numpy()[clear])
    assert np.abs(doubt - disagreement(logits).view(size[::-1]).numpy()).max() < 1e-5


# what cannot be learned


def test_what_does_not_suffice_is_told(tmp_path):
    with pytest.raises(ds.InputError, match="no labelled pixels"):
        fit(PixelStore(tmp_path), 2)
    with pytest.raises(ds.InputError, match="pixels of class 2, but only 2 classes"):
        fit(store_of(tmp_path), 2)
    alike = PixelStore(tmp_path)
    labels = np.full((4, 4), 1, np.int16)
    alike.add(ds.FeatureMap(torch.randn(2, 4, 4), Frame.of((4, 4))), labels, chosen_pixels(labels), 0)
    with pytest.raises(ds.InputError, match="All labelled pixels are of class 1"):
        fit(alike, 2)
    with pytest.raises(ds.InputError, match="at least 1 model"):
        PixelEnsemble.initial(4, 2, models=0)
    with pytest.raises(ds.InputError, match="reads 6 channels, but the features have 4"):
        PixelEnsemble.initial(6, 2).logits(torch.zeros(3, 4))
    with pytest.raises(ds.InputError, match=r"layers\.3\.weight is missing"):
        PixelEnsemble({"layers.0.weight": torch.zeros(1), "layers.0.bias": torch.zeros(1)})


# pictures


def scene(seed, width=64, height=48):
    """A picture with a red disc on green, somewhere, and its labels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = (x - rng.integers(18, width - 18)) ** 2 + (y - rng.integers(16, height - 16)) ** 2 < 12**2
    image = np.where(inside[..., None], (200, 60, 40), (40, 150, 70)) + rng.normal(0, 12, (height, width, 3))
    return ds.read(image.clip(0, 255).astype(np.uint8)), inside.astype(np.uint8)


class Colours(Patches):
    """Colours themselves, one cell for two pixels."""

    def __call__(self, picture, prompt=None):
        grid = picture.size[0] // 2, picture.size[1] // 2
        return ds.FeatureMap(picture.resized(grid), Frame.of(picture.size).resize(grid), self.describe(), picture)


@pytest.fixture(scope="module")
def learned():
    examples = ds.Examples.of([scene(k) for k in range(3)], ["background", "disc"])
    return ds.FewShot.fit(Colours(), examples, models=4, epochs=5)


def test_three_examples_teach_what_a_disc_is(learned):
    picture, truth = scene(9)
    masks = learned.segment(picture)
    found = masks.mask("disc")
    assert (found & (truth == 1)).sum() / (found | (truth == 1)).sum() > 0.85
    assert masks.labels.shape == masks.disagreement.shape == truth.shape
    assert sum(row["pixels"] for row in masks.rows()) == truth.size
    assert learned.recipe["labelled_pixels"] == 3 * truth.size
    strange = learned.segment(smooth_picture(0))  # blue, too
    assert strange.uncertainty > masks.uncertainty


def test_large_pictures_are_classified_smaller(learned):
    picture, _ = scene(9)
    small = learned.segment(picture, finest=16)
    assert small.labels.shape == small.disagreement.shape == (48, 64)
    whole = learned.segment(picture)
    assert (small.labels == whole.labels).mean() > 0.9


def test_results_are_written_by_suffix(learned, tmp_path):
    masks = learned.segment(scene(9)[0])
    masks.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), masks.labels)
    masks.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["classes"] == masks.rows()
    masks.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["labels"], masks.labels)
    masks.save(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "index,name,pixels,share"
    with pytest.raises(ds.InputError, match="blurred"):
        masks.save(tmp_path / "a.jpg")
    drawn = np.array(masks.draw())
    assert drawn.shape[0] > 48
    outside = np.array(masks.picture.image())
    far = masks.labels == 0
    far[1:-1, 1:-1] = (masks.labels == 0)[1:-1, 1:-1] & ~masks.mask("disc")[2:, 1:-1] & ~masks.mask("disc")[:-2, 1:-1]
    far[:, 1:-1] &= ~masks.mask("disc")[:, 2:] & ~masks.mask("disc")[:, :-2]
    assert (drawn[:48][far] == outside[far]).all(-1).mean() > 0.9  # the background is as it was, but for contours
    assert not (drawn[:48] == outside)[masks.mask("disc")].all()
    with pytest.raises(ds.InputError, match="no class 'dog'; there are background, disc"):
        masks.mask("dog")


def test_a_saved_classifier_is_the_same_and_knows_its_features(learned, tmp_path):
    learned.save(tmp_path / "c.safetensors")
    again = ds.FewShot.load(tmp_path / "c.safetensors", Colours())
    picture, _ = scene(4)
    one, two = learned.segment(picture), again.segment(picture)
    assert np.array_equal(one.labels, two.labels)
    assert one.uncertainty == two.uncertainty
    assert again.classes == learned.classes
    assert again.recipe == learned.recipe
    with pytest.raises(ds.InputError, match=r"trained on other features: stride differs"):
        ds.FewShot.load(tmp_path / "c.safetensors", Colours(stride=4))
    with pytest.raises(ds.InputError, match="does not say which model"):
        ds.FewShot.load(tmp_path / "c.safetensors")
    learned.save(tmp_path / "rgb.safetensors", "rgb", {"size": "64"})
    with pytest.raises(ds.InputError, match="other features"):
        ds.FewShot.load(tmp_path / "rgb.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ds.InputError, match=r"bad\.safetensors is damaged"):
        ds.FewShot.load(tmp_path / "bad.safetensors")
    with pytest.raises(ds.MissingError, match=r"no classifier .*none"):
        ds.FewShot.load(tmp_path / "none.safetensors")
    with pytest.raises(ds.InputError, match=r"saved as \.safetensors"):
        learned.save(tmp_path / "c.pt")


def test_paths_in_settings(tmp_path, monkeypatch):
    """Found from anywhere; what is no path, or names something embedded, stays as it is."""
    for name in ("sd", "edges", "seedling", "deep", "shown", "a@b"):
        (tmp_path / name).mkdir()
    for name in ("style.safetensors", "unet.pt", "words.json", "how.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    given = {
        "model": "sd+unet.pt", "control": ["edges@0.5", {"model": "owner/name", "image": "shown"}, "a@b"],
        "lora": {"path": "style.safetensors", "scale": 2}, "prompt": "@words.json", "join": ["sd@up.1", "seedling@mid", "rgb"],
        "amalgamate": "how.safetensors", "techniques": {"a": {"prompt": "caption:sd", "t": 3}, "b": {"prompt": "sd"}}, "t": 5,
    }  # fmt: skip
    at = str(tmp_path)
    found = absolute(given)
    assert found == {
        "model": f"{at}/sd+{at}/unet.pt", "control": [f"{at}/edges@0.5", {"model": "owner/name", "image": f"{at}/shown"},
        f"{at}/a@b"], "lora": {"path": f"{at}/style.safetensors", "scale": 2}, "prompt": f"@{at}/words.json",
        "join": [f"{at}/sd@up.1", "seedling@mid", "rgb"], "amalgamate": f"{at}/how.safetensors",
        "techniques": {"a": {"prompt": f"caption:{at}/sd", "t": 3}, "b": {"prompt": "sd"}}, "t": 5,
    }  # fmt: skip
    assert absolute({"model": "seedling", "amalgamate": "mean"}) == {"model": "seedling", "amalgamate": "mean"}
    recipe = write_recipe("deep/r.toml", "seedling", {"join": given["join"]})
    assert 'join = ["../sd@up.1", "seedling@mid", "rgb"]' in recipe.read_text()
    monkeypatch.chdir(tmp_path / "deep")
    assert absolute(read_recipe("r.toml").settings)["join"] == found["join"]
    assert missing(found) is None
    for name in ("unet.pt", "shown", "style.safetensors", "words.json", "how.safetensors", "sd"):
        (tmp_path / name).rename(tmp_path / "gone")
        assert missing(found) == f"{at}/{name}"
        (tmp_path / "gone").rename(tmp_path / name)


def test_models_that_lie_elsewhere_are_the_same_by_their_weights():
    one = {"model": "x/sd", "weights": "12", "dtype": "float32", "t": 5, "files": {"edges": "ab"}}
    one["control"] = [{"model": "edges", "image": "canny"}]
    two = {
        **one,
        "model": "/y/other",
        "files": {"/z/edges": "ab"},
        "control": [{"model": "/z/edges", "image": "canny"}],
    }
    assert differences(one, two) == []
    assert differences(one, {**two, "weights": "13"}) == ["weights"]
    assert differences(one, {**two, "files": {"/z/edges": "ac"}}) == ["files", "control"]
    assert differences(one, {**two, "dtype": "float16", "weights": "13"}) == ["model"]
    assert differences(one, {**two, "dtype": "float16", "weights": "13", "model": "/y/sd"}) == []
    assert differences({"model": "rgb", "stride": 8}, {"model": "sift", "stride": 8}) == ["model"]


def test_a_stopped_training_keeps_the_features_of_its_examples(tmp_path):
    examples = ds.Examples.of([scene(k) for k in range(3)])
    stages = []

    def stop(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    def note(stage, done, total):
        if stage != "training":
            stages.append((stage, done, total))

    model, quick = BASELINES["rgb"](size="64x48", stride=4), {"models": 2, "epochs": 1}
    with pytest.raises(KeyboardInterrupt):
        ds.FewShot.fit(model, examples, **quick, folder=tmp_path, report=stop)
    again = ds.FewShot.fit(model, examples, **quick, folder=tmp_path, report=note)
    assert stages == [("kept", 1, 3), ("kept", 2, 3), ("features", 3, 3)]
    assert again.ensemble.digest == ds.FewShot.fit(model, examples, **quick).ensemble.digest


def test_classes_too_small_for_the_grid_are_told():
    picture, labels = scene(0)
    labels = labels.copy()
    labels[0, :9] = 2
    examples = ds.Examples.of([(picture, labels)] * 3, ["background", "disc", "speck"])
    with pytest.warns(UserWarning, match="speck has fewer than 20 pixels in every example"):
        found = ds.FewShot.fit(Colours(), examples, models=1, epochs=1)
    assert 2 not in found.segment(picture).labels


# examples in folders


def saved_scene(folder, seed, name, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    picture, labels = scene(seed)
    picture.image().save(folder / f"{name}{suffix}")
    return labels


def as_array(labels, path):
    np.save(path, labels.astype(np.int64))


def as_grey(labels, path):
    Image.fromarray(labels).save(path)


def as_black_and_white(labels, path):
    Image.fromarray(labels * 255).save(path)


def as_one_bit(labels, path):
    Image.fromarray(labels * 255).convert("1").save(path)


def as_palette(labels, path):
    image = Image.fromarray(labels)
    image.putpalette([0, 0, 0, 200, 30, 30])
    image.save(path)


def as_colours(labels, path):
    Image.fromarray(np.array([(0, 0, 0), (200, 30, 30)], np.uint8)[labels]).save(path)


@pytest.mark.parametrize(
    ("place", "write"),
    [
        ("{}.npy", as_array),
        ("{}.png", as_grey),
        ("{}_mask.png", as_black_and_white),
        ("{}.mask.png", as_one_bit),
        ("masks/{}.png", as_palette),
        ("annotations/{}.png", as_colours),
        ("labels/{}.npy", as_array),
    ],
)
def test_masks_are_found_and_mean_the_same(tmp_path, place, write):
    truths = [saved_scene(tmp_path, k, f"photo {k}") for k in range(2)]
    for k, labels in enumerate(truths):
        path = tmp_path / place.format(f"photo {k}")
        path.parent.mkdir(exist_ok=True)
        write(labels, path)
    examples = ds.read_examples(tmp_path)
    assert len(examples) == len(examples.classes) == 2
    for example, truth in zip(examples.examples, truths, strict=True):
        assert np.array_equal(example.labels, truth)
    if write in (as_palette, as_colours):
        assert examples.classes.colours[1] == (200, 30, 30)


def test_png_pictures_in_images_with_their_own_names(tmp_path):
    labels = saved_scene(tmp_path / "images", 0, "a", ".png")
    (tmp_path / "masks").mkdir()
    as_grey(labels, tmp_path / "masks" / "a.png")
    saved_scene(tmp_path / "images", 1, "b", ".png")
    (tmp_path / "classes.txt").write_text("grass\nball\n")
    with pytest.warns(UserWarning, match="fewer examples|for want of a mask") as told:
        examples = ds.read_examples(tmp_path)
    assert sorted(str(one.message).split(";")[0][:30] for one in told) == [
        "1 picture in " + str(tmp_path / "images")[:17],
        "There are fewer examples (1) t",
    ]
    assert examples.classes.names == ("grass", "ball")


def test_colours_are_classes_by_their_names_or_in_order_black_first(tmp_path):
    colours = np.array([(0, 0, 255), (0, 0, 0), (255, 255, 0)], np.uint8)
    for k in range(3):
        saved_scene(tmp_path, k, f"{k}")
        labels = np.zeros((48, 64), int)
        labels[:20], labels[30:, :9] = 1, 2 if k else 0
        Image.fromarray(colours[labels]).save(tmp_path / f"{k}_mask.png")
    examples = ds.read_examples(tmp_path)
    assert examples.classes.names == ("background", "#0000ff", "#ffff00")
    assert examples.classes.colours == ((0, 0, 0), (0, 0, 255), (255, 255, 0))
    assert examples.examples[1].labels[0, 0] == 0
    assert examples.examples[1].labels[47, 0] == 2
    (tmp_path / "classes.json").write_text('{"#FFFF00": "sun", "#0000ff": "sky", "#000000": "night"}')
    examples = ds.read_examples(tmp_path)
    assert examples.classes.names == ("sun", "sky", "night")
    assert examples.examples[1].labels[47, 0] == 0
    (tmp_path / "classes.json").write_text('{"#0000ff": "sky", "#000000": "night"}')
    with pytest.raises(ds.InputError, match=r"1_mask\.png has the colour #ffff00, which classes\.json does not name"):
        ds.read_examples(tmp_path)


def test_pixels_to_ignore(tmp_path):
    labels = saved_scene(tmp_path, 0, "a") + 1
    labels[:5] = 9
    as_grey(labels, tmp_path / "a.png")
    with pytest.warns(UserWarning, match="fewer examples"):
        examples = ds.read_examples(tmp_path, ignore=9, names=["x", "grass", "ball"])
    assert (examples.examples[0].labels[:5] == -1).all()
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[:, :30], rgba[:, 30:50] = (255, 0, 0, 255), (0, 255, 0, 255)  # the rest is transparent
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="fewer examples"):
        examples = ds.read_examples(tmp_path)
    assert [int((examples.examples[0].labels == k).sum()) for k in (-1, 0, 1)] == [14 * 48, 30 * 48, 20 * 48]


def test_black_and_white_is_two_classes_also_in_arrays(tmp_path):
    truths = [saved_scene(tmp_path, k, f"{k}") for k in range(2)]
    for k, labels in enumerate(truths):
        np.save(tmp_path / f"{k}.npy", labels.astype(np.int64) * 255)
    examples = ds.read_examples(tmp_path)
    assert examples.classes.names == ("background", "object")
    assert all(np.array_equal(one.labels, labels) for one, labels in zip(examples.examples, truths, strict=True))
    grey = truths[0] * 255
    grey[:5] = 3
    as_grey(grey, tmp_path / "0_mask.png")
    (tmp_path / "0.npy").unlink()
    found = ds.read_examples(tmp_path, ignore=3).examples[0].labels
    assert (found[:5] == -1).all()
    assert np.array_equal(found[5:], truths[0][5:])


def drawn_large(times):
    """A disc and a triangle at 96 x 72, drawn so many times as large."""
    image = Image.new("L", (96 * times, 72 * times))
    pen = ImageDraw.Draw(image)
    pen.ellipse([20 * times, 14 * times, 57 * times, 50 * times], fill=255)
    pen.polygon([(66 * times, 8 * times), (90 * times, 33 * times), (68 * times, 62 * times)], fill=255)
    return image


@pytest.mark.parametrize(
    "mask",
    [
        drawn_large(1).filter(ImageFilter.GaussianBlur(1)),
        drawn_large(1).filter(ImageFilter.GaussianBlur(3)),
        drawn_large(2).resize((96, 72), Image.Resampling.BOX),
        drawn_large(4).resize((96, 72), Image.Resampling.LANCZOS),
    ],
    ids=["blurred", "much blurred", "drawn at twice the size", "drawn at four times the size"],
)
def test_grey_masks_with_smooth_edges_are_refused(tmp_path, mask):
    smooth_picture(1, 96, 72).image().save(tmp_path / "a.jpg")
    mask.save(tmp_path / "a_mask.png")
    with pytest.raises(ds.InputError, match=r"a_mask\.png has \d+ values.* without smooth edges"):
        ds.read_examples(tmp_path)


def test_numbers_that_all_have_names_are_classes_in_any_shape(tmp_path):
    smooth_picture(1, 96, 72).image().save(tmp_path / "a.jpg")
    shades = np.array(drawn_large(2).resize((96, 72), Image.Resampling.BOX))
    np.save(tmp_path / "a.npy", np.unique(shades, return_inverse=True)[1].reshape(shades.shape))
    with pytest.raises(ds.InputError, match="has 5 values, 3 of them only between others"):
        ds.read_examples(tmp_path)
    with pytest.warns(UserWarning, match="fewer examples"):
        assert ds.read_examples(tmp_path, names=list("abcde")).examples[0].labels.max() == 4


@given(st.integers(0, 10_000), st.integers(3, 150), st.booleans())
@settings(max_examples=25, deadline=None)
def test_many_classes_are_no_smooth_edges(seed, count, in_order):
    rng = np.random.default_rng(seed)
    places = rng.random((count, 2)) * [72, 96]
    if in_order:  # neighbours have neighbouring numbers
        places = places[np.argsort(places[:, 1])]
    y, x = np.mgrid[:72, :96]
    regions = ((y[..., None] - places[:, 0]) ** 2 + (x[..., None] - places[:, 1]) ** 2).argmin(2)
    _check_edges(regions.astype(np.uint8), Path("mask.png"))
    lines = np.where(cv2.Laplacian(regions.astype(np.float32), cv2.CV_32F) != 0, 255, regions)
    _check_edges(lines, Path("mask.png"))  # outlines that are left out


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda d: (d / "a.png").unlink(), "No picture in .* has a mask; put NAME.npy"),
        (lambda d: (d / "a.jpg").unlink(), "No picture in .* has a mask"),
        (lambda d: as_grey(np.zeros((9, 7), np.uint8), d / "a.png"), "a.jpg is 7x9 but the picture 64x48"),
        (lambda d: as_grey(np.zeros((48, 64), np.uint8), d / "a.png"), "only class 0; label at least two"),
        (lambda d: as_grey(np.full((48, 64), 255, np.uint8), d / "a.png"), r"no class, only what is left out \(255\)"),
        (lambda d: np.save(d / "a.npy", np.full((48, 64), 255)), r"no class, only what is left out \(255\)"),
        (lambda d: (d / "a.png").write_bytes(b"?"), "a.png is not an image"),
        (lambda d: np.save(d / "a.npy", np.full((48, 64), 0.5)), "a.npy must hold whole numbers, not float64"),
        (lambda d: np.save(d / "a.npy", np.full((48, 64), np.nan)), "a.npy must hold whole numbers"),
        (
            lambda d: np.save(d / "a.npy", np.full((48, 64), 300)),
            "a.npy has class numbers from 300 to 300; use 0 to 254",
        ),
        (lambda d: np.save(d / "a.npy", np.zeros((48, 64, 5))), r"must be \[height, width\]"),
        (lambda d: (d / "a.npy").write_bytes(b"?"), "a.npy is no array"),
        (lambda d: Image.open(d / "a.jpg").save(d / "a.png"), "a.png has .* colours; a mask has one flat colour"),
        (lambda d: (d / "classes.txt").write_text("grass\n"), "a.jpg has class 1, which is beyond the 1 name "),
        (lambda d: (d / "classes.json").write_text("{"), "classes.json is not understood"),
    ],
)
def test_wrong_examples_are_told(tmp_path, spoil, sentence):
    as_grey(saved_scene(tmp_path, 0, "a"), tmp_path / "a.png")
    spoil(tmp_path)
    with pytest.raises(ds.DenoscopeError, match=sentence):
        ds.read_examples(tmp_path)


def test_folders_without_anything_are_told(tmp_path):
    with pytest.raises(ds.MissingError, match="no folder .*none"):
        ds.read_examples(tmp_path / "none")
    with pytest.raises(ds.MissingError, match="no pictures in"):
        ds.read_examples(tmp_path)


def test_classes_have_colours_of_their_own():
    many = Classes.numbered(255)
    assert len(set(many.colours)) == 255
    assert Classes.from_dict(json.loads(json.dumps(many.to_dict()))) == many
    assert Classes.of(["sky", "road"]).background is False
    with pytest.raises(ds.InputError, match="1 to 255 classes"):
        Classes.numbered(256)
    picture = smooth_picture(1)
    assert np.array_equal(
        np.array(overlay(picture, np.zeros((56, 72), np.int16), Classes.of(["background", "a"]))),
        np.array(picture.image()),
    )
