"""Run folders: a training run from settings to report, with everything written where the next command finds it.

config.json        resolved settings, the data's fingerprint and shapes; usable as `--config`
environment.json   versions, device, commit
checkpoint/        the newest states (Orbax), written during training
metrics.jsonl      metrics of every step
calibration.json   statistics of held-out normals, with the threshold
scores.csv         the test images, raw and normalised scores, predictions
report.json        measures and timings
report.html        the same for people

A checkpoint is written every 15 seconds of training and at its end; JAXAD_SAVE_SECONDS is another interval, 0 for one
after every piece (50 steps, or a second of slower ones).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxad import checkpoint, distributed, score, settings, shard, train
from jaxad.console import Console
from jaxad.core import Method, Phase, Spec, as_arrays, spec_of
from jaxad.data import Dataset, load
from jaxad.detector import Detector, batch_size_for
from jaxad.files import (
    device_name,
    environment,
    number,
    plain,
    read_lines,
    write_csv,
    write_json,
    write_text,
)
from jaxad.measure import measure


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
    untrained: bool = False,
    mode: str | None = None,
    mesh: str | Mesh | None = None,
    console: Console | None = None,
) -> tuple[Detector, dict[str, Any]]:
    """Trains, calibrates, evaluates and writes a run folder.

    Args:
      chosen: settings, resolved or not.
      out: the run folder; None writes nothing.
      data: what to train on; None loads what the settings name.
      resume: go on from the folder's last checkpoint, if there is one.
      f1max: take the threshold from the labelled test set (optimistic, and marked so) instead of held-out normals.
      untrained: measure the detector before its first step too, as `untrained_image_auroc`.
      mode: see `train.drive`.
      mesh: devices to split batches over, such as "data=8" or a mesh of `jaxad.shard`; None: one device, or all of
        them where there are several processes.
      console: where to show progress.

    Of several processes (see `jaxad.distributed`) each makes the same call; the first one writes. They see one file
    system at `out`.

    Returns:
      (the detector, the content of report.json).

    Raises:
      ValueError: settings, data or a mesh that cannot work, a folder that holds another run.
      Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    from jaxad import methods

    console = console or Console(quiet=True)
    method = methods.get(chosen.method)
    chosen, cfg = settings.resolve(method, chosen)
    writes = distributed.is_first()
    if out is not None and writes and (pathlib.Path(out) / "config.json").exists() and not resume:
        raise ValueError(f"{out} holds a run already; pass --resume to go on with it, or another --out.")
    mesh = _mesh(mesh)
    if mesh is not None:
        shard.check_one_run(mesh)
        shard.check_batches(method.phases(cfg), mesh)
    began = time.perf_counter()
    data = data or load(chosen.data, seed=chosen.seed, **chosen.load_arguments())
    spec = spec_of(_training_sources(data))
    method.check(cfg, spec)
    folder = _open_folder(out, chosen, data, spec) if writes else None
    data = data.to_device() if mesh is None else _on_mesh(data, mesh)
    load_seconds = time.perf_counter() - began
    console.say(_describe(chosen, data, spec))
    if remark := _describe_devices(mesh, method.phases(cfg)):
        console.say(remark)
    checkpoints = pathlib.Path(out) / "checkpoint" if out is not None else None
    training = _Training(method, cfg, chosen.seed, _training_sources(data), folder, checkpoints, mesh, console)
    state, timings = training.run(resume=resume, mode=mode)
    detector = Detector(method, state, calibrate(method, state, data, chosen.fpr), spec)
    devices = 1 if mesh is None else mesh.size
    report = {"load_seconds": load_seconds, **timings, "devices": devices, "processes": distributed.count()}
    if untrained:
        start = jax.jit(lambda key: train.init(method, key, cfg, spec))(jax.random.key(chosen.seed))
        start = start if mesh is None else shard.replicate(start, mesh)
        before = measure(detector._replace(state=start, calibration=None), data)[0]
        report["untrained_image_auroc"] = before["image_auroc"]
    return detector, finish_run(detector, data, chosen, report, folder, f1max=f1max)


def _mesh(mesh: str | Mesh | None) -> Mesh | None:
    """The mesh of a run, from its description if need be; where there are several processes it has all devices."""
    if isinstance(mesh, str):
        sizes = shard.parse_mesh(mesh)
        mesh = shard.make_mesh(run=sizes["run"], data=sizes["data"])
    if not distributed.is_active():
        return mesh
    if mesh is not None and mesh.size != jax.device_count():
        raise ValueError(
            f"--mesh data={mesh.size} leaves out some of the {jax.device_count()} devices of {distributed.count()} "
            f"processes; expected all of them. Leave --mesh out, or start fewer processes."
        )
    return mesh or shard.data_mesh()


