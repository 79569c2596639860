"""The verbs that make and use runs: demo, train, eval, predict, export."""

from __future__ import annotations

import pathlib
import shlex
import sys
from typing import Annotated, Any, Literal

import tyro

from jaxad.cli.app import Flag, app, measures_of, parse_size
from jaxad.console import Console
from jaxad.distributed import Cluster

_INTERRUPTED = 130


@app.command(name="demo")
def demo(*, out: str | None = None, seed: int = 0, quiet: Flag = False) -> None:
    """Train and evaluate a detector on the embedded synthetic pictures; prints a table, leaves a report.

    Args:
      out: folder of the run; a new one below runs/ if not given.
      seed: of data order, initialisation and the pictures.
      quiet: print nothing.
    """
    from jaxad import files, settings

    console = Console(quiet)
    folder = pathlib.Path(out) if out else files.free_folder(pathlib.Path("runs"), "demo")
    report = _train(settings.Settings(method="memae", preset="demo", seed=seed), folder, console, untrained=True)
    before = {"detector": "untrained", "image AUROC": report["untrained_image_auroc"]}
    console.table([{"detector": "trained", **measures_of(report)}, before])
    console.say(f"Look at {folder / 'report.html'}")


@app.command(name="train")
def train(
    method: tyro.conf.Positional[str],
    *,
    data: str | None = None,
    layout: str | None = None,
    image_size: str | None = None,
    normal_class: str | None = None,
    holdout: float | None = None,
    labels_per_type: int | None = None,
    labels_total: int | None = None,
    clip_stride: int | None = None,
    preset: str | None = None,
    set: tyro.conf.UseAppendAction[list[str]] = [],  # noqa: A002, B006 - the flag's name; tyro copies it
    config: str | None = None,
    seed: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    fpr: float | None = None,
    threshold: Literal["holdout", "f1max"] = "holdout",
    out: str | None = None,
    resume: Flag = False,
    mesh: str | None = None,
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = Cluster(),  # noqa: B008 - frozen
    quiet: Flag = False,
) -> None:
    """Train a method, calibrate it on held-out normal pictures, evaluate it, and write a run folder.

    Args:
      method: name of a method (see `jaxad list`).
      data: folder, ZIP or table of pictures, `synthetic`, `synthetic:FAMILY` or `tfds:NAME`.
      layout: how the pictures are arranged, if it is not recognised.
      image_size: pixels a side, or HEIGHTxWIDTH; the preset's if not given.
      normal_class: the class that is normal, for sets of classes.
      holdout: share of the normal training pictures kept for the threshold.
      labels_per_type: anomalous test pictures of each type that training may use, and testing may not; for any method,
        so that all are tested on the same pictures.
      labels_total: at most so many of them in all.
      clip_stride: frames between the starts of clips, for videos; 1 if not given.
      preset: named settings of the method (see `jaxad list`).
      set: field=value of the method's config; may be repeated.
      config: file with settings, YAML or JSON, such as the config.json of a run; flags win.
      seed: of everything that is drawn.
      dtype: of the heavy arithmetic.
      fpr: share of normal pictures that may be called anomalous.
      threshold: from held-out normals, or F1-max on the labelled test pictures (optimistic; the report says so).
      out: folder of the run; a new one below runs/ if not given.
      resume: go on from the last checkpoint in the folder, if there is one.
      mesh: devices over which each batch is split, such as data=8; one device if not given, all where there are several
        processes.
      cluster: the other processes of the run.
      quiet: print nothing.
    """
    from jaxad import distributed, files, settings

    base: dict[str, Any] = settings.read_file(config) if config else {}
    if resume and out and (pathlib.Path(out) / "config.json").exists() and not config:
        base = settings.read_file(pathlib.Path(out) / "config.json")
    settings.from_json({"method": method, **base}, origin=config or "settings")  # checks it before flags go in
    fields = {**base.get("config", {}), **({"dtype": dtype} if dtype else {}), **settings.parse_assignments(set)}
    given = {
        "data": data,
        "layout": layout,
        "image_size": parse_size(image_size),
        "normal_class": normal_class,
        "holdout": holdout,
        "labels_per_type": labels_per_type,
        "labels_total": labels_total,
        "clip_stride": clip_stride,
        "preset": preset,
        "seed": seed,
        "fpr": fpr,
    }
    given = {name: value for name, value in given.items() if value is not None}
    chosen = settings.from_json({**base, **given, "method": method, "config": fields}, origin=config or "settings")
    name = f"{method}-{pathlib.PurePath(chosen.data).name.replace(':', '-')}"
    with distributed.session(cluster):
        console = Console(quiet or not distributed.is_first())
        folder = pathlib.Path(out) if out else files.free_folder(pathlib.Path("runs"), name)
        folder = pathlib.Path(distributed.gather_facts([str(folder)])[0])  # the first process finds it
        report = _train(chosen, folder, console, resume=resume, f1max=threshold == "f1max", mesh=mesh)
        console.table([{"method": method, **measures_of(report)}])
        console.say(f"Look at {folder / 'report.html'}")


