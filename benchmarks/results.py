"""Writes benchmarks/RESULTS.md and its plots from the records below benchmarks/results/.

    python -m benchmarks.results

Records of the harness become tables and plots. Of other records their numbers are listed, or a link is set to the page
that their benchmark wrote beside them: no file is left out. Needs matplotlib.
"""

import json
import pathlib
import re
import statistics

from jaxad.bench.report import compile_cell

ROOT = pathlib.Path(__file__).resolve().parent
OUT = ROOT / "RESULTS.md"
_COLOURS = {"jaxad": "#1b6ca8", "torch": "#d1495b", "torch.compile": "#edae49"}
_OTHERS = ("#66a182", "#8d6a9f", "#6c757d")
_BUSY = 0.1  # share of the processors' time
_LISTED = 60  # values of a record that is not the harness's

HEAD = """# Results

Made by `python -m benchmarks.results` from the records in `results/`; do not edit. How it is measured: README.md.

* *time ratio*: time of a run over that of the first contender of the case (above 1: the first is faster), the median of
  rounds A B B A; *spread*: interquartile range of the rounds' ratios over their median, *all*: largest less smallest.
* *of product*, *of convolution*, *of copy*: FLOP/s of the contender's own matrix products and convolutions, and XLA's
  bytes/s, as a share of the best rate measured in the same process. XLA's bytes count what it fuses or keeps in caches
  as if it were read again, so that shares above 100% of copy happen.
* *transfer*, *fetch*, *metrics*: host to device, device to host, and counting the pixels of the maps, as a share of the
  time of a run; they are no part of it.
* *others took*: the processors' time that other programs had while a case was timed, where that was above a tenth.
* *compile s*: tracing, lowering and compiling; *(cached)*: read from jax's cache on disk, which is not what it costs.
* *peak*: what the compiler says the program needs, with arguments; *seen*: growth of memory during a first run.
"""
CPU = """
The CPU results are of a shared virtual machine. Its absolute rates change from hour to hour and are no claims; ratios
within a case and shares of the ceiling are what to read.
"""


def load():
    """{device folder: [(file, record)]} of all records, those of the harness first."""
    found = {}
    for path in sorted((ROOT / "results").glob("*/*.json")):
        found.setdefault(path.parent.name, []).append((path, json.loads(path.read_text(encoding="utf-8"))))
    return {device: sorted(records, key=lambda pair: not is_raced(pair[1])) for device, records in found.items()}


def is_raced(record):
    """Whether the harness wrote it."""
    return isinstance(record, dict) and record.get("schema") == 1 and bool(record.get("cases"))


def markdown(rows):
    """A Markdown table; the first row's keys are the columns."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(' --- ' for _ in columns)}|"]
    lines += [f"| {' | '.join(_cell(row[c]) for c in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def _percent(value):
    return None if value is None else f"{value:.0%}"


def rows_of(record, *, is_cpu):
    """Rows of a record's table: ratios and shares first, rates last."""
    rows = []
    for case in record["cases"]:
        ratios = case["time_over"]["ratios"]
        for contender in case["contenders"]:
            ratio, shares = ratios.get(contender["name"]), contender["share_of"]
            memory = contender["memory"]["program"]
            busy = case.get("other_load") or 0
            row = {
                "case": case["case"] + (f" (others took {busy:.0%})" if busy > _BUSY else ""),
                "by": contender["name"],
                "time ratio": ratio["median"] if ratio else 1.0,
                "spread (all)": f"{ratio['spread']:.0%} ({ratio['range']:.0%})" if ratio else None,
                "of product": _percent(shares["product"]),
                "of convolution": _percent(shares["convolution"]),
                "of copy": _percent(shares["copy"]),
                "compile s": compile_cell(contender),
                "peak MiB": memory["peak"] / 2**20 if memory else None,
                "seen MiB": contender["memory"]["seen"] / 2**20 if contender["memory"]["seen"] is not None else None,
            }
            seconds = contender["seconds"]
            rate = {} if is_cpu else {"samples/s": contender["samples_per_second"]}
            tails = {f"{name} / p50": seconds[name] / seconds["p50"] for name in ("p95", "p99")}
            beside = {name: contender.get(f"{name}_seconds") for name in ("transfer", "fetch", "metrics")}
            beside = {name: _percent(None if s is None else s / seconds["p50"]) for name, s in beside.items()}
            rows.append({**row, **rate, **tails, **beside})
    return rows


def omissions(record):
    """Markdown lines on what the table lacks: contenders left out of cases, and cases that failed."""
    lines = []
    for case in record["cases"]:
        by_reason = {}
        for name, reason in case.get("left_out", {}).items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"* Left out of {case['case']}: {', '.join(n)}. {reason}" for reason, n in by_reason.items()]
    lines += [f"* Failed: {name}: {reason}" for name, reason in record.get("failed", {}).items()]
    return "".join(f"\n{line}" for line in lines)


def outline(value, name=""):
    """[(name, value)] of the numbers and words in a record; of a list of numbers the median; tables left out."""
    if isinstance(value, dict):
        return [pair for k, v in value.items() if k != "environment" for pair in outline(v, f"{name} {k}".strip())]
    if is_table(value):
        return []
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return [(f"{name} (median of {len(value)})" if len(value) > 1 else name, statistics.median(value))]
    if isinstance(value, list):
        return [pair for i, v in enumerate(value) for pair in outline(v, f"{name} {i}")]
    return [] if value is None else [(name, str(value)[:80] if isinstance(value, str) else value)]