def _on_mesh(data: Dataset, mesh: Mesh) -> Dataset:
    return dataclasses.replace(data, sources={name: shard.replicate(s, mesh) for name, s in data.sources.items()})


def _describe_devices(mesh: Mesh | None, phases: Sequence[Phase]) -> str:
    """What the devices do; where some have nothing to do, how to use them."""
    if mesh is not None:
        each = f"{distributed.count()} processes, " if distributed.is_active() else ""
        return f"each batch split over {mesh.shape['data']} devices ({each}{device_name()})"
    count = jax.device_count()
    fitting = max(n for n in range(1, count + 1) if all(phase.batch_size % n == 0 for phase in phases))
    return (
        f"1 of {count} devices is used; --mesh data={fitting} splits each batch over {fitting}" if fitting > 1 else ""
    )


def _training_sources(data: Dataset) -> dict[str, Any]:
    """All sources but the test set, which no training sees."""
    return {name: source for name, source in data.sources.items() if name != "test"}


class _Spent(NamedTuple):
    """What training has cost so far, resumed parts included."""

    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    images: int = 0  # trained on in train_seconds


class _Training:
    """Drives the phases of a run, saving, logging and showing on the way."""

    def __init__(
        self,
        method: Method,
        cfg: Any,
        seed: int,
        sources: dict,
        folder: pathlib.Path | None,  # of the log
        checkpoints: pathlib.Path | None,  # which all processes write
        mesh: Mesh | None,
        console: Console,
    ):
        self.method, self.cfg, self.sources, self.console = method, cfg, sources, console
        self.checkpoints, self.mesh = checkpoints, mesh
        self.key = jax.random.key(seed)
        self.phases = method.phases(cfg)
        self.steps = [train.num_steps(p, len(train.source_of(method, p, sources))) for p in self.phases]
        self.save_seconds = _save_seconds()
        self.log = _Log(folder)
        self.spent = _Spent()

    def run(self, *, resume: bool, mode: str | None) -> tuple[Any, dict[str, float]]:
        """Trains to the end: (state, timings of the report). Raises Interrupted after saving."""
        start = self._restore() if resume else None
        if start is None:
            self.log.clear()
        state, saved_at, seen_at = None, time.monotonic(), time.monotonic()
        held = start and start[0]  # the position that is on disk already
        pieces = train.drive(self.method, self.key, self.cfg, self.sources, mode=mode, start=start, **self._placement())
        with _Signals() as signals:
            for progress in pieces:
                self._note(progress, time.monotonic() - seen_at)
                last = progress.position.phase == len(self.phases)
                # a signal counts at the very end too: only the measuring is left to resume
                stop, due = distributed.agree(bool(signals.caught), time.monotonic() - saved_at > self.save_seconds)
                if (last or stop or due) and progress.position != held:
                    self._save(progress)
                    saved_at = time.monotonic()
                if stop:
                    raise Interrupted(f"stopped by {signals.caught or 'a signal to another process'}")
                state, seen_at = progress.state, time.monotonic()
        seconds, compiling, images = self.spent
        rate = images / seconds if seconds else 0.0
        return state, {"train_seconds": seconds, "compile_seconds": compiling, "train_images_per_second": rate}

    def _placement(self) -> dict[str, Any]:
        """How `drive` spreads the run over devices."""
        if self.mesh is None:
            return {}
        options = {"place": shard.over_data(self.mesh), "sharding": shard.replicated(self.mesh)}
        # by its own clock every process would cut elsewhere
        return {**options, "patience": math.inf} if distributed.is_active() else options

    def _restore(self) -> tuple[train.Position, Any] | None:
        if self.checkpoints is None or checkpoint.latest(self.checkpoints) is None:
            return None
        shapes = template(self.method, self.cfg, spec_of(self.sources))
        whole = None if self.mesh is None else shard.replicated(self.mesh)
        saved = checkpoint.restore(self.checkpoints, shapes, sharding=whole)
        position = train.Position(*saved.meta["position"])
        self.spent = _Spent(*saved.meta["spent"])
        self.log.cut(position, [phase.name for phase in self.phases])
        self.console.say(f"resumed at step {saved.step} of {sum(self.steps)}")
        return position, saved.state

    def _save(self, progress: train.Progress) -> None:
        if self.checkpoints is None:
            return
        done = sum(self.steps[: progress.position.phase]) + progress.position.step
        meta = {"position": list(progress.position), "spent": list(self.spent)}
        checkpoint.save(self.checkpoints, done, progress.state, meta)

    def _note(self, progress: train.Progress, seconds: float) -> None:
        """Counts, logs and shows one piece."""
        compiling = progress.compile_seconds
        if compiling > 0.05:
            self.console.say(f"compiled {progress.name} in {compiling:.1f} s")
        if progress.name == "init":
            self.spent = self.spent._replace(compile_seconds=self.spent.compile_seconds + compiling)
            return
        index = progress.position.phase - (progress.position.step == 0)
        steps = len(next(iter(progress.metrics.values()), ()))
        self.spent = _Spent(
            self.spent.train_seconds + seconds - compiling,
            self.spent.compile_seconds + compiling,
            self.spent.images + steps * self.phases[index].batch_size,
        )
        step = progress.position.step or progress.steps
        self.log.write(progress.name, step, progress.metrics, steps)
        latest = {name: float(values[-1]) for name, values in progress.metrics.items()}
        rate = self.spent.images / max(self.spent.train_seconds, 1e-9)
        self.console.progress(progress.name, step, progress.steps, latest, rate)
        if latest.get("collapsed") and not progress.position.step:
            self.console.say(
                f"warning: {progress.name}: embeddings hardly differ (collapsed); scores may be rounding noise"
            )


