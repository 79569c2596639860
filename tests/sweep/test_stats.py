"""Statistics of a sweep against examples worked by hand."""

import math

import numpy as np
import pytest

from jaxad.sweep import stats


def test_an_interval_worked_by_hand():
    # 2, 4, 6: mean 4, variance ((-2)^2 + 0 + 2^2) / 2 = 4, t(0.975; 2) = 4.302653: 4.302653 * 2 / sqrt(3) = 4.968275
    assert stats.summarise([2, 4, 6]) == pytest.approx((3, 4, 2, 4.968275), rel=1e-6)


def test_what_is_not_finite_is_left_out_and_one_value_has_no_interval():
    summary = stats.summarise([2.0, math.nan, 6.0, math.inf])
    assert summary[:2] == (2, 4.0)
    one = stats.summarise([0.5, math.nan])
    assert one.number == 1 and one.mean == 0.5 and math.isnan(one.half)
    assert math.isnan(stats.summarise([]).mean)


def test_a_paired_test_worked_by_hand():
    # Differences 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3) = 3.4641 with 2 degrees of freedom.
    # With 2 degrees P(|T| > t) = 1 - t / sqrt(2 + t^2) = 1 - 3.4641 / sqrt(14) = 0.0741799
    a, b = np.array([4.0, 7.0, 9.0]), np.array([3.0, 5.0, 6.0])
    assert stats.paired_p(a, b) == pytest.approx(0.0741799, rel=1e-5)
    assert stats.paired_p(a, a) == 1.0 and math.isnan(stats.paired_p(a, a - 0.1))
    assert math.isnan(stats.paired_p(a[:1], b[:1]))


def test_holms_correction_worked_by_hand():
    # 0.01 x 4, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.04 x 1 = 0.04 -> not below the one before: 0.06
    assert stats.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.5, math.nan, 0.9])[0] == 1.0
    assert math.isnan(stats.holm([0.5, math.nan])[1]) and stats.holm([0.5, math.nan])[0] == 0.5


ROWS = [
    {"rate": rate, "items": items, "seed": seed, "auroc": value}
    for rate, items, values in [(1, 10, (0.5, 0.7)), (1, 20, (0.6, 0.6)), (2, 10, (0.7, 0.9)), (2, 20, (0.9, None))]
    for seed, value in enumerate(values)
]


def test_cells_are_compared_seed_by_seed():
    cells = stats.cells_of(ROWS, ("rate", "items"), "auroc")
    assert list(cells) == [(1, 10), (1, 20), (2, 10), (2, 20)] and math.isnan(cells[2, 20][1])
    found = stats.compare(cells, [((2, 10), (1, 10)), ((2, 20), (1, 20)), ((1, 20), (1, 10))])
    assert found[0].summary.mean == pytest.approx(0.2) and found[0].summary.number == 2
    assert found[1].summary.number == 1 and math.isnan(found[1].p)
    # differences 0.1 and -0.1: mean 0, t = 0, p = 1
    assert found[2].summary.mean == pytest.approx(0) and found[2].p == pytest.approx(1)
    assert math.isnan(found[0].p) and found[2].p_holm == found[2].p  # 0.2 and 0.2 have no spread to test
    # 0.6 and 0.8 with one another: reversed order changes the sign only
    assert stats.compare(cells, [((1, 10), (2, 10))])[0].summary.mean == pytest.approx(-0.2)


def test_main_effects_average_each_seed_over_the_other_axes():
    cells = stats.cells_of(ROWS, ("rate", "items"), "auroc")
    effects = stats.main_effects(cells, ("rate", "items"))
    (first, one), (second, two) = effects["rate"]
    # rate 1: seed 0 (0.5 + 0.6) / 2, seed 1 (0.7 + 0.6) / 2; rate 2: seed 1 lacks a cell and is left out
    assert (first, second) == (1, 2) and one.number == 2 and one.mean == pytest.approx(0.6)
    assert two.number == 1 and two.mean == pytest.approx(0.8)
    assert [summary.number for _, summary in effects["items"]] == [2, 1]
    assert stats.main_effects(stats.cells_of(ROWS[:2], ("rate",), "auroc"), ("rate",)) == {}


def test_the_best_cell_has_the_highest_mean_of_those_with_the_most_seeds():
    cells = stats.cells_of(ROWS, ("rate", "items"), "auroc")
    assert stats.best_cell(cells) == (2, 10)  # (2, 20) has 0.9, from the seed that did not diverge
    one_left = {(1,): {0: 0.5, 1: math.nan}, (2,): {0: math.nan, 1: math.nan}, (3,): {0: math.nan, 1: 0.6}}
    assert stats.best_cell(one_left) == (3,)
    assert stats.best_cell({(1,): {0: math.nan}}) is None and stats.best_cell({}) is None


def test_only_cells_of_one_data_set_are_alternatives():
    cells = {("easy", 1): {0: 0.9}, ("hard", 1): {0: 0.5}, ("easy", 2): {0: 0.8}, ("hard", 2): {0: 0.6}}
    parts = stats.data_sets(cells, ("data", "rate"))
    assert [list(part) for part in parts] == [[("easy", 1), ("easy", 2)], [("hard", 1), ("hard", 2)]]
    assert [stats.best_cell(part) for part in parts] == [("easy", 1), ("hard", 2)]
    assert stats.data_sets({(1,): {0: 0.9}}, ("rate",)) == [{(1,): {0: 0.9}}]
