"""Writes benchmarks/RESULTS.md and its plots from the records below benchmarks/results/.

    python -m benchmarks.results

Reads every JSON file that the harness wrote (those of other benchmarks are described in README.md). Needs matplotlib.
"""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent
OUT = ROOT / "RESULTS.md"
_COLOURS = {"jaxad": "#1b6ca8", "torch": "#d1495b", "torch.compile": "#edae49"}
_OTHERS = ("#66a182", "#8d6a9f", "#6c757d")

HEAD = """# Results

Made by `python -m benchmarks.results` from the records in `results/`; do not edit. How it is measured: README.md.

* *time ratio*: time of a run over that of the first contender of the case (above 1: the first is faster), the median of
  rounds A B B A; *spread*: interquartile range of the rounds' ratios over their median, *all*: largest less smallest.
* *of product*, *of convolution*, *of copy*: FLOP/s of the contender's own matrix products and convolutions, and XLA's
  bytes/s, as a share of the best rate measured in the same process. Above 100% of copy: arrays that stay in caches.
* *peak*: what the compiler says the program needs, with arguments; *seen*: growth of memory during a first run.
"""
CPU = """
The CPU results are of a shared virtual machine. Its absolute rates change from hour to hour and are no claims; ratios
within a case and shares of the ceiling are what to read.
"""


def load():
    """{device folder: [(file, record)]} of all records of the harness."""
    found = {}
    for path in sorted((ROOT / "results").glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("schema") == 1 and record.get("cases"):
            found.setdefault(path.parent.name, []).append((path, record))
    return found


def markdown(rows):
    """A Markdown table; the first row's keys are the columns."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(' --- ' for _ in columns)}|"]
    lines += [f"| {' | '.join(_cell(row[c]) for c in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value):
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


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
            row = {
                "case": case["case"],
                "by": contender["name"],
                "time ratio": ratio["median"] if ratio else 1.0,
                "spread (all)": f"{ratio['spread']:.0%} ({ratio['range']:.0%})" if ratio else None,
                "of product": _percent(shares["product"]),
                "of convolution": _percent(shares["convolution"]),
                "of copy": _percent(shares["copy"]),
                "compile s": sum(contender["compile_seconds"].values()) if contender["compile_seconds"] else None,
                "peak MiB": memory["peak"] / 2**20 if memory else None,
                "seen MiB": contender["memory"]["seen"] / 2**20 if contender["memory"]["seen"] is not None else None,
            }
            seconds = contender["seconds"]
            rate = {} if is_cpu else {"samples/s": contender["samples_per_second"]}
            tails = {name: seconds[name] / seconds["p50"] for name in ("p95", "p99")}
            rows.append({**row, **rate, **{f"{name} / p50": value for name, value in tails.items()}})
    return rows


def facts_of(path, record):
    """One line on where a record is from."""
    environment = record["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v and k != "jaxad")
    commit, cores = (environment["commit"] or "unknown")[:9], environment["threads"]
    return f"`{path.relative_to(ROOT)}`: {environment['device']}, {cores} cores, {versions}, commit {commit}."


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
        values = [value_of(case, name) for case in series]
        where = [i + (offset - (len(names) - 1) / 2) * width for i in range(len(series))]
        bars = axis.bar(where, values, width, color=colours[name], label=name)
        axis.bar_label(bars, [form.format(v) for v in values], fontsize=7, padding=1)
    axis.set_xticks(range(len(series)), [str(case["batch"]) for case in series])
    axis.set_xlabel("batch")
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def _contender(case, name):
    return next((c for c in case["contenders"] if c["name"] == name), None)


def _relative(case, name):
    ratio = case["time_over"]["ratios"].get(name)
    return 1 / ratio["median"] if ratio else float(name == case["time_over"]["name"])


def _rate(case, name):
    contender = _contender(case, name)
    return contender["samples_per_second"] if contender else 0.0


def _share(case, name):
    contender = _contender(case, name)
    return (contender["share_of"]["product"] or 0.0) if contender else 0.0


def grouped(records):
    """Cases with peers, those that differ in batch alone together: {title: cases by batch}."""
    groups = {}
    for _, record in records:
        for case in record["cases"]:
            if any(c["name"] == "torch" for c in case["contenders"]):
                groups.setdefault(re.sub(r" b\d+ ", " ", case["case"]), []).append(case)
    return {name: sorted(cases, key=lambda case: case["batch"]) for name, cases in groups.items()}


def main():
    parts = [HEAD]
    for device, records in load().items():
        is_cpu = all(record["environment"]["backend"] == "cpu" for _, record in records)
        parts.append(f"\n## {device}\n{CPU if is_cpu else ''}")
        picture = plot(device, records, is_cpu=is_cpu)
        if picture:
            parts.append(f"\n![Rates and shares of the ceiling, by batch]({picture.relative_to(ROOT)})\n")
        for path, record in records:
            parts.append(
                f"\n### {path.stem}\n\n{facts_of(path, record)}\n\n{markdown(rows_of(record, is_cpu=is_cpu))}\n"
            )
    OUT.write_text("".join(parts), encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