@app.command(name="eval")
def evaluate(
    run: tyro.conf.Positional[str],
    *,
    data: str | None = None,
    set: tyro.conf.UseAppendAction[list[str]] = [],  # noqa: A002, B006 - the flag's name; tyro copies it
    fpr: float | None = None,
    threshold: Literal["holdout", "f1max"] = "holdout",
    out: str | None = None,
    quiet: Flag = False,
) -> None:
    """Evaluate a trained run again: on other data, with other settings of scoring, or at another threshold.

    Args:
      run: folder of the run.
      data: other data to test on; its normal training pictures are not used. The run's own if not given.
      set: field=value of the method's config, for fields that change how it scores; may be repeated.
      fpr: another false-positive rate, for a threshold from the run's held-out normals.
      threshold: from held-out normals, or F1-max on the labelled test pictures (optimistic; the report says so).
      out: folder for report and scores; RUN/eval if not given.
      quiet: print nothing.
    """
    from jaxad import files, runs, settings

    console, fields = Console(quiet), settings.parse_assignments(set)
    folder = pathlib.Path(out) if out else files.free_folder(pathlib.Path(run), "eval")
    report = runs.eval_run(run, folder, data=data, fpr=fpr, fields=fields, f1max=threshold == "f1max", console=console)
    console.table([{"method": report["method"], **measures_of(report)}])
    console.say(f"Look at {folder / 'report.html'}")


@app.command(name="predict")
def predict(
    run: tyro.conf.Positional[str],
    paths: tyro.conf.Positional[tuple[str, ...]],
    *,
    out: str | None = None,
    save_maps: str | None = None,
    quiet: Flag = False,
) -> None:
    """Score pictures with a trained run; CSV rows file, score, score_normalised, predicted.

    Args:
      run: folder of the run.
      paths: picture files, folders of pictures, or - for a list of files on standard input.
      out: CSV file to write; standard output if not given.
      save_maps: folder for heat maps laid over the pictures.
      quiet: print no remarks.
    """
    from jaxad.predict import predict_run

    listed = [line.rstrip("\n") for line in sys.stdin if line.strip()] if "-" in paths else []
    wanted = [path for path in paths if path != "-"] + listed
    predict_run(run, wanted, out=out, save_maps=save_maps, console=Console(quiet))


@app.command(name="export")
def export(run: tyro.conf.Positional[str], *, out: str, platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")) -> None:
    """Write a trained run as StableHLO that needs only jax: uint8 pictures in, image scores and maps out.

    Args:
      run: folder of the run.
      out: file to write.
      platforms: where it shall run.
    """
    from jaxad import runs
    from jaxad.export import export_score

    detector = runs.load_detector(run)
    artefact = export_score(detector.method, detector.state, detector.spec, platforms=platforms)
    pathlib.Path(out).write_bytes(artefact)


def _train(chosen, folder: pathlib.Path, console: Console, **options: Any) -> dict[str, Any]:
    from jaxad import distributed, runs

    try:
        return runs.train_run(chosen, folder, console=console, **options)[1]
    except (runs.Interrupted, KeyboardInterrupt) as stop:
        alone = isinstance(stop, KeyboardInterrupt) and distributed.is_active()  # the others know nothing of it
        if alone or not (folder / "config.json").exists():
            raise KeyboardInterrupt from None  # nothing to go on with
        console.close()
        again = ["jaxad", "train", chosen.method, "--out", str(folder), "--resume"]
        again += ["--threshold", "f1max"] if options.get("f1max") else []
        again += ["--mesh", options["mesh"]] if options.get("mesh") else []
        if distributed.is_first():
            print(f"{stop or 'interrupted'}; go on with: {shlex.join(again)}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
