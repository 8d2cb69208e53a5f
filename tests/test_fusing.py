"""Joint features: weights, PCA of a pair, and the command line's spelling."""

from pathlib import Path

import pytest
import torch
from conftest import smooth_picture
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

import denoscope as ds
from denoscope.correspondence import transfer
from denoscope.features import BASELINES, Joined, Joint, concatenate, load_extractor, paired, reduce_together
from denoscope.features.loading import parse_join
from denoscope.images import Frame


def feature_map(
    seed: int, channels: int, width: int, height: int, picture: tuple[int, int] = (60, 40)
) -> ds.FeatureMap:
    values = torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed))
    return ds.FeatureMap(
        values, Frame.of(picture).resize((width, height)), {"model": f"m{channels}", "size": [width, height]}
    )


def unit(fm: ds.FeatureMap) -> torch.Tensor:
    return torch.nn.functional.normalize(fm.values.flatten(1), dim=0)


def test_cosine_is_the_weighted_mean_of_the_parts() -> None:
    one, two = ([feature_map(seed, 5, 6, 4), feature_map(seed + 9, 8, 6, 4)] for seed in (0, 1))
    joined = [concatenate(parts, [1, 0.5]) for parts in (one, two)]
    found = (unit(joined[0]) * unit(joined[1])).sum(0)
    parts = [(unit(a) * unit(b)).sum(0) for a, b in zip(one, two, strict=True)]
    assert torch.allclose(found, (parts[0] + 0.25 * parts[1]) / 1.25, atol=1e-6)
    alone = concatenate(one, [0, 3])
    assert torch.allclose(unit(alone)[5:], unit(one[1]), atol=1e-6)
    assert alone.values[:5].abs().max() == 0


def test_parts_of_other_grids_meet_on_the_finest() -> None:
    joined = Joined.of([feature_map(0, 5, 3, 2), feature_map(1, 4, 12, 8)])
    assert joined.values.shape == (9, 8, 12)
    assert joined.frame == Frame.of((60, 40)).resize((12, 8))
    assert joined.recipe["model"] == "m5+m4"
    assert joined.recipe["size"] == [[3, 2], [12, 8]]


def test_reduction_is_the_pca_of_both_pictures() -> None:
    """Inner products of the reduced cells are those of scikit-learn's scores (whose signs are arbitrary)."""
    maps = [Joined.of([feature_map(seed, 12, 6, 4)]) for seed in (3, 4)]
    reduced = reduce_together(maps, 5)
    cells = torch.cat([fm.parts[0].values.flatten(1).mT for fm in maps]).double().numpy()
    scores = torch.from_numpy(PCA(5).fit_transform(cells)).float()
    scores = torch.nn.functional.normalize(scores, dim=1)
    found = torch.cat([unit(fm).mT for fm in reduced])
    assert found.shape == (48, 5)
    assert torch.allclose(found @ found.mT, scores @ scores.mT, atol=1e-4)


def test_all_components_of_centred_parts_keep_every_cosine() -> None:
    one, two = (feature_map(seed, 6, 5, 4) for seed in (5, 6))
    mean = torch.cat([one.values.flatten(1), two.values.flatten(1)], 1).mean(1)[:, None, None]
    a, b = reduce_together([Joined.of([one]), Joined.of([two])], 99)
    centred = [torch.nn.functional.normalize((fm.values - mean).flatten(1), dim=0) for fm in (one, two)]
    assert torch.allclose(unit(a).mT @ unit(b), centred[0].mT @ centred[1], atol=1e-5)


def test_transfer_reduces_joint_features_and_no_others() -> None:
    picture, other = smooth_picture(0), smooth_picture(1)
    points = [(20, 20), (50, 30)]
    parts = [BASELINES["rgb"](size="96"), BASELINES["sift-fine"](size="72x56")]
    plain, reduced = Joint(parts), Joint(parts, pca=6)
    made = transfer(reduced(picture), reduced(other), points)
    one, two = reduce_together([reduced(picture), reduced(other)], 6)
    assert made.source.values.shape[0] == made.target.values.shape[0] == 12
    assert torch.equal(made.points, transfer(one, two, points).points)
    assert torch.equal(reduced(picture).values, plain(picture).values)
    whole = plain(picture), plain(other)
    assert paired(*whole) == whole
    found = ds.match(reduced, picture, other, points)
    assert torch.equal(found.points, made.points)
    assert found.recipe["pca"] == 6
    assert found.recipe["weights"] == [1, 1]


