"""Spaces of hyperparameters: what may be in one, all points of a grid, and points that are drawn."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.recipes.spaces import PUBLISHED, Range, check_space, drawn_point, grid_points, read_space

MIXED = {
    "learning_rate": Range(1e-5, 1e-3, log=True),
    "num_train_epochs": Range(2, 4),
    "schedule": ["linear", "cosine", "constant"],
}


def test_the_published_grid_has_18_points():
    found = grid_points(PUBLISHED)
    assert len(found) == 18
    assert found[0] == {"per_device_train_batch_size": 16, "learning_rate": 5e-5, "num_train_epochs": 2}
    assert found[-1] == {"per_device_train_batch_size": 32, "learning_rate": 2e-5, "num_train_epochs": 4}
    assert len({tuple(point.items()) for point in found}) == 18


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=15), st.integers(0, 5))
def test_a_drawn_point_is_in_the_space_and_always_the_same(scores, seed):
    tried = []
    for score in scores:
        tried.append((drawn_point(MIXED, tried, seed, 5), score))
    point = drawn_point(MIXED, tried, seed, 5)
    assert point == drawn_point(MIXED, tried, seed, 5)
    assert list(point) == list(MIXED)
    assert 1e-5 <= point["learning_rate"] <= 1e-3
    assert point["num_train_epochs"] in (2, 3, 4)
    assert isinstance(point["num_train_epochs"], int)
    assert point["schedule"] in MIXED["schedule"]


def test_points_are_drawn_where_others_scored():
    """The optimum of a smooth score: the later points lie nearer to it than the first, random ones."""
    tried = []
    for _ in range(40):
        point = drawn_point(MIXED, tried, 3, 10)
        distance = abs(math.log10(point["learning_rate"]) + 4) + (point["schedule"] != "cosine")
        tried.append((point, -distance))
    distances = [-score for _, score in tried]
    assert sum(distances[-10:]) < sum(distances[:10]) / 2


@pytest.mark.parametrize(
    ("space", "grid", "message"),
    [
        ({"learning_rte": [1e-5]}, True, r"the space has 'learning_rte', .*did you mean learning_rate"),
        ({"learning_rate": []}, True, r"learning_rate has no values to try"),
        ({"learning_rate": [1e-5, 1e-5]}, True, r"learning_rate has a value twice: 1e-05, 1e-05"),
        ({"learning_rate": Range(1e-5, 1e-4)}, True, r"has a range, which only a search with a number of trials"),
        ({"learning_rate": Range(1e-4, 1e-5)}, False, r"a range from 0.0001 to 1e-05, expected low < high"),
        ({"weight_decay": Range(0, 1, log=True)}, False, r"a range from 0 to 1, expected 0 < low < high"),
        ({}, True, r"there is nothing to vary"),
    ],
)
def test_what_cannot_be_searched_says_so(space, grid, message):
    with pytest.raises(ValueError, match=message):
        check_space(space, grid=grid)


def test_a_space_from_a_file(tmp_path):
    file = tmp_path / "space.toml"
    file.write_text("learning_rate = { low = 1e-5, high = 1e-3, log = true }\nnum_train_epochs = [2, 3]\n")
    assert read_space(file) == {"learning_rate": Range(1e-5, 1e-3, log=True), "num_train_epochs": [2, 3]}
    for text, message in (
        ("learning_rate = 1e-5", r"space.toml: learning_rate is 1e-05, expected a list of values, or low, high"),
        ("learning_rate = { low = 'a', high = 2 }", r"learning_rate goes from 'a' to 2, expected numbers"),
        ("learning_rate = x", r"space.toml is not TOML: .*line 1"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_space(file)