def _save_seconds() -> float:
    text = os.environ.get("JAXAD_SAVE_SECONDS") or "15"
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"JAXAD_SAVE_SECONDS={text} is no number; expected seconds. Unset it, or pass 15.") from None


class _Log:
    """metrics.jsonl: a line for every step."""

    def __init__(self, folder: pathlib.Path | None):
        self.path = folder / "metrics.jsonl" if folder else None

    def clear(self) -> None:
        if self.path:
            write_text(self.path, "")

    def cut(self, position: train.Position, names: Sequence[str]) -> None:
        """Drops what was logged after the checkpoint that training goes on from."""
        if self.path and self.path.exists():
            order = {name: index for index, name in enumerate(names)}
            kept = [row for row in read_lines(self.path) if (order[row["phase"]], row["step"]) <= tuple(position)]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, phase: str, last: int, metrics: dict[str, np.ndarray], steps: int) -> None:
        """Appends the metrics of steps (last - steps, last]."""
        if not self.path:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for offset in range(steps):
                row = {"phase": phase, "step": last - steps + offset + 1}
                row |= {name: number(values[offset]) for name, values in metrics.items()}
                file.write(json.dumps(row) + "\n")


class _Signals:
    """While open, notes Ctrl-C and SIGTERM instead of dying of them; a second one kills as usual."""

    def __init__(self):
        self.caught = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for watched in (signal.SIGINT, signal.SIGTERM):
                self._before[watched] = signal.signal(watched, self._note)
        return self

    def _note(self, caught: int, frame: Any) -> None:
        del frame
        self.caught = signal.Signals(caught).name
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for caught, handler in self._before.items():
            signal.signal(caught, handler)


def template(method: Method, cfg: Any, spec: Spec) -> Any:
    """Shapes and dtypes of a method's state, without computing any of it."""
    return jax.eval_shape(lambda key: train.init(method, key, cfg, spec), jax.random.key(0))


# --- measuring ----------------------------------------------------------------------------------------------------


def calibrate(method: Method, state: Any, data: Dataset, fpr: float) -> score.Calibration | None:
    """Calibration on the data's held-out normals, or None if there are none."""
    holdout = data.sources.get("holdout")
    if holdout is None or not len(holdout):
        return None
    return score.calibrate(method, state, holdout, fpr=fpr, batch_size=batch_size_for(spec_of(data.sources)))


def finish_run(
    detector: Detector,
    data: Dataset,
    chosen: settings.Settings,
    timings: dict[str, float],
    folder: pathlib.Path | None,
    *,
    f1max: bool,
) -> dict[str, Any]:
    """Evaluates on the test source and writes calibration, scores and report. Returns the content of report.json."""
    from jaxad.report import write_report

    facts = {name: getattr(chosen, name) for name in ("method", "preset", "data", "image_size", "seed")}
    measured, rows, pictures = measure(detector, data, f1max=f1max)
    report = plain({**facts, "layout": data.layout, **timings, **measured, "device": device_name()})
    if folder is None:
        return report
    if detector.calibration is not None:
        write_json(folder / "calibration.json", detector.calibration._asdict())
    write_csv(folder / "scores.csv", rows)
    write_json(folder / "report.json", report)
    log = folder / "metrics.jsonl"
    write_report(
        folder / "report.html",
        report,
        scores=rows,
        history=read_lines(log) if log.exists() else [],
        pictures=pictures,
        config=chosen.to_json(),
        environment=environment(),
    )
    return report


