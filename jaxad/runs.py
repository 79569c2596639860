"""Run folders: a training run from settings to report, with everything written where the next command finds it.

config.json        resolved settings, the data's fingerprint and shapes; usable as `--config`
environment.json   versions, device, commit
checkpoint/        the newest states (Orbax), written during training
metrics.jsonl      metrics of every step
calibration.json   statistics of held-out normals, with the threshold
scores.csv         the test images, raw and normalised scores, predictions
report.json        measures and timings
report.html        the same for people
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxad import checkpoint, metrics, score, settings, train
from jaxad.console import Console
from jaxad.core import Method, Scores, Source, Spec, select, spec_of
from jaxad.data import Dataset, load

_SAVE_SECONDS = 15.0  # between checkpoints
_SHOWN = 6  # pictures of each kind handed to the report
SCORE_COLUMNS = ("file", "label", "score", "score_normalised", "predicted", "defect")


class Detector(NamedTuple):
    """A trained method, ready to score."""

    method: Method
    state: Any
    calibration: score.Calibration | None  # None without held-out normals
    spec: Spec

    def score(self, images: np.ndarray, *, batch_size: int | None = None) -> Scores:
        """Scores pictures: uint8 (N, H, W, C), or (N, T, H, W, C) for clips, of the size the detector was trained on.

        Returns:
          Scores: raw image scores (N,) and maps (N, H, W), NumPy float32.

        Raises:
          ValueError: another shape, or values that are not uint8.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.spec.image:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; the detector expects uint8 (N, {str(self.spec.image)[1:]}. "
                "Resize them, or read files with jaxad.data.read_images."
            )
        labels = np.full(images.shape[0], -1, np.int32)
        source = Source(image=images, label=labels)
        if len(self.spec.image) == 4:  # clips: frames in a row, one start for each clip
            clip = self.spec.image[0]
            frames = images.reshape(-1, *images.shape[2:])
            starts = np.arange(0, frames.shape[0], clip, dtype=np.int32)
            source = Source(image=frames, label=np.repeat(labels, clip), start=starts, clip=clip)
        return score.score_dataset(
            self.method, self.state, jax.device_put(source), batch_size=batch_size or _batch_size(self.spec)
        )


class Interrupted(Exception):
    """Training was stopped by the user; the run folder can be resumed."""


# --- training -----------------------------------------------------------------------------------------------------


