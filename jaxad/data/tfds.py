"""Reading TensorFlow Datasets without TensorFlow, and writing folders as such."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from jaxad.data.dataset import DataError
from jaxad.data.oneclass import choose, parse
from jaxad.data.records import Plan, Record

_ROLES = {"validation": "holdout", "val": "holdout"}  # other splits are called as the roles are


def prepare(
    folder: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    name: str | None = None,
    layout: str | None = None,
    normal_class: int | str | None = None,
) -> str:
    """Writes a folder as a TFDS data set in array_record files: one large file a split instead of thousands.

    Args:
      folder: as for `jaxad.data.load`.
      data_dir: where TFDS data sets lie; None: TFDS's own default.
      name: of the data set; None: the folder's.
      layout, normal_class: as for `jaxad.data.load`.

    Returns:
      What to pass to `jaxad.data.load` to read it back.
    """
    import tensorflow_datasets as tfds

    from jaxad.data.tfds_builder import FolderAd, FolderConfig

    folder = pathlib.Path(folder).resolve()
    name = re.sub(r"\W+", "_", name or folder.name)
    chosen = None if normal_class is None else str(normal_class)
    config = FolderConfig(name=name, layout=layout, normal_class=chosen)
    builder = FolderAd(config=config, data_dir=data_dir, file_format="array_record")
    options = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_config=options)
    return f"tfds:{builder.data_dir}"


def plan(name: str, normal_class: int | str | None = None) -> Plan:
    """The plan of a prepared data set: one of `prepare`, or any other with an image and perhaps a class label.

    Args:
      name: a TFDS name ("mnist", "folder_ad/bottle") or the folder of a prepared data set.
      normal_class: the class that is normal, for sets of classes.

    Raises:
      DataError: it is unknown or not prepared as array_record, or has no picture.
    """
    store = _Splits(name)
    if {"image", "has_mask", "label", "defect", "group", "file"} <= set(store.features):
        return _own(store)
    result = Plan("tfds", store, [])
    if store.label is None:
        for picture in store.names:
            role = store.role(picture)
            result.records.append(Record(picture, role, 0 if role != "test" else -1, "good" if role != "test" else ""))
        result.notes.append("It has no class label: training pictures are taken as normal, test labels are unknown.")
        return result
    classes = store.features[store.label].names
    protocol = parse(store.where("").rstrip("/"), normal_class, classes)
    choose(result, ((n, store.role(n), classes[int(store.example(n)[store.label])]) for n in store.names), protocol)
    return result


def _own(store) -> Plan:
    records = []
    for name in store.names:
        example = store.example(name)
        defect, group = example["defect"].decode(), example["group"].decode()
        masks = (f"{name}#mask",) if example["has_mask"] else ()
        records.append(Record(name, store.role(name), int(example["label"]), defect, masks, group))
    return Plan("tfds", store, records)


class _Splits:
    """The splits of a prepared data set as a store of encoded pictures (see `jaxad.data.files`)."""

    def __init__(self, name: str):
        import tensorflow_datasets as tfds

        self._origin = f"tfds:{name}"
        self.problems: list[str] = []
        builder = _builder(name)
        self.features = builder.info.features
        image = _only(self.features, tfds.features.Image, "image")
        if image is None:
            raise DataError(
                f"{self._origin}: no picture among its features ({', '.join(self.features)}). Take another set."
            )
        self._image = image
        self.label = _only(self.features, tfds.features.ClassLabel, "label")
        pictures = [key for key, feature in self.features.items() if isinstance(feature, tfds.features.Image)]
        skip = {key: tfds.decode.SkipDecoding() for key in pictures}  # jaxad's own decoder reads them, in threads
        self._places: dict[str, tuple[Any, int, str]] = {}
        for split, info in builder.info.splits.items():
            source = builder.as_data_source(split, decoders=skip)
            for i in range(info.num_examples):
                name = source[i]["file"].decode() if "file" in self.features else f"{split}/{i:06d}"
                self._places[name] = source, i, _ROLES.get(split, split)
        self.names = list(self._places)
        self._stamp = (
            f"{builder.info.full_name} {os.stat(pathlib.Path(builder.data_dir) / 'dataset_info.json').st_mtime_ns}"
        )

    def example(self, name: str) -> dict[str, Any]:
        source, i, _ = self._places[name]
        return source[i]

    def role(self, name: str) -> str:
        return self._places[name][2]

    def where(self, name: str) -> str:
        return f"{self._origin}/{name}"

    def has(self, name: str) -> bool:
        return name in self._places

    def stamp(self, name: str) -> str:
        return self._stamp

    def read(self, name: str) -> bytes:
        own, _, mask = name.partition("#")
        return self.example(own)[mask or self._image]


def _only(features: Any, kind: type, usual: str) -> str | None:
    """The feature of a kind that has the usual name, or is the only one of its kind."""
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    return usual if usual in found else found[0] if len(found) == 1 else None


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    how = f"tfds.builder('{name}', file_format='array_record').download_and_prepare() where there is a network"
    try:
        if os.path.isdir(name):
            builder = tfds.builder_from_directory(name)
        elif name.startswith("folder_ad/"):
            from jaxad.data.tfds_builder import FolderAd, FolderConfig

            builder, how = FolderAd(config=FolderConfig(name=name.split("/")[1])), "jaxad.data.tfds.prepare(FOLDER)"
        else:
            builder = tfds.builder(name, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError:
        raise DataError(
            f"tfds:{name}: no such builder is installed. Check the name, or give a prepared folder."
        ) from None
    except Exception as error:  # a wrong config, version or a folder of something else: half a dozen types
        first = str(error).strip().splitlines()[0]
        raise DataError(f"tfds:{name}: cannot be opened ({first}). Check the name and the folder.") from None
    ready = {f.value for f in builder.info.available_file_formats()} & {"array_record", "parquet"}
    if not builder.is_prepared() or not ready:
        raise DataError(
            f"tfds:{name}: not prepared in {builder.data_dir} as array_record; nothing is downloaded here. Run {how}."
        )
    return builder
