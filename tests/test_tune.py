"""The search: what it spends, what it finds, that it resumes, and what its three tasks measure."""

import csv
import json
import random
from collections.abc import Hashable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import GOLDEN, smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import Patches, textured

import denoscope as ds
from denoscope.benchmarks.pairs import Pairs, open_pairs
from denoscope.benchmarks.protocol import Item
from denoscope.benchmarks.running import FeatureStore, Method, evaluate
from denoscope.benchmarks.spair import SPair
from denoscope.benchmarks.tune import tune
from denoscope.benchmarks.tune_reading import Arm, counted_rows
from denoscope.benchmarks.tune_tasks import MasksTask, PairsTask, UnlabelledTask, ridge
from denoscope.benchmarks.tuned import Setting, choose
from denoscope.denoisers.unet import UNetDenoiser
from denoscope.encoders.vision import VisionEncoder
from denoscope.errors import InputError, MissingError
from denoscope.features.baselines import BASELINES
from denoscope.features.loading import load_extractor
from denoscope.features.recipes import write_recipe
from denoscope.features.shift import content_shift
from denoscope.segmentation import Examples

SPAIR = GOLDEN / "dift-eval" / "SPair-71k"


@pytest.fixture(scope="module")
def tiny():
    """A pixel-space model of random weights: t 20, up.0, ensemble 2 are its preset."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=16, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4,
                                 down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)  # fmt: skip
    schedule = ds.NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    model = UNetDenoiser(unet.eval().requires_grad_(False), schedule)
    model.presets = {"semantic": {"t": 20, "site": "up.0", "ensemble": 2, "size": "long16"}}
    return model


class Planted:
    """Items with a picture each, whose score is known for every setting: a bias for the item, and what `quality` says."""

    metric, weak = "quality", False

    def __init__(self, quality, count=8, noise=0.0):
        self.quality, self.noise = quality, noise
        self.seen = [smooth_picture(i, 24, 20) for i in range(count)]
        self.stop_after = None

    def describe(self):
        return {"task": "planted", "noise": self.noise}

    @property
    def units(self):
        return len(self.seen)

    def items(self, chosen):
        return [Item(f"item {i}", "", i) for i in chosen]

    def names(self, item) -> list[Hashable]:
        return [item.data]

    def pictures(self, item):
        return [self.seen[item.data]]

    def evaluate(self, item, features, companions):
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt
        fm = features(self.seen[item.data])
        draw = np.random.default_rng([item.data, fm.recipe["t"], len(fm.recipe["site"])]).normal()
        return {"score": self.quality(fm.recipe["t"], fm.recipe["site"]) + 10 * item.data + self.noise * draw}

    def companions(self, techniques):
        return {}

    def value(self, record, plain):
        return record["score"]


def peak(t, site):
    return 50 - abs(t - 200) / 10 - (5 if site != "mid" else 0)


GRID = {"times": [0, 100, 200, 300, 400, 500], "sites": ["mid", "up.0", "up.1"]}


def test_the_search_finds_what_was_planted_and_says_how_it_compares(tiny, tmp_path):
    task = Planted(peak, noise=0.5)
    with counted_rows(tiny) as counter:
        found = tune(tiny, task, budget=70, **GRID, exhaustive=True, out=tmp_path)
    assert (found.choice.t, found.choice.site, found.choice.technique) == (200, "mid", "plain")
    assert found.verdict == "better"
    assert found.settings == {"preset": "semantic", "site": "mid", "t": 200, "ensemble": 1}
    change, low, high = found.gain
    assert low is not None
    assert high is not None
    assert 0 < low < change < high
    assert change == pytest.approx(23, abs=1.5)
    assert "is better than the preset (t 20, up.0, ensemble 2)" in found.sentence
    told = found.exhaustive
    assert told is not None
    assert (told["rank"], told["regret"]) == (1, 0)
    assert told["rows"] == 7 * 8
    assert found.rows <= 70
    assert counter.rows > found.rows  # the exhaustive part is on top
    # fewer items for what was dropped early
    halves = {cell["t"]: cell["items"] for cell in found.cells if cell["ensemble"] == 1 and cell["site"] == "mid"}
    assert halves[200] == found.items == 8


@pytest.mark.parametrize("ensembles", [(1,), (2, 3)])
def test_rows_are_counted_exactly_and_never_exceed_the_budget(tiny, tmp_path, ensembles):
    spent = []
    for budget in (30, 70, 130):
        with counted_rows(tiny) as counter:
            try:
                found = tune(
                    tiny, Planted(peak, noise=2), budget=budget, **GRID, ensembles=ensembles, out=tmp_path / str(budget)
                )
            except InputError as error:
                needed = int(str(error).split("takes ")[1].split(" ")[0])
                assert needed > budget
                assert counter.rows == 0
                tune(tiny, Planted(peak), budget=needed, **GRID, ensembles=ensembles)
                assert counter.rows <= needed
                continue
        assert counter.rows == found.rows <= budget
        spent.append(found.items)
    assert spent == sorted(spent)
    assert spent[-1] > 3


def test_a_stopped_search_goes_on_and_reads_nothing_twice(tiny, tmp_path):
    grid = {**GRID, "ensembles": (1, 2), "budget": 90}
    with counted_rows(tiny) as whole:
        expected = tune(tiny, Planted(peak, noise=2), **grid, out=tmp_path / "a")
    task, rows = Planted(peak, noise=2), 0
    for stop in (20, 3, None):
        task.stop_after = stop
        with counted_rows(tiny) as part:
            if stop is None:
                found = tune(tiny, task, **grid, out=tmp_path / "b")
            else:
                with pytest.raises(KeyboardInterrupt):
                    tune(tiny, task, **grid, out=tmp_path / "b")
        rows += part.rows
    assert rows == whole.rows == expected.rows
    assert found.to_dict() == expected.to_dict()
    with counted_rows(tiny) as again:
        assert tune(tiny, task, **grid, out=tmp_path / "b").to_dict() == expected.to_dict()
    assert again.rows == 0
    assert not list((tmp_path / "b").rglob("*.safetensors"))


def test_what_nothing_beats_is_kept_and_ties_go_to_fewer_rows(tiny):
    own = tune(tiny, Planted(lambda t, site: 60 if (t, site) == (20, "up.0") else 50), budget=300, **GRID)
    assert own.choice == Setting("plain", 20, "up.0", 1, 1)
    assert own.verdict == "cheaper"
    assert "for 1 instead of 2 rows" in own.sentence
    same = tune(tiny, Planted(peak, noise=0), budget=300, times=[20], sites=["up.0"], ensembles=(2,))
    assert same.choice == same.preset
    assert same.verdict == "keep"
    assert same.sentence.startswith("Keep the preset (t 20, up.0, ensemble 2)")
    worse = tune(
        tiny, Planted(lambda t, site: -float(t), noise=0), budget=300, times=[500], sites=["mid"], ensembles=(2,)
    )
    assert (worse.verdict, worse.choice) == ("keep", worse.preset)


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_the_choice_is_never_worse_than_chance_nor_dearer_than_the_best(seed, count, many):
    rng = np.random.default_rng(seed)
    values = {
        Setting("plain", t, "mid", 1, int(rng.integers(1, 9))): rng.normal(rng.normal(), 1, count) for t in range(many)
    }
    choice = choose(values)
    best = max(values, key=lambda setting: values[setting].mean())
    assert choice.rows <= best.rows
    assert choice == best or choice.rows < best.rows
    assert choose(dict.fromkeys(values, values[best])).rows == min(s.rows for s in values)


def test_values_are_those_of_the_benchmark(tiny, tmp_path):
    """At every ensemble, and for joined sites: nested members and shared batches change nothing."""
    task = PairsTask(open_pairs(SPAIR), limit=4)
    sites = ["up.0", "down.1+up.0"]
    found = tune(tiny, task, budget=200, times=[0], sites=sites, ensembles=(1, 3), sizes=["long24"], out=tmp_path / "t")
    cells = [cell for cell in found.cells if cell["items"] == 4]
    assert {cell["ensemble"] for cell in cells} == {1, 2, 3}
    benchmark = SPair(SPAIR, alphas=(0.1,), thresholds=("bbox",))
    for cell in cells:
        told = {key: cell[key] for key in ("t", "site", "ensemble")}
        told |= {"size": "long24"} if "long24" in cell["technique"] else {}
        store = FeatureStore(ds.as_extractor(tiny, **told))
        method = Method("one", lambda item, store=store: benchmark.run(item, store), store.settings)
        row = evaluate(benchmark, [method], tmp_path / "b", limit=4).rows["one"][0]
        assert cell["value"] == pytest.approx(row["bbox@0.1"], abs=1e-9)


@pytest.mark.parametrize(
    ("technique", "rows"),
    [
        ({"prompt": "a cat"}, 1),
        ({"guidance": 2.0, "prompt": "a cat"}, 2),
        ({"second_t": 30}, 2),
        ({"size": "64+72"}, 2),
        ({"denoise_from": 24}, None),
        ({"img2img": 0.1}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:Denoising without")
def test_what_a_technique_takes_is_known_beforehand(sd, tmp_path, technique, rows):
    base = {"size": "64", "t": 20, **technique}
    t = base.pop("t")
    arm = Arm.of(sd, "it", t, 0, **base)
    assert rows in (arm.rows, None)
    with counted_rows(sd) as counter:
        arm.extractor(smooth_picture(1, 64, 64))
    assert counter.rows == arm.rows if rows else 1 < counter.rows <= arm.rows


def test_techniques_are_compared_and_end_in_the_recipe(sd, tmp_path):
    task = PairsTask(open_pairs(SPAIR), limit=3)
    told = {"words": {"prompt": "a photo of a cat"}, "both": {"second_t": 60, "img2img": 0.05}}
    with counted_rows(sd) as counter:
        found = tune(sd, task, budget=400, times=[20], sites=["up.1"], techniques={"plain": {"size": "64"}, **told},
                     prompt="a photo", preset="temporal", out=tmp_path)  # fmt: skip
    assert counter.rows == found.rows <= 400
    assert {cell["technique"] for cell in found.cells} >= {"plain", "words", "both"}
    recipe = write_recipe(tmp_path / "r.toml", str(GOLDEN / "dift-sd" / "pipeline"), found.settings)
    from denoscope.features.recipes import read_recipe

    file = read_recipe(recipe)
    extractor = load_extractor(file.model, "cpu", **file.settings)
    assert extractor.recipe.prompt in ("a photo", "a photo of a cat")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="leave it out"):
        tune(sd, task, budget=400, techniques={"late": {"t": 400}})


def labelled(count, classes=3):
    """Pictures of three colours in blocks, and where they are."""
    found = []
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])
    for seed in range(count):
        rng = np.random.default_rng(seed)
        labels = np.kron(rng.permuted(np.arange(6) % classes).reshape(2, 3), np.ones((16, 16))).astype(int)
        noise = rng.integers(-25, 25, (*labels.shape, 3))
        found.append((ds.read((colours[labels] + noise).astype(np.uint8)), labels))
    return Examples.of(found)


def test_masks_score_features_by_what_they_tell_apart():
    task = MasksTask(labelled(5), folds=2)
    items = task.items(range(5))
    colour = Patches(stride=1, reach=0)

    def colours(picture):
        return ds.FeatureMap(picture.pixels, colour(picture).frame)

    good, bad = (
        np.mean([task.evaluate(item, f, {})["score"] for item in items])
        for f in (colours, BASELINES["position"](stride=4))
    )
    assert good > 97
    assert bad < 60
    # nothing of a picture that is scored was trained on, and fewer pictures make other items
    assert all(item.data[0] not in item.data[1] for item in items)
    assert not {item.key for item in task.items(range(3))} & {item.key for item in items}


def test_ridge_regression_is_the_same_in_both_forms():
    torch.manual_seed(0)
    x, y = torch.randn(40, 12).double(), torch.arange(40) % 3
    primal, mean = ridge(x, y, 3, 0.1)
    dual, _ = ridge(torch.cat([x, torch.zeros(40, 60).double()], 1), y, 3, 0.1 * 6)  # the mean variance is a sixth
    assert torch.allclose(primal[:-1], dual[:12], atol=1e-9)
    assert torch.allclose(primal[-1], torch.full((3,), 1 / 3).double(), atol=1e-9)
    doubled = torch.cat([x, x[y == 0]]), torch.cat([y, y[y == 0]])  # classes weigh alike, however many pixels they have
    assert torch.allclose(ridge(*doubled, 3, 0.1)[0], primal, atol=1e-9)
    assert mean.shape == (12,)


def test_positions_are_not_consistent_by_way_of_a_cut_out():
    shown = [textured(3, 96, 80)] * 2  # the other picture shows the same, so that what looks alike can be found
    shown = [shown[0], ds.read(shown[0].pixels.roll((9, 5), (1, 2)))]
    task = UnlabelledTask(shown)
    items = task.items([0, 1])
    scores = {
        name: np.mean([task.evaluate(item, extract, {})["score"] for item in items])
        for name, extract in {"looks": Patches(), "position": BASELINES["position"]()}.items()
    }
    assert scores["looks"] > 70
    assert scores["position"] < 25
    cut = task.pictures(items[0])[2]
    assert cut.size == (58, 48)
    with pytest.raises(InputError, match="at least 2 pictures"):
        UnlabelledTask(shown[:1])


def test_content_shift_tells_techniques_apart_where_there_are_no_labels(sd):
    task = UnlabelledTask([smooth_picture(i, 64, 48) for i in range(2)], points=4)
    told = {"words": {"prompt": "a photo of a cat"}}
    with counted_rows(sd) as counter:
        found = tune(sd, task, budget=200, times=[20], sites=["up.1"], techniques={"plain": {"size": "64"}, **told},
                     preset="temporal", ensembles=(1, 2))  # fmt: skip
    assert counter.rows == found.rows <= 200
    assert found.weak
    assert "without labels" in found.sentence
    assert found.metric == "cycle consistency@0.1 and content shift"
    assert any("Between techniques content shift decides" in note for note in found.notes)
    assert found.recipe["search"]["draws"] == "shared between timesteps"
    record, plain = {"score": 40.0, "shift": 0.3}, {"score": 10.0, "shift": 0.2}
    assert task.value(record, plain) == pytest.approx(45)
    assert task.value(plain, plain) == 10
    assert task.value({"score": 40.0, "shift": None}, plain) == 40
    with pytest.raises(InputError, match="labelled items"):
        tune(sd, task, budget=200, holdout=0.5)
    with pytest.raises(InputError, match="does not fit cut-outs"):
        tune(sd, task, budget=200, techniques={"depth": {"control": {"model": "folder", "image": "depths"}}})


@pytest.mark.filterwarnings("ignore:Denoising without")
def test_short_denoising_is_searched_over_timesteps(sd, tmp_path):
    task = PairsTask(open_pairs(SPAIR), limit=2)
    told = {"plain": {"size": "64"}, "fixed": {"denoise_from": 22}, "above": {"denoise_from": "+2"}}
    grid = {"times": [20, 101], "sites": ["up.1"], "preset": "temporal", "budget": 400}
    with counted_rows(sd) as counter:
        found = tune(sd, task, **grid, techniques=told, sizes=["72"], exhaustive=True)
    assert counter.rows >= found.rows
    where = {(cell["technique"], cell["t"]) for cell in found.cells}
    assert {t for name, t in where if name == "above"} == {20, 101, 51} == {t for name, t in where if name == "plain"}
    assert {t for name, t in where if name.startswith("fixed")} == {20}
    assert {name for name, _ in where} >= {"fixed", "fixed, size 72", "above, size 72"}
    notes = [note for note in found.notes if "left out" in note]
    assert len(notes) == 1
    assert notes[0].startswith("'fixed' has denoise_from = 22, which starts below t = 101 and 51")
    assert found.recipe["search"]["techniques"]["above"] == {"denoise_from": "+2"}
    made = Arm.of(sd, "above", 101, 0, size="64", denoise_from="+2").extractor.describe()
    assert (made["denoise_from"], made["denoise_start"]) == ("+2", 103)
    with pytest.raises(
        InputError, match="The technique 'low' has denoise_from = 10, .* start higher, or relative to t"
    ):
        tune(sd, task, **grid, techniques={"low": {"denoise_from": 10}})
    with pytest.raises(InputError, match="The technique 'plain' has denoise_from = 30, which starts below t = 51"):
        tune(sd, task, **grid, techniques={"plain": {"denoise_from": 30}})
    with pytest.raises(InputError, match="The technique 'odd' at t = 20: second_t"):
        tune(sd, task, **grid, techniques={"odd": {"second_t": "late"}})


@pytest.mark.filterwarnings("ignore:Denoising without")
def test_the_anchor_is_read_where_it_says_whatever_plain_does(sd):
    task = UnlabelledTask([smooth_picture(i, 64, 48) for i in range(2)], points=4)
    told = {"plain": {"size": "64", "denoise_from": 55}, "words": {"prompt": "a photo of a cat"}}
    found = tune(sd, task, budget=800, times=[51], sites=["up.1"], techniques=told, preset="temporal")
    assert "content shift" in found.metric


@pytest.mark.parametrize("ensemble", [1, 2])
def test_content_shift_is_scored_for_each_draw(sd, tmp_path, ensemble):
    """As `denoscope shift` does: the mean of the scores, which is not the score of the mean."""
    pictures = [smooth_picture(i, 64, 48) for i in range(2)]
    seen = {}

    class Listening(UnlabelledTask):
        def evaluate(self, item, features, companions):
            record = super().evaluate(item, features, companions)
            if companions:
                own = features(self.pictures(item)[0])
                told = [own.recipe.get(key) for key in ("t", "site", "prompt")]
                seen[*told, item.data[0]] = record["shift"]
            return record

    task = Listening(pictures, points=4)
    told = {"plain": {"size": "64"}, "words": {"prompt": "a photo of a cat"}}
    with counted_rows(sd) as counter:
        found = tune(sd, task, budget=300, times=[51], sites=["up.1", "up.0+up.1"], techniques=told, preset="temporal",
                     ensembles=(ensemble, 3), out=tmp_path)  # fmt: skip
    assert counter.rows == found.rows
    measured = content_shift(
        sd,
        pictures,
        {"words": told["words"]},
        t=51,
        sites="up.1",
        draws=ensemble,
        settings={"size": "64", "preset": "temporal"},
    )
    for place, record in enumerate(measured.records):
        for row in record["rows"]:
            each = (np.array(row["anchor"]) - row["diff"]) / row["anchor"]
            prompt = None if row["technique"] == "plain" else "a photo of a cat"
            assert seen[51, "up.1", prompt, place] == pytest.approx(each.mean(), abs=1e-4)
            if ensemble > 1:
                whole = 1 - sum(row["diff"]) / sum(row["anchor"])
                assert abs(each.mean() - whole) > 1e-3
    with counted_rows(sd) as again:
        tune(sd, task, budget=300, times=[51], sites=["up.1", "up.0+up.1"], techniques=told, preset="temporal",
             ensembles=(ensemble, 3), out=tmp_path)  # fmt: skip
    assert again.rows == 0


def test_words_of_other_prompts_are_not_compared(sd, tmp_path):
    """Channels of attention.up_cross are words: for content shift the prompt has to be that of reference and anchor."""
    pictures = UnlabelledTask([smooth_picture(i, 64, 48) for i in range(2)], points=4)
    told = {"plain": {"size": "64"}, "words": {"prompt": "a photo of a cat"}, "late": {"second_t": 60}}
    grid = {"budget": 400, "times": [20], "sites": ["attention.up_cross", "up.1"], "preset": "temporal"}
    found = tune(sd, pictures, **grid, techniques=told)
    where = {(cell["technique"], cell["site"]) for cell in found.cells}
    assert {name for name, site in where if site == "attention.up_cross"} == {"plain", "late"}
    assert ("words", "up.1") in where
    notes = [note for note in found.notes if "left out" in note]
    assert len(notes) == 1
    assert "channels of attention.up_cross are the words of the prompt, so 'words' is left out there" in notes[0]
    # none has the anchor's empty prompt
    found = tune(sd, pictures, **grid, techniques=told, prompt="a photo")
    assert {cell["site"] for cell in found.cells} == {"up.1", found.preset.site}
    assert any("'plain', 'words', 'late' are left out there" in note for note in found.notes)
    # both pictures of a pair have the same prompt
    pairs = PairsTask(open_pairs(SPAIR), limit=2)
    labelled = tune(sd, pairs, **grid, techniques=told)
    assert ("words", "attention.up_cross") in {(cell["technique"], cell["site"]) for cell in labelled.cells}
    assert not any("left out" in note for note in labelled.notes)
    # but for captions
    names = {name for item in pairs.items([0, 1]) for name in (item.data.source, item.data.target)}
    (tmp_path / "words.json").write_text(json.dumps({Path(name).stem: "a cat" for name in names}))
    captioned = tune(sd, pairs, **grid, techniques={**told, "captions": {"prompt": f"@{tmp_path / 'words.json'}"}})
    assert ("captions", "attention.up_cross") not in {(cell["technique"], cell["site"]) for cell in captioned.cells}
    assert any("captions are other words for every picture" in note for note in captioned.notes)


def test_what_was_kept_aside_decides_and_few_items_decide_nothing(tiny):
    found = tune(tiny, Planted(peak, count=14, noise=0.5), budget=400, **GRID, holdout=0.43)
    assert found.items == 8
    assert found.holdout is not None
    assert (found.holdout["items"], found.holdout["shared"]) == (6, 0)
    assert found.verdict == "better"
    assert "on 6 items kept aside" in found.sentence
    assert found.gain[0] == pytest.approx(23, abs=1.5)
    few = tune(tiny, Planted(peak, count=5, noise=0.5), budget=400, **GRID)
    assert few.verdict == "cheaper"  # whatever five items say
    assert "5 items cannot show" in few.notes[0]
    with pytest.raises(InputError, match="keeps 1 of 4 items aside; .* as with 0.5"):
        tune(tiny, Planted(peak, count=4), budget=400, holdout=0.3)


def test_pictures_are_known_again_under_other_names(tiny):
    class Drawn(Planted):
        """Two items to a picture, each by a name of its own, as those of drawn pairs are."""

        def pictures(self, item):
            return [self.seen[item.data // 2]]

        def evaluate(self, item, features, companions):
            features(self.seen[item.data // 2])
            return {"score": 50.0 + item.data}

    found = tune(tiny, Drawn(peak, count=8), budget=200, times=[20], sites=["up.0"], holdout=0.5, exhaustive=True)
    order = list(range(8))
    random.Random("tune/0").shuffle(order)
    pictures = [{index // 2 for index in half} for half in (order[:4], order[4:])]
    assert found.holdout is not None
    assert found.exhaustive is not None
    assert found.holdout["shared"] == sum(index // 2 in pictures[0] for index in order[4:]) > 0
    assert "show pictures that were searched with" in found.notes[-1]
    assert found.exhaustive["rows"] == len(pictures[0]) < 4  # one timestep, ensemble 1


def test_encoders_have_sites_and_sizes(tmp_path):
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)
    tf.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    model = ds.load_encoder(tmp_path / "dino", device="cpu")
    assert isinstance(model, VisionEncoder)
    task = PairsTask(open_pairs(SPAIR), limit=3)
    with counted_rows(model) as counter:
        found = tune(model, task, budget=60, sites=["block.0", "block.1"], sizes=["56"], out=tmp_path / "o")
    assert counter.rows == found.rows <= 60
    assert found.choice.t is None
    assert set(found.settings) >= {"preset", "site"}
    assert "t" not in found.settings
    assert found.draw().width > 300
    with pytest.raises(InputError, match="sites and sizes only"):
        tune(model, task, budget=60, times=[1])


def test_results_are_saved_whole(tiny, tmp_path):
    found = tune(tiny, Planted(peak), budget=60, **GRID, techniques={"again": {"resample": "linear"}})
    saved = json.loads(found.save(tmp_path / "t.json").read_text())
    assert saved["choice"]["site"] == found.choice.site
    assert saved["verdict"] == found.verdict
    assert saved["recipe"]["versions"]["torch"] == torch.__version__
    rows = list(csv.DictReader(found.save(tmp_path / "t.csv").read_text().splitlines()))
    assert len(rows) == len(found.cells) == len(np.load(found.save(tmp_path / "t.npz"))["value"])
    assert ds.read(found.save(tmp_path / "t.png")).width > 300
    with pytest.raises(InputError, match="saved as"):
        found.save(tmp_path / "t.txt")


def test_a_search_that_takes_more_than_the_grid_says_why(tiny):
    found = tune(tiny, Planted(peak, 3), budget=60, times=[20], sites=["up.0"], ensembles=(1, 3), exhaustive=True)
    assert found.exhaustive is not None
    # one timestep: 3 rows a picture of the grid; besides 1 for the first comparison and 2 for the preset
    assert (found.rows, found.exhaustive["rows"]) == (18, 9)
    assert "The search took 18 rows; the grid alone takes 9." in found.comparison
    assert "the preset with its ensemble of 2, and the last two at every ensemble size." in found.comparison
    enough = tune(tiny, Planted(peak, 3), budget=60, times=[20], sites=["up.0"], ensembles=(2,), exhaustive=True)
    assert enough.comparison.endswith("takes 6.")


def test_the_heat_map_of_one_timestep_holds_its_title_and_frames(tiny):
    found = tune(tiny, Planted(peak, 3), budget=60, times=[20], sites=["up.0"])
    white = np.asarray(found.draw()).min(2) == 255
    assert white[:, :2].all()  # nothing is cut off at the sides
    assert white[:, -2:].all()
    orange = (np.abs(np.asarray(found.draw()).astype(int) - (0xD5, 0x5E, 0x00)).sum(2) < 40).sum(0)
    sides = np.flatnonzero(orange > 0.9 * orange.max())
    framed = np.split(sides, np.flatnonzero(np.diff(sides) > 1) + 1)
    assert min(map(len, framed)) >= 3  # 2 points of line at 120 dots an inch


def test_what_is_far_below_zero_leaves_the_colours_to_the_others(tiny):
    def colours(lowest):
        task = Planted(lambda t, site: {0: 30, 20: 10, 40: lowest}[t], count=2)
        found = tune(tiny, task, budget=60, times=[0, 20, 40], sites=["up.0"], ensembles=(2,))
        every, count = np.unique(np.asarray(found.draw()).reshape(-1, 3), axis=0, return_counts=True)
        return {tuple(every[k]) for k in np.argsort(count)[-4:]}  # three cells on white

    assert len(colours(-10)) == 4
    assert colours(-10) == colours(-500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": []}, "grid is empty"),
        ({"sites": []}, "grid is empty"),
        ({"sites": ["up.7"]}, "up.7"),
        ({"times": [1000]}, "Timestep 1000"),
        ({"ensembles": ()}, "whole numbers from 1"),
        ({"ensembles": (0,)}, "whole numbers from 1"),
        ({"budget": 3}, "takes "),
        ({"holdout": 1.0}, "between 0 and 1"),
        ({"preset": "artistic"}, "no preset"),
        ({"techniques": {"x": {"colour": 1}}}, "no setting 'colour'"),
        ({"techniques": {"x": {"ensemble": 4}}}, "says ensemble"),
    ],
)
def test_wrong_grids_are_refused(tiny, options, message):
    with pytest.raises(InputError, match=message):
        tune(tiny, Planted(peak), **{"budget": 100, **options})


def test_baselines_have_nothing_to_tune():
    with pytest.raises(InputError, match="no settings to search"):
        tune(BASELINES["rgb"](), Planted(peak), budget=100)


def pairs_file(folder, **changes):
    for name in ("a", "b"):
        smooth_picture(ord(name), 40, 30).image().save(folder / f"{name}.png")
    pair = {
        "source": "a.png",
        "target": "b.png",
        "source_points": [[3, 4], [20, 10]],
        "target_points": [[5, 5], [22, 12]],
    }
    pair = {key: value for key, value in {**pair, **changes}.items() if value is not None}
    (folder / "pairs.json").write_text(json.dumps([pair]))
    return folder / "pairs.json"


def test_pairs_of_ones_own(tmp_path):
    [item] = open_pairs(pairs_file(tmp_path)).items()
    assert item.data.threshold("img") == 40
    assert open_pairs(pairs_file(tmp_path)).columns == ["img@0.1", "img@0.1 point"]
    theirs = {"source": None, "target": None, "source_path": "a.png", "target_path": "b.png", "category": "cat"}
    boxed = open_pairs(pairs_file(tmp_path, **theirs, target_bounding_box=[2, 2, 27, 22]))
    [item] = boxed.items()
    assert (item.category, item.data.threshold("bbox")) == ("cat", 25)
    assert boxed.thresholds == ("bbox",)
    assert PairsTask(boxed).metric == "PCK@0.1 (bbox)"
    [item] = open_pairs(pairs_file(tmp_path, source_points=[[40, 30], [0, -1]])).items()  # as those that count from 1
    assert item.data.source_points.tolist() == [[39, 29], [0, 0]]
    bundled = ds.__path__[0] + "/photos/pairs.json"
    assert [item.category for item in open_pairs(bundled).items()] == ["faces", "cat"]


def test_pairs_without_a_category_have_no_row_of_their_own(tmp_path):
    entry = json.loads(pairs_file(tmp_path).read_text())[0]
    (tmp_path / "pairs.json").write_text(json.dumps([entry, {**entry, "category": "cat"}]))
    data = open_pairs(tmp_path / "pairs.json")
    items = data.items()
    rows = data.rows(items, [{"points": item.data.target_points.tolist()} for item in items])
    assert [(row["category"], row["count"]) for row in rows] == [("all", 2), ("cat", 1)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"source": None}, InputError, "names no source"),
        ({"source": "c.png"}, MissingError, "c.png"),
        ({"target_points": [[1, 2]]}, InputError, "2 source_points and 1"),
        ({"source_points": [[1, 2, 3]]}, InputError, "exactly two numbers"),
        ({"source_points": [[1, float("nan")], [1, 2]]}, InputError, "finite"),
        ({"target_box": [5, 5, 5, 9]}, InputError, "x2 > x1"),
        (
            {"source_points": [[3, 4], [9999, 9]]},
            InputError,
            r"pairs\.json, pair 0, source_points: Point 1 at \(9999, 9\)",
        ),
        ({"target_points": [[5, -3], [22, 12]]}, InputError, "pair 0, target_points: Point 0 at .* of 40x30 pixels"),
    ],
)
def test_wrong_pairs_are_named(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        open_pairs(pairs_file(tmp_path, **changes))


def test_files_that_hold_no_pairs(tmp_path):
    for text in ("[]", "{}", "[1]", "nothing"):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(InputError, match=r"p\.json"):
            Pairs(tmp_path / "p.json").pairs()
    with pytest.raises(MissingError):
        open_pairs(tmp_path / "none.json")
    with pytest.raises(MissingError, match="PairAnnotation"):
        PairsTask(open_pairs(tmp_path))
