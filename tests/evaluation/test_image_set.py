"""Sets of images against each other: what every distance says, and that batches do not show."""

import pytest
import torch
import torch.nn.functional as F

from davae.data import open_dataset
from davae.evaluation.features import Features
from davae.evaluation.metrics.fid import frechet_distance
from davae.evaluation.metrics.image_set import ImageSet, compare_sets, swd_figures
from davae.evaluation.metrics.kid import unbiased_mmd
from davae.evaluation.metrics.names import current_name, current_names


class _Pooled:
    """Features that can be checked by hand: the image at 2 x 2, and three 'classes'."""

    name = "pooled"

    def describe(self):
        return {"network": "pooled"}

    def __call__(self, images):
        rows = F.adaptive_avg_pool2d(images, 2).flatten(1)
        return Features(rows, rows[:, :3])


@pytest.fixture(scope="module")
def scenes():
    dataset = open_dataset("procedural:24", resolution=32)
    return torch.stack([dataset[i]["image"] for i in range(24)])


def _blurred(images, width):
    kernel = torch.ones(3, 1, width, width) / width**2
    return F.conv2d(F.pad(images, (width // 2,) * 4, mode="reflect"), kernel, groups=3)


def test_equal_sets_are_at_distance_zero_and_blur_moves_them_apart(scenes):
    reference = ImageSet([_Pooled()]).update(scenes)
    same = compare_sets(ImageSet([_Pooled()]).update(scenes), reference).figures
    assert same["swd/finest"] == same["swd/mean"] == 0
    assert same["spectrum_db"] == 0
    assert same["fid/pooled"] == pytest.approx(0, abs=1e-6)
    assert same["precision/pooled"] == same["recall/pooled"] == 1
    found = [same]
    for width in (3, 5, 9):
        found.append(compare_sets(ImageSet([_Pooled()]).update(_blurred(scenes, width)), reference).figures)
    for name in ("swd/finest", "swd/mean", "spectrum_db", "fid/pooled", "kid/pooled"):
        values = [figures[name] for figures in found]
        assert values == sorted(values), name
    assert found[1]["swd/finest"] > 0.01


def test_one_kid_everywhere_is_that_of_all_images_where_a_subset_holds_them_all(scenes):
    sets = [ImageSet([_Pooled()]).update(images) for images in (_blurred(scenes, 9), scenes)]
    rows = [images.features["pooled"].rows.double() for images in sets]
    figures = compare_sets(*sets).figures
    assert figures["kid/pooled"] == pytest.approx(unbiased_mmd(*rows), rel=1e-9)
    assert figures["kid_std/pooled"] == pytest.approx(0, abs=1e-12)


def test_pyramid_levels_have_one_name_each():
    assert swd_figures({0: 0.3, 1: 0.2, 2: 0.1}) == {
        "swd/finest": 0.3,
        "swd/level1": 0.2,
        "swd/level2": 0.1,
        "swd/mean": pytest.approx(0.2),
    }


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ("swd", "swd/finest"),
        ("spectral_distance_128", "spectrum_db_128"),
        ("swd_upgraded", "swd_finest_upgraded"),
        ("psnr_128", "psnr_128"),
        ("swd/mean", "swd/mean"),
        ("held_out_loss_2", "held_out_loss_2"),
        ("", ""),
    ],
)
def test_names_of_earlier_runs_are_read_as_todays(earlier, today):
    assert current_name(earlier) == today
    assert current_names({earlier: 1.5}) == {today: 1.5}


def test_every_figure_is_the_same_in_batches(scenes):
    other = _blurred(scenes, 3) + 0.1
    whole = compare_sets(ImageSet([_Pooled()]).update(other), ImageSet([_Pooled()]).update(scenes))
    parts = compare_sets(
        ImageSet([_Pooled()]).extend(other.split(5)), ImageSet([_Pooled()]).extend(scenes.split([1, 16, 7]))
    )
    assert whole.unavailable == parts.unavailable == {}
    assert whole.figures.keys() == parts.figures.keys()
    for name, value in whole.figures.items():
        assert parts.figures[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_against_moments_alone_the_rest_is_named_as_missing(scenes):
    reference = ImageSet([_Pooled()], spatial=False).update(scenes).features["pooled"].gaussian()
    found = ImageSet([_Pooled()]).update(-scenes)
    message = compare_sets(found, reference)
    expected = frechet_distance(found.features["pooled"].gaussian(), reference)
    assert message.figures["fid/pooled"] == pytest.approx(expected)
    assert {
        "kid/pooled",
        "precision/pooled",
        "recall/pooled",
        "swd/finest",
        "swd/mean",
        "spectrum_db",
    } == message.unavailable.keys()
    assert "inception_score/pooled" in message.figures
