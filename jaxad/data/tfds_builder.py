"""The TensorFlow Datasets builder of jaxad: a folder as array_record files, made and read without TensorFlow.

Importing this module imports tensorflow_datasets and registers the builder as "folder_ad".
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import tensorflow_datasets as tfds

from jaxad.data import decode, loading
from jaxad.data.dataset import DataError


@dataclasses.dataclass
class FolderConfig(tfds.core.BuilderConfig):
    """One folder. The name tells data sets apart on disk."""

    layout: str | None = None
    normal_class: str | None = None


class FolderAd(tfds.core.GeneratorBasedBuilder):
    """A folder of normal and anomalous pictures, upright, 8 bits, RGB, at their own sizes, in the folder's order."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the data set's folder, for example mvtec/bottle"

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                "has_mask": np.bool_,
                "label": np.int32,
                "defect": tfds.features.Text(),
                "group": tfds.features.Text(),
                "file": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(
            features=features, description="Pictures for anomaly detection.", disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        config = self.builder_config
        plan = loading.plan(dl_manager.manual_dir, layout=config.layout, normal_class=config.normal_class)
        if plan.problems:
            raise DataError(plan.problems[0])
        roles = list(dict.fromkeys(record.role for record in plan.records))
        return {role: self._generate_examples(plan, role) for role in roles}

    def _generate_examples(self, plan, role):
        for key, record in enumerate(record for record in plan.records if record.role == role):
            image, facts = decode.full_picture(plan.store, record.file)
            where = plan.store.where(record.file)
            marked = decode.mask(plan.store, record.masks, where, facts.size)[0]
            label = int(marked.any()) if record.label is None else record.label
            yield (
                key,
                {
                    "image": _png(image.convert("RGB")),
                    "mask": _png(decode.as_image(marked)),
                    "has_mask": bool(record.masks),
                    "label": label,
                    "defect": record.defect if label or record.label == 0 else "good",
                    "group": record.group,
                    "file": record.file,
                },
            )


def _png(image) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    buffer.seek(0)
    return buffer
