"""report.html: what it says, what it draws, and how a browser shows it at desk and phone width."""

import base64
import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxad import report
from jaxad.report import plots, words
from jaxad.report.pictures import _CYAN, fit_to

HOSTILE = "test/<script>alert(\"1\")</script> & '日本'.png"


def texture(rng, size, channels):
    """Woven-looking uint8 image (size, size, channels)."""
    across, down = np.meshgrid(np.arange(size), np.arange(size))
    weave = 120 + 40 * np.sin(across * 0.7) * np.sin(down * 0.7) + rng.normal(0, 12, (size, size))
    return np.clip(weave[..., None] * np.linspace(1, 0.7, channels), 0, 255).astype(np.uint8)


def samples(normal, anomalous, *, size=96, channels=3, masks=True, labels=True, seed=1):
    """Scored pictures with a blot on the anomalous ones; some are missed, some normal ones are flagged."""
    rng = np.random.default_rng(seed)
    found, last = [], normal + anomalous - 1
    for i in range(normal + anomalous):
        label = int(i >= normal)
        image, mask = texture(rng, size, channels), np.zeros((size, size), np.uint8)
        level = 0.01 * (1 + 0.1 * rng.random((size, size)))
        if label:
            corner = rng.integers(size // 8, size // 2, 2)
            spot = tuple(slice(c, c + size // 4) for c in corner)
            image[spot], mask[spot] = 40, 1
            level[spot] += 0.0015 * rng.gamma(2) if i < last else 0.05  # the last one is surely shown
        else:
            level *= 1 + 0.1 * rng.normal()
        score = float(level.max())
        normalised = (score - 0.0109) / 0.0009
        found.append(
            report.Picture(
                file=f"test/{i:03}.png" if i < last else HOSTILE,
                defect=("cut", "<stain> $5$")[i % 2] if label else "good",
                label=label if labels else -1,
                score=score,
                normalised=normalised,
                predicted=int(normalised > 1),
                image=image,
                mask=mask if masks else None,
                map=level.astype(np.float32),
            )
        )
    return found


def rows_of(pictures):
    """The rows of scores.csv."""
    names = ("file", "label", "score", "predicted", "defect")
    return [{name: getattr(p, name) for name in names} | {"score_normalised": p.normalised} for p in pictures]


def history_of(steps=60):
    """Rows of metrics.jsonl; the entropy is lost once."""
    rows = [{"step": step, "loss": math.exp(-step / 9) + 1e-3, "entropy": 2 / (step + 1)} for step in range(steps)]
    rows[7]["entropy"] = math.nan
    return [{"phase": phase} | row for phase in ("train", "refine") for row in rows]


def inputs(case):
    """Everything `write_report` takes, for one named situation."""
    pictures = {
        "full": lambda: samples(20, 40),
        "no masks": lambda: samples(20, 40, masks=False),
        "only normals": lambda: samples(20, 0),
        "unlabelled": lambda: samples(6, 6, labels=False, masks=False),
        "no test set": list,
        "no threshold": lambda: [p._replace(normalised=math.nan, predicted=-1) for p in samples(6, 6)],
        "grey 28x28": lambda: samples(9, 9, size=28, channels=1),
        "two pictures": lambda: samples(1, 1),
        "500 noisy": lambda: samples(450, 50, size=64),
        "video": lambda: [p._replace(file=f"test/Test{i % 3:03}/{i:03}.tif") for i, p in enumerate(samples(60, 30))],
        "constant": lambda: [
            p._replace(map=np.full_like(p.map, 0.5), score=0.5, normalised=0.0, predicted=0) for p in samples(3, 3)
        ],
    }[case]()
    both = case in ("full", "no masks", "grey 28x28", "two pictures", "500 noisy", "video", "no threshold", "constant")
    masked = both and case != "no masks"
    headline = {
        "method": "memae",
        "preset": "cpu",
        "data": "/data/mvtec/bottle",
        "image_size": 96,
        "seed": 0,
        "device": "cpu (2 cores)",
        "parameters": 1234567,
        "train_images": 188,
        "holdout_images": 21,
        "test_images": len(pictures),
        "image_auroc": 0.957 if both else None,
        "image_ap": 0.98 if both else math.nan,
        "pixel_auroc": 0.931 if masked else math.nan,
        "aupro": 0.812 if masked else None,
        "threshold": None if case == "no threshold" else 0.0118,
        "threshold_kind": "quantile of held-out normal images, fpr=0.01",
        "fpr": 0.01,
        "load_seconds": 2.3,
        "compile_seconds": 14.2,
        "train_seconds": 312.0,
        "score_seconds": 4.1,
        "train_images_per_second": 212.0,
        "per_defect": [{"defect": "cut", "images": 20, "detected": 17, "image_auroc": 0.9}] if both else [],
        "notes": ["only 21 held-out normals <b>: the finest false-positive rate they can state is 1/22"],
        "used_test_for": ["the threshold (F1-max)"] if case == "two pictures" else [],
    }
    if case == "video":
        headline["image_auroc_per_video"] = {"Test000": 0.9, "Test001": 0.8, "Test002": math.nan}
    return headline, {
        "scores": rows_of(pictures),
        "history": history_of() if case in ("full", "no test set") else [],
        "pictures": pictures,
        "config": {"method": {"num_items": 500, "learning_rate": 1e-3}, "path": "/data/" + "very_long_name_" * 20},
        "environment": {"jax": "0.10.2", "device": {"kind": "cpu"}},
    }


CASES = (
    "full",
    "no masks",
    "only normals",
    "unlabelled",
    "no test set",
    "no threshold",
    "grey 28x28",
    "two pictures",
    "500 noisy",
    "video",
    "constant",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The written page of each case."""
    folder = tmp_path_factory.mktemp("reports")
    for case in CASES:
        headline, rest = inputs(case)
        report.write_report(folder / f"{case}.html", headline, **rest)
    return folder


def page(pages, case):
    return (pages / f"{case}.html").read_text("utf-8")


# ---- words


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (
            {(1, 1): 58, (1, 0): 5, (0, 1): 1, (0, 0): 19},
            "Of 63 anomalous images 58 are flagged and 5 missed; of 20 normal images 1 is flagged by mistake.",
        ),
        (
            {(0, 0): 1},
            "Of 1 normal image none is flagged by mistake. "
            "No anomalous images were given, so how many would be found is not known.",
        ),
        (
            {(1, 1): 2},
            "Of 2 anomalous images 2 are flagged and 0 missed. "
            "No normal images were given, so how many false alarms to expect is not known.",
        ),
        ({(-1, 1): 3, (-1, 0): 4}, "Of 7 unlabelled images 3 are flagged, rightly or not is unknown."),
        ({(1, ""): 2, (0, ""): 1}, "3 images scored; none flagged or passed, for there is no threshold."),
        ({}, "No images were scored: there was no test set."),
    ],
)
def test_sentence(outcomes, expected):
    rows = [{"score": 1.0, "label": a, "predicted": b} for (a, b), number in outcomes.items() for _ in range(number)]
    assert report.sentence({}, rows) == expected
    assert report.sentence({"image_auroc_per_video": {"a": 1}}, rows) == expected.replace("image", "frame")


def test_interval_against_values_worked_by_hand():
    # Wilson, z = 1.96, 1 of 20: (0.05 + 0.09604 -+ 1.96 sqrt(0.05 * 0.95 / 20 + 0.002401)) / (1 + 0.19208)
    np.testing.assert_allclose(words.interval(1, 20), (0.0089, 0.2361), atol=1e-4)
    np.testing.assert_allclose(words.interval(0, 20), (0.0, 0.1611), atol=1e-4)
    np.testing.assert_allclose(words.interval(20, 20), (0.8389, 1.0), atol=1e-4)


def test_metric_rows_leave_out_what_is_not_defined():
    rows = report.metric_rows({"image_auroc": 0.9, "pixel_auroc": None, "aupro": math.nan, "threshold": 2, "seed": 0})
    assert rows == [{"metric": "image AUROC", "value": 0.9}, {"metric": "threshold", "value": 2.0}]


def test_headline_states_shares_threshold_and_why_a_metric_is_missing(pages):
    full = page(pages, "full")
    rows = inputs("full")[1]["scores"]
    caught = sum(r["label"] == 1 and r["predicted"] for r in rows)
    assert 0 < caught < 40
    assert f"Of 40 anomalous images {caught} are flagged and {40 - caught} missed; of 20 normal images" in full
    assert f"{caught} of 40; 95% interval" in full and ">0.957<" in full
    assert "<b>0.0118</b> (quantile of held-out normal images, fpr=0.01)" in full
    assert "needs masks of anomalous test images" in page(pages, "no masks")
    assert "needs both normal and anomalous test images" in page(pages, "only normals")
    assert "No threshold was set." in page(pages, "no threshold")


def test_use_of_the_test_set_is_shown_either_way(pages):
    assert '<p class="alert"><b>The test set was used for: the threshold (F1-max).</b>' in page(pages, "two pictures")
    assert "The test set was used for these figures only" in page(pages, "full")
    assert "The test set was used" not in page(pages, "no test set")


def test_warns_of_more_false_alarms_than_chance_of_guessing_and_of_broken_scores(tmp_path):
    rows = [{"score": 1.0, "label": 0, "predicted": int(i < 5)} for i in range(20)] + [{"score": "nan", "label": 0}]
    report.write_report(tmp_path / "r.html", {"fpr": 0.01, "image_auroc": 0.52}, scores=rows)
    text = (tmp_path / "r.html").read_text()
    assert "aims at 1% false alarms, but 5 of 20 normal test images are flagged" in text
    assert "0.520 is close to guessing" in text
    assert "1 scores are not finite" in text
    report.write_report(tmp_path / "r.html", {"fpr": 0.2, "image_auroc": 0.9}, scores=rows[:-1])
    assert "<h2>Notes</h2>" not in (tmp_path / "r.html").read_text()


def test_names_are_escaped_and_odd_bytes_survive(pages, tmp_path):
    text = page(pages, "full")
    assert "<script" not in text and "<stain>" not in text
    assert html.escape(HOSTILE) in text and text.count("&lt;stain&gt; $5$") > 2
    assert "held-out normals &lt;b&gt;" in text
    odd = samples(1, 0)[0]._replace(file="caf\udce9.png")  # how Python reads a Latin-1 name on Linux
    report.write_report(tmp_path / "r.html", {}, scores=rows_of([odd]), pictures=[odd])
    assert "caf\\udce9.png" in (tmp_path / "r.html").read_text("utf-8")


def test_rows_read_from_csv_give_the_same_page(pages, tmp_path):
    headline, rest = inputs("full")
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, rest["scores"][0].keys())
    writer.writeheader()
    writer.writerows(rest["scores"])
    buffer.seek(0)
    report.write_report(tmp_path / "again.html", headline, **rest | {"scores": list(csv.DictReader(buffer))})
    assert (tmp_path / "again.html").read_bytes() == (pages / "full.html").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]


# ---- pictures


def test_heat_map_keeps_one_scale():
    ramp = np.linspace(0, 1, 50, dtype=np.float32)[None]
    drawn = report.heat_map(ramp, low=0.0, high=1.0)
    light = drawn.astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light[0]) > 0).all() and light[0, 0] < 5 and light[0, -1] > 230
    moved = report.heat_map(2 * ramp + 3, low=3.0, high=5.0)
    np.testing.assert_allclose(moved.astype(int), drawn, atol=6)  # one colour step: float32 rounds 2 x + 3
    wider = report.heat_map(np.concatenate([ramp, ramp * 9], 1), low=0.0, high=1.0)
    np.testing.assert_array_equal(wider[:, :50], drawn)  # a hot neighbour changes nothing
    np.testing.assert_array_equal(wider[:, -1], drawn[:, -1])  # beyond high: clipped
    broken = report.heat_map(np.array([[np.nan, 0.0]]), low=0.0, high=0.0)
    np.testing.assert_array_equal(broken[0], [[128, 128, 128], drawn[0, 0]])


def test_overlay_leaves_normal_pixels_alone_and_outlines_the_mask():
    image = np.full((9, 9, 1), 100, np.uint8)
    map = np.zeros((9, 9))
    map[0, 0] = 2.0
    mask = np.zeros((9, 9), np.uint8)
    mask[3:7, 3:7] = 1
    drawn = report.overlay(image, map, low=1.0, high=2.0, mask=mask, opacity=0.5)
    np.testing.assert_array_equal(drawn[0, 1], [100, 100, 100])
    hot = report.heat_map(map, low=1.0, high=2.0)[0, 0]
    np.testing.assert_allclose(drawn[0, 0], (100 + hot.astype(float)) / 2, atol=0.51)
    np.testing.assert_array_equal(drawn[3, 3:7], [_CYAN] * 4)
    np.testing.assert_array_equal(drawn[4, 4], [100, 100, 100])  # inside: the picture
    np.testing.assert_array_equal(drawn[2, 3:7], np.zeros((4, 3)))  # dark rim
    with pytest.raises(ValueError, match=r"map has shape \(2, 2\); expected the image's \(H, W\) = \(9, 9\).*Resize"):
        report.overlay(image, map[:2, :2], low=0, high=1)


def test_outline_closes_at_the_border():
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    expected = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(report.outline(mask), expected)


def test_a_scratch_survives_shrinking_and_small_pictures_grow_by_whole_pixels():
    scratch = np.zeros((1000, 600), np.uint8)
    scratch[:, 301] = 255
    picture = samples(1, 0)[0]._replace(
        image=np.zeros((1000, 600, 4), np.uint8), mask=scratch, map=scratch.astype(np.float32)
    )
    small = fit_to(picture, 100)
    assert small.image.shape == (100, 60, 3) and small.map.shape == small.mask.shape == (100, 60)
    assert small.mask.any(1).all() and small.mask.sum() == 100
    tiny = fit_to(samples(0, 1, size=28, channels=1)[0], 100)
    assert tiny.image.shape == (84, 84, 3)
    np.testing.assert_array_equal(tiny.image[::3, ::3].repeat(3, 0).repeat(3, 1), tiny.image)


def test_colour_scale_spans_from_the_usual_pixel_to_the_usual_anomalous_peak():
    peaks = [(0, 3.0), (0, 4.0), (1, 10.0), (1, 20.0), (1, 1000.0)]
    pictures = []
    for label, peak in peaks:
        map = np.full((5, 5), 2.0, np.float32)
        map[0, 0], map[0, 1] = peak, np.nan
        pictures.append(samples(1, 0)[0]._replace(label=label, map=map))
    assert report.colour_scale(pictures) == (2.0, 20.0)
    assert report.colour_scale(pictures[:2]) == (2.0, 3.5)
    assert report.colour_scale([]) == (0.0, 1.0)


def test_choose_takes_the_telling_samples_in_order():
    facts = [  # label, predicted, score, defect
        (1, 1, 9.0, "cut"),
        (1, 1, 8.0, "cut"),
        (1, 1, 5.0, "stain"),
        (1, 0, 0.5, "cut"),
        (1, 0, 0.2, "cut"),
        (0, 1, 2.0, "good"),
        (0, 1, 3.0, "good"),
        (0, 0, 0.1, "good"),
        (0, 0, 0.9, "good"),
        (1, 1, math.nan, "cut"),
    ]
    rows = [dict(zip(("label", "predicted", "score", "defect"), fact, strict=True)) for fact in facts]
    assert report.choose(rows, each=2) == {"caught": [0, 2], "missed": [4, 3], "alarms": [6, 5], "passed": [8, 7]}
    for row in rows:
        row["label"] = ""
    assert report.choose(rows, each=2) == {"high": [0, 1], "low": [7, 4]}
    assert report.choose(rows[:3], each=2) == {"high": [0, 1], "low": [2]}


def test_save_map_writes_raw_scores_and_pictures_of_the_image_size(tmp_path):
    map = np.linspace(0, 1, 64, dtype=np.float64).reshape(8, 8)
    image = np.full((20, 30, 3), 90, np.uint8)
    report.save_map(tmp_path / "a.npy", map, low=0, high=1)
    raw = np.load(tmp_path / "a.npy")
    assert raw.dtype == np.float32
    np.testing.assert_array_equal(raw, map.astype(np.float32))
    report.save_map(tmp_path / "a.png", map, low=0, high=1)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), report.heat_map(map, low=0, high=1))
    report.save_map(tmp_path / "b.png", map, low=0, high=1, image=image)
    drawn = np.asarray(Image.open(tmp_path / "b.png"))
    assert drawn.shape == (20, 30, 3)
    np.testing.assert_array_equal(drawn[0, 0], [90, 90, 90])
    assert (drawn[-1, -1] != 90).all()


# ---- plots


def test_operating_points_equal_scikit_learn_with_ties():
    metrics = pytest.importorskip("sklearn.metrics", reason="the oracle: pip install scikit-learn")
    rng = np.random.default_rng(1)
    label, score = rng.integers(0, 2, 200), rng.integers(0, 30, 200) / 7.0
    fpr, tpr, precision = plots._operating_points(label, score)
    expected_fpr, expected_tpr, _ = metrics.roc_curve(label, score, drop_intermediate=False)
    np.testing.assert_allclose([fpr, tpr], [expected_fpr, expected_tpr])
    expected_precision, expected_recall, _ = metrics.precision_recall_curve(label, score)
    np.testing.assert_allclose(precision[1:], expected_precision[:-1][::-1])
    np.testing.assert_allclose(tpr, expected_recall[::-1])


def test_far_scores_are_squashed_so_that_the_threshold_stays_visible():
    near, far = np.array([-0.5, 0.0, 3.0]), np.array([-0.5, 0.0, 300.0])
    assert plots._squash(near, 1.0) is np.asarray
    assert plots._squash(far, 1.0) is np.arcsinh
    assert plots._squash(far, None) is np.asarray  # raw scores have no unit


def test_plots_follow_the_page_and_sections_come_with_their_data(pages):
    full = page(pages, "full")
    labels = re.findall(r'<svg [^>]*aria-label="([^"]*)"', full)
    curves = [f"{name} during training" for name in ("loss", "entropy")] * 2
    assert labels == ["Histogram of scores", "ROC curve", "Precision-recall curve", "Scores by type", *curves]
    assert "entropy (1 not finite)" in full
    assert "var(--anomalous)" in full and "#01" not in full and "DejaVu" not in full
    assert re.findall("<h2>(.*?)</h2>", page(pages, "no test set")) == ["Notes", "Training", "Time"]
    assert "ROC curve" not in page(pages, "only normals")
    assert page(pages, "video").count('aria-label="Scores over time') == 3
    assert "The maps are constant" in page(pages, "constant") and "The maps are constant" not in full


@pytest.mark.parametrize("case", CASES)
def test_page_is_one_small_file_that_asks_for_nothing(pages, case):
    text = page(pages, case)
    assert len(text.encode()) < 3_000_000
    assert '<meta name="viewport" content="width=device-width' in text  # phones zoom out without it
    assert "<metadata" not in text  # a date in it would make equal runs differ
    for value in re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']([^"']*)""", text):
        assert value.startswith(("data:image/", "#")), value[:80]
    assert not re.search(r"@import|url\((?!#)", text)
    assert not re.search(r">\s*-?(nan|inf|None)\b", text, re.IGNORECASE)
    for uri in re.findall(r'src="data:image/[a-z]+;base64,([^"]+)"', text):
        Image.open(io.BytesIO(base64.b64decode(uri, validate=True))).load()


def test_pictures_are_made_smaller_until_the_file_is_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    pictures = [
        p._replace(image=noise, mask=noise[..., 0] > 128, map=noise[..., 1].astype(np.float32)) for p in samples(20, 40)
    ]
    report.write_report(tmp_path / "r.html", {}, scores=rows_of(pictures), pictures=pictures)
    assert 500_000 < (tmp_path / "r.html").stat().st_size < 3_000_000
    assert (tmp_path / "r.html").read_text().count("<img") == 64  # none is dropped: 4 groups of 4, 4 panels each


def test_importing_it_is_light():
    code = "import jaxad.report, sys; print(sorted({'jax', 'matplotlib', 'rich', 'PIL', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- in a browser

_PROBE = """
<script>
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach(d => d.open = true);
    found[frame.title] = {
      width: root.clientWidth, needed: root.scrollWidth, height: root.scrollHeight,
      images: page.images.length, scripts: page.scripts.length,
      broken: [...page.images].filter(i => !i.complete || !i.naturalWidth).length,
      flat: [...page.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height < 60).length,
      requests: frame.contentWindow.performance.getEntriesByType("resource")
        .map(r => r.name).filter(n => !n.startsWith("data:")),
    };
  }
  const out = document.createElement("pre"); out.id = "found";
  out.textContent = JSON.stringify(found); document.body.replaceChildren(out);
});
</script>
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Runs headless Chromium with these arguments and returns what it printed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip(f"no browser: looked for {', '.join(names)}; on Debian: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")

    def run(*arguments):
        always = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}")
        done = subprocess.run([binary, *always, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_browser_shows_every_case_without_sideways_scrolling(pages, browser, tmp_path, width):
    frames = "".join(
        f'<iframe title="{case}" width={width} height=844 style="border:0" srcdoc="{html.escape(page(pages, case))}">'
        "</iframe>"
        for case in CASES
    )
    wrapper = tmp_path / "all.html"
    wrapper.write_text(f'<!doctype html><meta charset="utf-8"><body>{frames}{_PROBE}</body>', "utf-8")
    dom = browser("--dump-dom", "--window-size=1500,900", wrapper.as_uri())
    found = json.loads(html.unescape(re.search('<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert set(found) == set(CASES)
    for case, facts in found.items():
        assert facts["width"] == width, case
        assert facts["needed"] <= width, (case, facts)
        assert (facts["broken"], facts["scripts"], facts["flat"], facts["requests"]) == (0, 0, 0, []), (case, facts)
        assert facts["height"] > 900, case
    shown = sum(map(len, report.choose(inputs("full")[1]["pictures"]).values()))
    assert shown > 12  # some of each of the four groups
    assert (found["full"]["images"], found["no masks"]["images"]) == (4 * shown, 3 * shown)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_browser_paints_it(pages, browser, tmp_path, width, height):
    wrapper = tmp_path / "one.html"  # a frame, for Chromium makes no window as narrow as a phone
    wrapper.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin:0"><iframe width={width} height={height} '
        f'style="border:0" srcdoc="{html.escape(page(pages, "full"))}"></iframe></body>',
        "utf-8",
    )
    shot = tmp_path / "shot.png"
    # without these a busy machine leaves tiles out
    settle = ("--run-all-compositor-stages-before-draw", "--virtual-time-budget=2000")
    browser(*settle, f"--screenshot={shot}", f"--window-size={max(width, 600)},{height}", wrapper.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB"))[:height, :width]
    assert pixels.shape == (height, width, 3)
    ink = (pixels.astype(int).sum(-1) < 300).mean()
    assert 0.005 < ink < 0.3  # text and bars on paper, neither blank nor black
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