def train_run(
    chosen: settings.Settings,
    out: str | os.PathLike | None = None,
    *,
    data: Dataset | None = None,
    resume: bool = False,
    f1max: bool = False,
    mode: str | None = None,
    console: Console | None = None,
) -> tuple[Detector, dict[str, Any]]:
    """Trains, calibrates, evaluates and writes a run folder.

    Args:
      chosen: settings, resolved or not.
      out: the run folder; None writes nothing.
      data: what to train on; None loads what the settings name.
      resume: go on from the folder's last checkpoint, if there is one.
      f1max: take the threshold from the labelled test set (optimistic, and marked so) instead of held-out normals.
      mode: see `train.drive`.
      console: where to show progress.

    Returns:
      (the detector, the content of report.json).

    Raises:
      ValueError: settings or data that cannot work, a folder that holds another run.
      Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    from jaxad import methods

    console = console or Console(quiet=True)
    method = methods.get(chosen.method)
    chosen, cfg = settings.resolve(method, chosen)
    began = time.perf_counter()
    if data is None:
        data = load(chosen.data, seed=chosen.seed, **chosen.load_arguments())
    sources = {name: source for name, source in data.sources.items() if name != "test"}
    spec = spec_of(sources)
    method.check(cfg, spec)
    folder = _open_folder(out, chosen, data, spec, resume=resume)
    data = data.to_device()
    sources = {name: source for name, source in data.sources.items() if name != "test"}
    load_seconds = time.perf_counter() - began
    console.say(_describe(chosen, data, spec))
    state, timings = _train(method, cfg, chosen, sources, folder, resume, mode, console)
    calibration = None
    if "holdout" in sources and len(sources["holdout"]):
        calibration = score.calibrate(
            method, state, sources["holdout"], fpr=chosen.fpr, batch_size=_batch_size(spec)
        )  # fmt: skip
    detector = Detector(method, state, calibration, spec)
    report = {
        "method": chosen.method,
        "preset": chosen.preset,
        "data": chosen.data,
        "layout": data.layout,
        "image_size": chosen.image_size,
        "seed": chosen.seed,
        "load_seconds": load_seconds,
        **timings,
    }
    return detector, finish_run(detector, data, report, folder, f1max=f1max, settings_json=chosen.to_json())


class _Timings(NamedTuple):
    train_seconds: float
    compile_seconds: float
    images: int  # trained on in train_seconds


def _train(method, cfg, chosen, sources, folder, resume, mode, console) -> tuple[Any, dict[str, float]]:
    """Drives the phases, saving and showing on the way: (state, timings)."""
    key, spec = jax.random.key(chosen.seed), spec_of(sources)
    sizes = [(p, train.num_steps(p, len(train.source_of(method, p, sources)))) for p in method.phases(cfg)]
    log = _Log(folder)
    start, spent = None, _Timings(0.0, 0.0, 0)
    if resume and folder and checkpoint.latest(folder / "checkpoint") is not None:
        saved = checkpoint.restore(folder / "checkpoint", template(method, cfg, spec))
        start = train.Position(*saved.meta["position"]), saved.state
        spent = _Timings(*saved.meta["timings"])
        log.cut(start[0], [p.name for p, _ in sizes])
        console.say(f"resumed at step {saved.step}")

    def save(progress: train.Progress) -> None:
        if folder:
            number = sum(steps for _, steps in sizes[: progress.position.phase]) + progress.position.step
            meta = {"position": list(progress.position), "timings": list(spent)}
            checkpoint.save(folder / "checkpoint", number, progress.state, meta)

    saved_at = clock = time.monotonic()
    state = None
    with _Signals() as signals:
        for progress in train.drive(method, key, cfg, sources, mode=mode, start=start):
            now = time.monotonic()
            if progress.name != "init":
                phase, _ = sizes[_phase_index(progress)]
                steps = len(next(iter(progress.metrics.values()), ()))
                seconds = now - clock - progress.compile_seconds
                spent = _Timings(
                    spent.train_seconds + seconds,
                    spent.compile_seconds + progress.compile_seconds,
                    spent.images + steps * phase.batch_size,
                )
                log.write(progress, steps)
                _show(console, progress, spent, phase)
            else:
                spent = spent._replace(compile_seconds=spent.compile_seconds + progress.compile_seconds)
                console.say(f"compiled init in {progress.compile_seconds:.1f} s")
            last = progress.position.phase == len(sizes)
            stop = signals.caught and not last
            if last or stop or now - saved_at > _SAVE_SECONDS:
                save(progress)
                saved_at = time.monotonic()
            if stop:
                raise Interrupted(f"stopped by {signals.caught}")
            state, clock = progress.state, time.monotonic()
    rate = spent.images / spent.train_seconds if spent.train_seconds else 0.0
    return state, {
        "train_seconds": spent.train_seconds,
        "compile_seconds": spent.compile_seconds,
        "train_images_per_second": rate,
    }


def _phase_index(progress: train.Progress) -> int:
    return progress.position.phase - (progress.position.step == 0)


def _show(console: Console, progress: train.Progress, spent: _Timings, phase) -> None:
    if progress.compile_seconds > 0.05:
        console.say(f"compiled {progress.name} in {progress.compile_seconds:.1f} s")
    step = progress.position.step or progress.steps
    latest = {name: float(values[-1]) for name, values in progress.metrics.items()}
    console.progress(progress.name, step, progress.steps, latest, spent.images / max(spent.train_seconds, 1e-9))


class _Log:
    """metrics.jsonl: a line for every step."""

    def __init__(self, folder: pathlib.Path | None):
        self.path = folder / "metrics.jsonl" if folder else None
        if self.path and not self.path.exists():
            self.path.touch()

    def cut(self, position: train.Position, names: Sequence[str]) -> None:
        """Drops what was logged after the checkpoint that training goes on from."""
        if self.path:
            done = {name: index for index, name in enumerate(names)}
            kept = [r for r in read_lines(self.path) if (done[r["phase"]], r["step"]) <= tuple(position)]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, progress: train.Progress, steps: int) -> None:
        if not self.path or not steps:
            return
        last = progress.position.step or progress.steps
        with self.path.open("a", encoding="utf-8") as file:
            for offset in range(steps):
                row = {"phase": progress.name, "step": last - steps + offset + 1}
                row |= {name: _number(values[offset]) for name, values in progress.metrics.items()}
                file.write(json.dumps(row) + "\n")


class _Signals:
    """While open, notes Ctrl-C and SIGTERM instead of dying of them; a second one kills as usual."""

    def __init__(self):
        self.caught = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.caught = signal.Signals(number).name
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def template(method: Method, cfg: Any, spec: Spec) -> Any:
    """Shapes and dtypes of a method's state, without computing any of it."""
    return jax.eval_shape(lambda key: train.init(method, key, cfg, spec), jax.random.key(0))


