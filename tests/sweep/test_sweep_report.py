"""What the report of a sweep says of made-up results."""

import re

import pytest

from jaxad import settings
from jaxad.sweep import Request
from jaxad.sweep.folder import TIMINGS
from jaxad.sweep.report import write_sweep_report

WHOLE = {1: (0.95, 0.97), 2: (0.9, 0.96)}
CASES = {
    "no spread": (
        {1: (0.5, 0.75), 2: (0.625, 0.875)},
        "Best mean image AUROC: 0.750 ± 1.588 with rate 2. "
        "That is +0.1250 against the base cell, the same with every seed: no spread to test.",
    ),
    "too few seeds": (
        {1: (0.6,), 2: (0.75,)},
        "Best mean image AUROC: 0.7500 with rate 2. That is +0.1500 against the base cell; too few seeds to test.",
    ),
    "a test": (
        {1: (0.6, 0.7, 0.8), 2: (0.7, 0.9, 1.1)},
        "Best mean image AUROC: 0.900 ± 0.497 with rate 2. "
        "That is +0.200 against the base cell, no more than chance explains (Holm-corrected p 0.074).",
    ),
    "the base": (WHOLE, "Best mean image AUROC: 0.960 ± 0.127 with rate 1. That is the base cell."),
    "a survivor": (
        {**WHOLE, 3: (0.999, None)},
        "Best mean image AUROC: 0.960 ± 0.127 with rate 1. That is the base cell.",
    ),
    "no cell is whole": (
        {1: (0.6, 0.7, None), 2: (None, 0.8, 1.0), 3: (1.0, None, None)},
        "Best mean image AUROC: 0.900 ± 1.271 with rate 2. It lacks the results of 1 of 3 seeds; no cell lacks fewer. "
        "That is +0.1000 against the base cell; too few seeds to test.",
    ),
    "no base": (
        {1: (None, None), 2: (0.7, 0.8)},
        "Best mean image AUROC: 0.750 ± 0.635 with rate 2. The base cell has no result with the same seeds.",
    ),
    "nothing": ({1: (None,), 2: (None,)}, "No cell has a defined image AUROC."),
}


def page_of(path, axes, values):
    """The report of image AUROCs by cell; the first cell is the base."""
    rows = [
        {**dict(zip(axes, cell, strict=True)), "seed": seed, "image_auroc": value, **dict.fromkeys(TIMINGS, 1)}
        for cell, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]
    request = Request(settings.Settings(method="toy"), seeds=tuple({row["seed"] for row in rows}))
    base = dict(zip(axes, next(iter(values)), strict=True))
    write_sweep_report(path, rows, request=request, axes=axes, metric="image_auroc", base=base)
    return path.read_text()


@pytest.mark.parametrize(("values", "expected"), CASES.values(), ids=CASES)
def test_the_lead_names_the_best_cell_and_how_sure_it_is(tmp_path, values, expected):
    page = page_of(tmp_path / "report.html", ["rate"], {(rate,): by_seed for rate, by_seed in values.items()})
    assert re.findall(r'<p class="lead">(.*?)</p>', page) == [expected]


def test_each_data_set_has_its_own_best_cell_and_base(tmp_path):
    easy, hard = {1: (0.99, 0.98), 2: (0.97, 0.9)}, {1: (0.5, 0.6), 2: (0.6, 0.6), 3: (0.7, None)}
    values = {("easy", rate): by_seed for rate, by_seed in easy.items()}
    values |= {("hard", rate): by_seed for rate, by_seed in hard.items()}
    page = page_of(tmp_path / "report.html", ["data", "rate"], values)
    (lead,) = re.findall(r'<ul class="lead">(.*?)</ul>', page)
    first, second = re.findall("<li>(.*?)</li>", lead)
    assert first == "Best mean image AUROC on easy: 0.985 ± 0.064 with rate 1. That is the base cell."
    assert second.startswith("Best mean image AUROC on hard: 0.600 ± 0.000 with rate 2. That is +0.050 against ")
    bold = re.findall(r'<tr class="best"><td>(\w+)</td><td class="num">(\d)</td>', page)
    assert bold == [("easy", "1"), ("hard", "2")]
    # each cell's line at its own base, hard ones first
    dashed = [float(x) for x in re.findall(r'<path d="M ([\d.]+) [\d.]+ *\nL \1 [^"]*"[^>]*dasharray', page)]
    assert len(dashed) == 5 and len(set(dashed[:3])) == len(set(dashed[3:])) == 1 and dashed[2] < dashed[3]


def test_data_sets_with_one_cell_each_have_a_mean_and_no_best(tmp_path):
    page = page_of(tmp_path / "report.html", ["data"], {("easy",): (0.75, 0.75), ("hard",): (0.5, 0.5)})
    (lead,) = re.findall(r'<ul class="lead">(.*?)</ul>', page)
    assert re.findall("<li>(.*?)</li>", lead) == [
        "Mean image AUROC on easy: 0.7500 ± 0.0000.",
        "Mean image AUROC on hard: 0.5000 ± 0.0000.",
    ]
    assert 'class="best"' not in page