def is_table(value):
    """Whether it is a list of dicts with the same keys."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(v, dict) for v in value)
        and all(v.keys() == value[0].keys() for v in value)
    )


def tables(value, name=""):
    """[(name, Markdown)] of the tables in a record, without columns that hold more than one value."""
    if is_table(value):
        rows = [{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in value]
        shared = [k for k in rows[0] if all(k in row for row in rows)]
        table = markdown([{k.replace("_", " "): row[k] for k in shared} for row in rows[:_LISTED]])
        return [(name, table + (f"\n\n{len(rows) - _LISTED} more are in the file." if len(rows) > _LISTED else ""))]
    parts = value.items() if isinstance(value, dict) else ()
    return [found for k, v in parts for found in tables(v, f"{name} {k}".strip())]


def raced(path, record, *, is_cpu):
    """The section of a record of the harness."""
    missing = omissions(record)
    return f"{facts_of(path, record)}\n\n{markdown(rows_of(record, is_cpu=is_cpu))}" + (missing and f"\n{missing}")


def other(path, record):
    """The section of a record that is not the harness's."""
    page = path.with_suffix(".md")
    if page.exists():
        return f"In [{page.relative_to(ROOT)}]({page.relative_to(ROOT)}), from `{path.relative_to(ROOT)}`."
    pairs = outline(record)
    rows = [{"of": name.replace("_", " "), "value": value} for name, value in pairs[:_LISTED]]
    more = f"\n\n{len(pairs) - _LISTED} more values in the file." if len(pairs) > _LISTED else ""
    further = "".join(f"\n\n{name.replace('_', ' ')}:\n\n{table}" for name, table in tables(record))
    return f"{facts_of(path, record)}\n\n{markdown(rows)}{more}{further}"


def facts_of(path, record):
    """One line on where a record is from."""
    name, environment = f"`{path.relative_to(ROOT)}`", _environment(record)
    if environment is None:
        return f"{name}."
    versions = ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items() if v and k != "jaxad")
    commit, cores = (environment.get("commit") or "unknown")[:9], environment.get("threads", "?")
    changed = " with uncommitted changes" if environment.get("commit_modified") else ""
    return f"{name}: {environment.get('device')}, {cores} cores, {versions}, commit {commit}{changed}."


def _environment(record):
    """The environment of a record, or of the first part of it that has one."""
    if not isinstance(record, dict):
        return None
    own = record.get("environment")
    return own or next((found for part in record.values() if (found := _environment(part))), None)


def plot(device, records, *, is_cpu):
    """Draws time ratios by batch and shares of the ceiling of everything with peers: the picture's path, or None."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(records)
    if not groups:
        return None
    size = {"figsize": (11, 2.9 * len(groups)), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(groups), 2, **size)
    for (name, series), (left, right) in zip(groups.items(), axes, strict=True):
        _bars(left, series, _relative if is_cpu else _rate, "{:.2f}" if is_cpu else "{:.0f}")
        _bars(right, series, _share, "{:.0%}")
        left.set_ylabel("rate, jaxad's = 1" if is_cpu else "samples/s")
        right.set_ylabel("share of product ceiling")
        left.set_title(name, loc="left", fontsize=9)
        right.yaxis.set_major_formatter("{x:.0%}")
        right.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path = ROOT / "results" / device / "peers.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(axis, series, value_of, form):
    """Bars of each contender, grouped by the batches of a series of cases."""
    names = [c["name"] for c in series[0]["contenders"]]
    colours = dict(zip((n for n in names if n not in _COLOURS), _OTHERS, strict=False)) | _COLOURS
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        middle = (offset - (len(names) - 1) / 2) * width
        pairs = [(i + middle, value_of(case, name)) for i, case in enumerate(series)]
        pairs = [(where, value) for where, value in pairs if value is not None]  # some take no part in a case
        bars = axis.bar([w for w, _ in pairs], [v for _, v in pairs], width, color=colours[name], label=name)
        axis.bar_label(bars, [form.format(v) for _, v in pairs], fontsize=7, padding=1)
    axis.set_xticks(range(len(series)), [str(case["batch"]) for case in series])
    axis.set_xlabel("batch")
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def _contender(case, name):
    return next((c for c in case["contenders"] if c["name"] == name), None)


def _relative(case, name):
    ratio = case["time_over"]["ratios"].get(name)
    return 1 / ratio["median"] if ratio else 1.0 if name == case["time_over"]["name"] else None


def _rate(case, name):
    contender = _contender(case, name)
    return contender["samples_per_second"] if contender else None


def _share(case, name):
    contender = _contender(case, name)
    return contender["share_of"]["product"] if contender else None


def grouped(records):
    """Methods' cases with peers, by batch where all else is the same: {title: cases}. Of the same case the first."""
    groups = {}
    for case in (case for _, record in records if is_raced(record) for case in record["cases"]):
        if "method" in case and any(c["name"] == "torch" for c in case["contenders"]):
            groups.setdefault(re.sub(r" b\d+ ", " ", case["case"]), {}).setdefault(case["batch"], case)
    return {name: [cases[batch] for batch in sorted(cases)] for name, cases in groups.items()}


def main():
    parts = [HEAD]
    for device, records in load().items():
        is_cpu = any(is_raced(record) and record["environment"]["backend"] == "cpu" for _, record in records)
        parts.append(f"\n## {device}\n{CPU if is_cpu else ''}")
        picture = plot(device, records, is_cpu=is_cpu)
        if picture:
            parts.append(f"\n![Rates and shares of the ceiling, by batch]({picture.relative_to(ROOT)})\n")
        for path, record in records:
            section = raced(path, record, is_cpu=is_cpu) if is_raced(record) else other(path, record)
            parts.append(f"\n### {path.stem}\n\n{section}\n")
    OUT.write_text("".join(parts), encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