# --- measuring ----------------------------------------------------------------------------------------------------


def finish_run(
    detector: Detector,
    data: Dataset,
    report: dict[str, Any],
    folder: pathlib.Path | None,
    *,
    f1max: bool,
    settings_json: Mapping[str, Any],
) -> dict[str, Any]:
    """Evaluates on the test source and writes calibration, scores and report. Returns the content of report.json."""
    from jaxad.report import write_report

    measured, rows, pictures = measure(detector, data, f1max=f1max)
    report = _plain({**report, **measured, "device": device_name()})
    if folder is None:
        return report
    if detector.calibration is not None:
        write_json(folder / "calibration.json", detector.calibration._asdict())
    write_csv(folder / "scores.csv", rows)
    write_json(folder / "report.json", report)
    history = read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    write_report(
        folder / "report.html",
        report,
        scores=rows,
        history=history,
        pictures=pictures,
        config=settings_json,
        environment=environment(),
    )
    return report


def measure(detector: Detector, data: Dataset, *, f1max: bool = False) -> tuple[dict[str, Any], list[dict], list]:
    """Scores the test source: (measures, rows of scores.csv, pictures for the report)."""
    calibration, notes = detector.calibration, [*data.notes, *_calibration_notes(detector.calibration)]
    counts = {name: len(source) for name, source in data.sources.items()}
    result: dict[str, Any] = {"images": counts, "parameters": _count(detector.state), "notes": notes}
    result |= {"threshold": None, "fpr": None, "holdout_images": calibration.images if calibration else 0}
    if "test" not in data.sources or not len(data.sources["test"]):
        notes.append("The data has no test images: nothing was measured.")
        result |= dict.fromkeys(
            ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "aupro", "aupro_005")
        )
        return {**result, **_threshold(calibration, {}, f1max), "per_defect": []}, [], []
    source, facts = data.sources["test"], data.rows["test"]
    labels = _sample_labels(source)
    has_mask = np.asarray(facts.has_mask)
    weights = None
    if source.mask is not None and has_mask.any():
        weights = metrics.label_regions(_sample_masks(source))
    evaluation = score.evaluate(
        detector.method,
        detector.state,
        source,
        region_weights=weights,
        has_mask=has_mask,
        centre=calibration.pixel_median if calibration else 0.0,
        batch_size=_batch_size(detector.spec),
    )
    image = metrics.image_metrics(evaluation.image, labels)
    result |= {f"image_{name}": image[name] for name in ("auroc", "ap", "f1max")}
    result["image_auroc_of_map_max"] = metrics.image_metrics(evaluation.map_max, labels)["auroc"]
    result["image_auroc_of_map_mean"] = metrics.image_metrics(evaluation.map_mean, labels)["auroc"]
    pixel = {} if evaluation.pixels is None else jax.device_get(jax.jit(metrics.pixel_metrics)(evaluation.pixels))
    result |= {f"pixel_{name}": pixel.get(name) for name in ("auroc", "ap", "f1max")}
    result |= {name: pixel.get(name) for name in ("aupro", "aupro_005")}
    result |= _threshold(calibration, image, f1max)
    result["score_seconds"] = evaluation.seconds
    result["score_compile_seconds"] = evaluation.compile_seconds
    result["score_images_per_second"] = len(source) / max(evaluation.seconds, 1e-9)
    if any(facts.groups):
        per_video = score.normalize_groups(evaluation.image, np.asarray(facts.groups))
        result["image_auroc_per_video"] = metrics.image_metrics(per_video, labels)["auroc"]
    rows = score_rows(evaluation.image, facts.files, labels, facts.defects, calibration, result["threshold"])
    result["per_defect"] = _per_defect(rows)
    result |= _rates(rows)
    return result, rows, _pictures(detector, source, rows, has_mask)