def test_joined_maps_are_saved_with_their_parts(tmp_path: Path) -> None:
    extract = Joint([BASELINES["rgb"](size="96"), BASELINES["sift-fine"](size="64")], [1, 2], pca=4)
    one, two = extract(smooth_picture(2)), extract(smooth_picture(3))
    again = [ds.FeatureMap.load(fm.save(tmp_path / f"{k}.safetensors")) for k, fm in enumerate((one, two))]
    assert all(isinstance(fm, Joined) for fm in again)
    assert torch.equal(again[0].values, one.values)
    assert again[0].recipe == one.recipe
    assert torch.equal(transfer(again[0], again[1], [(9, 9)]).scores, transfer(one, two, [(9, 9)]).scores)


def test_a_joint_of_models_says_all_that_decides_it() -> None:
    joint = load_extractor("rgb", join=["sift@@128", "position@@@0.5"], pca=3, preset="semantic", seed=0)
    said = joint.describe()
    assert joint.name == "rgb+sift+position"
    assert said["weights"] == [1, 1, 0.5]
    assert said["pca"] == 3
    assert [part["size"] for part in said["parts"]] == ["256", "128", None]
    assert isinstance(load_extractor("rgb", pca=3), Joint)


def test_a_diffusion_model_gives_every_site_of_the_pair(sd: ds.Denoiser) -> None:
    from denoscope.features import as_extractor

    settings = {"t": 20, "ensemble": 1, "size": "64"}
    parts = [as_extractor(sd, site=site, **settings) for site in ("up.1", "up.2")]
    picture = smooth_picture(4)
    joined = Joint(parts)(picture)
    alone = [part(picture) for part in parts]
    assert joined.values.shape[0] == sum(fm.values.shape[0] for fm in alone)
    fine = joined.values[alone[0].values.shape[0] :]
    assert torch.allclose(fine, torch.nn.functional.normalize(alone[1].values, dim=0), atol=1e-6)


def test_a_prompt_goes_to_those_who_take_one(sd: ds.Denoiser, adm: ds.Denoiser) -> None:
    from denoscope.features import as_extractor
    from denoscope.features.joint import takes_prompts

    told = as_extractor(sd, t=20, ensemble=1, size="64", site="up.1")
    joint = Joint([told, as_extractor(adm, t=20, ensemble=1, size="64", site="out.4"), BASELINES["rgb"]()])
    picture = smooth_picture(5)
    assert takes_prompts(joint)
    assert not takes_prompts(Joint(joint.parts[1:]))
    one, two = joint(picture, "a photo of a cat"), joint(picture)
    assert torch.equal(one.parts[0].values, told(picture, "a photo of a cat").values)
    assert not torch.equal(one.parts[0].values, two.parts[0].values)
    assert torch.equal(one.parts[1].values, two.parts[1].values)


def test_wrong_joints() -> None:
    one, two = BASELINES["rgb"](), BASELINES["sift"]()
    with pytest.raises(ds.InputError, match="nothing to join"):
        Joint([])
    with pytest.raises(ds.InputError, match="2 parts need 2 weights, not 1"):
        Joint([one, two], [1])
    with pytest.raises(ds.InputError, match="not negative and not all 0"):
        Joint([one, two], [0, 0])
    with pytest.raises(ds.InputError, match="at least 1 component"):
        Joint([one, two], pca=0)
    with pytest.raises(ds.InputError, match="joined already"):
        Joint([Joint([one]), two])
    with pytest.raises(ds.InputError, match="same parts"):
        reduce_together([Joined.of([feature_map(0, 4, 3, 2)]), Joined.of([feature_map(0, 5, 3, 2)])], 2)
    with pytest.raises(ds.InputError, match="maps of one picture"):
        Joined.of([feature_map(0, 4, 3, 2), feature_map(0, 4, 3, 2, (61, 40))])


NAMES = st.text("abcdefghij-/.", min_size=1).filter(lambda text: "/" not in text[:1])


@given(model=NAMES, site=st.text("abc.12"), size=st.text("long0123456789x+"), weight=st.none() | st.integers(0, 99))
def test_join_reads_what_it_writes(model: str, site: str, size: str, weight: int | None) -> None:
    text = f"{model}@{site}@{size}@{'' if weight is None else weight / 10}"
    expected = model, site or None, size or None, 1.0 if weight is None else weight / 10
    assert parse_join(text) == expected


def test_what_join_does_not_understand() -> None:
    for wrong in ("", "@up.1", "a@b@c@1@2", "a@b@c@heavy"):
        with pytest.raises(ds.InputError):
            parse_join(wrong)