def eval_run(
    run: str | os.PathLike,
    out: str | os.PathLike,
    *,
    data: str | None = None,
    fpr: float | None = None,
    fields: Mapping[str, Any] | None = None,
    f1max: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates a run again and writes report and scores to another folder.

    Args:
      run: the run's folder.
      out: where to write; made if need be.
      data: what to test on; None for the run's own data.
      fpr: recalibrates the threshold on the run's held-out normals; None keeps it.
      fields: other values of the method's config that leave what was trained as it is, such as how it adapts; they
        recalibrate too.
      f1max: take the threshold from the labelled test set (optimistic, and marked so).
      console: where to show what happens.

    Returns:
      The content of report.json.

    Raises:
      ValueError: `fields` that would need another training.
    """
    console = console or Console(quiet=True)
    detector = load_detector(run)
    chosen, _ = read_config(pathlib.Path(run))
    began = time.perf_counter()
    own = None
    if fields:
        detector, chosen = _with_fields(detector, chosen, fields)
        fpr = chosen.fpr if fpr is None else fpr
    if fpr is not None or data is None:
        own = load(chosen.data, seed=chosen.seed, **chosen.load_arguments())
    if fpr is not None and own is not None:
        detector = detector._replace(calibration=calibrate(detector.method, detector.state, own.to_device(), fpr))
    tested = load(data, seed=chosen.seed, **chosen.load_arguments()) if data else own
    assert tested is not None
    chosen = dataclasses.replace(chosen, data=data or chosen.data)
    timings = {"load_seconds": time.perf_counter() - began}
    console.say(_describe(chosen, tested, detector.spec))
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    return finish_run(detector, tested.to_device(), chosen, timings, folder, f1max=f1max)


def _with_fields(
    detector: Detector, chosen: settings.Settings, fields: Mapping[str, Any]
) -> tuple[Detector, settings.Settings]:
    """The detector with other values of its config, and its settings; ValueError where its arrays would change."""
    method, before = detector.method, jax.tree.leaves(detector.state)
    chosen, cfg = settings.resolve(method, dataclasses.replace(chosen, config={**chosen.config, **fields}))
    method.check(cfg, detector.spec)
    after = jax.tree.leaves(template(method, cfg, detector.spec))
    if [leaf.shape for leaf in after] != [leaf.shape for leaf in before]:
        given = " ".join(f"--set {name}={value}" for name, value in fields.items())
        raise ValueError(
            f"{given} changes what is trained; expected fields that change how a trained {method.name} scores. "
            f"Train another: jaxad train {method.name} {given}."
        )
    return detector._replace(state=detector.state._replace(cfg=as_arrays(cfg))), chosen


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


def _open_folder(out, chosen, data, spec) -> pathlib.Path | None:
    """Makes the run folder and writes what is known before training; refuses to resume with other settings."""
    if out is None:
        return None
    folder = pathlib.Path(out)
    config = {**chosen.to_json(), "spec": {"image": list(spec.image), "sizes": dict(spec.sizes)}}
    config["fingerprint"] = data.fingerprint
    if (folder / "config.json").exists():
        before = json.loads((folder / "config.json").read_text())
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


def _describe(chosen: settings.Settings, data: Dataset, spec: Spec) -> str:
    counts = ", ".join(f"{len(source)} {name}" for name, source in data.sources.items())
    size = "x".join(map(str, spec.image))
    return (
        f"{chosen.method} ({chosen.preset}) on {data.name} [{data.layout}]: {counts}; samples {size}; {device_name()}"
    )


def fit_detector(
    method: str,
    data: str | Dataset = "synthetic",
    *,
    out: str | os.PathLike | None = None,
    mesh: str | Mesh | None = None,
    **options: Any,
) -> Detector:
    """Trains a detector, as `jaxad train` does.

    Args:
      method: its name; `jaxad list` has them.
      data: a path or name for `jaxad.load`, or what it returned.
      out: a run folder to write; None writes nothing.
      mesh: devices to split batches over, such as "data=8"; None: one device.
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
    return train_run(made, out, data=dataset, mesh=mesh)[0]