def score_rows(scores, files, labels, defects, calibration, threshold) -> list[dict[str, Any]]:
    """Rows of scores.csv."""
    scores = np.asarray(scores)
    normalised = [None] * len(scores)
    if calibration is not None:
        zeros = np.zeros((len(scores), 0, 0), np.float32)
        normalised = score.normalize(Scores(scores, zeros), calibration).image.tolist()
    predicted = [None] * len(scores) if threshold is None else (scores > threshold).astype(int).tolist()
    columns = files, np.asarray(labels).tolist(), scores.tolist(), normalised, predicted, defects
    return [dict(zip(SCORE_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]


def _threshold(calibration: score.Calibration | None, image: Mapping[str, float], f1max: bool) -> dict[str, Any]:
    """The threshold and where it is from: held-out normals, or, if asked for by name, the labelled test set."""
    if f1max and np.isfinite(image.get("f1max_threshold", np.nan)):
        # the measure calls scores >= its threshold anomalous, a prediction scores > threshold
        below = np.nextafter(np.float32(image["f1max_threshold"]), np.float32(-np.inf))
        kind = "F1-max on labelled test images (optimistic)"
        return {"threshold": float(below), "threshold_kind": kind, "used_test_for": ["threshold"]}
    if calibration is None:
        return {"threshold": None, "threshold_kind": "none: no held-out normal images", "used_test_for": []}
    kind = f"quantile of held-out normal images, fpr={calibration.fpr:g}"
    return {
        "threshold": calibration.threshold,
        "threshold_kind": kind,
        "fpr": calibration.fpr,
        "used_test_for": [],
    }


def _calibration_notes(calibration: score.Calibration | None) -> list[str]:
    if calibration is None:
        return ["No normal images were held out, so there is no threshold; load with a holdout such as 0.1."]
    if calibration.images + 1 >= 1 / calibration.fpr:
        return []
    return [
        f"Only {calibration.images} held-out normal images: the finest false-positive rate they can state is "
        f"1/{calibration.images + 1}, coarser than the fpr={calibration.fpr:g} asked for. "
        "The threshold is their largest score."
    ]


def _rates(rows: list[dict]) -> dict[str, float | None]:
    def share(label):
        hits = [row["predicted"] for row in rows if row["label"] == label and row["predicted"] is not None]
        return float(np.mean(hits)) if hits else None

    return {"test_fpr": share(0), "test_tpr": share(1)}


def _per_defect(rows: list[dict]) -> list[dict[str, Any]]:
    normal = [row["score"] for row in rows if row["label"] == 0]
    table = []
    for defect in sorted({row["defect"] for row in rows if row["label"] == 1}):
        own = [row for row in rows if row["label"] == 1 and row["defect"] == defect]
        scores = [*normal, *(row["score"] for row in own)]
        labels = [0] * len(normal) + [1] * len(own)
        flags = [row["predicted"] for row in own]
        table.append(
            {
                "defect": defect,
                "images": len(own),
                "image_auroc": metrics.image_metrics(np.asarray(scores), np.asarray(labels))["auroc"],
                "detected": None if None in flags else sum(flags),
            }
        )
    return table


def _pictures(detector: Detector, source: Source, rows: list[dict], has_mask: np.ndarray) -> list:
    """The telling samples: anomalous ones with the highest and the lowest scores, normal ones with the highest."""
    from jaxad.report import Picture

    order = np.argsort([-row["score"] for row in rows], kind="stable")
    labels = np.asarray([row["label"] for row in rows])
    anomalous, others = order[labels[order] == 1], order[labels[order] != 1]
    chosen = [*anomalous[:_SHOWN], *anomalous[-_SHOWN:], *others[:_SHOWN], *others[-2:]]
    chosen = np.asarray(list(dict.fromkeys(int(row) for row in chosen)), np.int32)
    part = select(source, chosen)
    scores = score.score_dataset(detector.method, detector.state, part, batch_size=_batch_size(detector.spec))
    frames = chosen if source.start is None else np.asarray(source.start)[chosen] + source.target
    return [
        Picture(
            file=rows[row]["file"],
            defect=rows[row]["defect"],
            label=rows[row]["label"],
            score=rows[row]["score"],
            normalised=rows[row]["score_normalised"],
            predicted=rows[row]["predicted"],
            image=np.asarray(source.image[frame]),
            mask=np.asarray(source.mask[frame]) if source.mask is not None and has_mask[row] else None,
            map=scores.map[position],
        )
        for position, (row, frame) in enumerate(zip(chosen, frames, strict=True))
    ]


# --- reading a run back -------------------------------------------------------------------------------------------


def load_detector(folder: str | os.PathLike) -> Detector:
    """The trained detector of a run folder.

    Raises:
      FileNotFoundError: no run, or no checkpoint in it.
      ValueError: training was not finished.
    """
    from jaxad import methods

    folder = pathlib.Path(folder)
    chosen, spec = read_config(folder)
    method = methods.get(chosen.method)
    chosen, cfg = settings.resolve(method, chosen)
    saved = checkpoint.restore(folder / "checkpoint", template(method, cfg, spec))
    if saved.meta["position"][0] < len(method.phases(cfg)):
        raise ValueError(
            f"{folder} was interrupted at step {saved.step}; expected a finished run. "
            f"Finish it with: jaxad train {chosen.method} --out {folder} --resume"
        )
    path = folder / "calibration.json"
    calibration = score.Calibration(**json.loads(path.read_text())) if path.exists() else None
    return Detector(method, saved.state, calibration, spec)


def read_config(folder: pathlib.Path) -> tuple[settings.Settings, Spec]:
    """The settings of a run and the shapes of its data. Raises FileNotFoundError if the folder holds no run."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.json); expected a folder that `jaxad train` wrote.")
    values = json.loads(path.read_text())
    spec = Spec(tuple(values["spec"]["image"]), values["spec"]["sizes"])
    return settings.from_json(settings.read_file(path), origin=str(path)), spec


def _open_folder(out, chosen, data, spec, *, resume) -> pathlib.Path | None:
    """Makes the run folder and writes what is known before training; refuses to mix two runs."""
    if out is None:
        return None
    folder = pathlib.Path(out)
    config = {**chosen.to_json(), "spec": {"image": list(spec.image), "sizes": dict(spec.sizes)}}
    config["fingerprint"] = data.fingerprint
    if (folder / "config.json").exists():
        before = json.loads((folder / "config.json").read_text())
        if not resume:
            raise ValueError(f"{folder} holds a run already; pass --resume to go on with it, or another --out.")
        if before != config:
            changed = sorted(name for name in config if before.get(name) != config[name])
            raise ValueError(
                f"{folder} was trained with another {', '.join(changed)}; expected the same to resume. "
                "Pass the settings of its config.json (--config), or another --out."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment())
    write_json(folder / "config.json", config)
    return folder


def free_folder(parent: pathlib.Path, name: str) -> pathlib.Path:
    """`parent/name`, or the first of `parent/name-2`, ... that does not exist."""
    number, folder = 1, parent / name
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


# --- facts and files ----------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, device and commit."""
    from importlib import metadata

    versions = {}
    for name in ("jaxad", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "command": sys.argv,
    }


def device_name() -> str:
    """The kind of device that runs are on, such as "cpu" or "NVIDIA H100"."""
    return jax.devices()[0].device_kind


def _commit() -> str | None:
    here = pathlib.Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one move, so that no reader and no crash sees half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes JSON; numbers that JSON has not (NaN, infinity) become null."""
    write_text(path, json.dumps(_plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of scores.csv."""
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=SCORE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that a crash cut short is left out."""
    return list(_whole_lines(path))


def _whole_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    return _number(value) if isinstance(value, float) else value


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _count(state: Any) -> int:
    """Numbers that the detector learned: its parameters where it has some, else its whole state."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(getattr(state, "params", state)))


def _batch_size(spec: Spec) -> int:
    """Samples scored at a time: 32, fewer where samples are large."""
    return max(1, min(32, 2**22 // int(np.prod(spec.image))))


def _sample_labels(source: Source) -> np.ndarray:
    labels = np.asarray(source.label)
    return labels if source.start is None else labels[np.asarray(source.start) + source.target]


def _sample_masks(source: Source) -> np.ndarray:
    masks = np.asarray(source.mask)
    return masks if source.start is None else masks[np.asarray(source.start) + source.target]


def _describe(chosen: settings.Settings, data: Dataset, spec: Spec) -> str:
    counts = ", ".join(f"{len(source)} {name}" for name, source in data.sources.items())
    size = "x".join(map(str, spec.image))
    return (
        f"{chosen.method} ({chosen.preset}) on {data.name} [{data.layout}]: {counts}; samples {size}; {device_name()}"
    )


def fit_detector(
    method: str, data: str | Dataset = "synthetic", *, out: str | os.PathLike | None = None, **options: Any
) -> Detector:
    """Trains a detector, as `jaxad train` does.

    Args:
      method: its name, such as "memae".
      data: a path or name for `jaxad.load`, or what it returned.
      out: a run folder to write; None writes nothing.
      **options: further fields of `Settings` (preset, seed, image_size, fpr, ...); others are fields of the method's
        config, such as learning_rate=1e-3.

    Raises:
      ValueError: settings or data that cannot work.
    """
    names = {field.name for field in dataclasses.fields(settings.Settings)} - {"method", "data", "config"}
    chosen = {name: value for name, value in options.items() if name in names}
    config = {name: value for name, value in options.items() if name not in names}
    where = data if isinstance(data, str) else getattr(data, "name", str(data))
    dataset = data if isinstance(data, Dataset) else None
    made = settings.Settings(method=method, data=where, config=config, **chosen)
    return train_run(made, out, data=dataset)[0]
