"""A dataset that TensorFlow Datasets has prepared."""

import io

from ml_collections import ConfigDict

from vimd_jax.data.catalog import DATASETS, check_complete
from vimd_jax.data.folder import LAYOUT
from vimd_jax.data.images import Reduction, ValueRange, decode_image
from vimd_jax.data.labels import cached_labels
from vimd_jax.data.source import Record, Source, hold_out
from vimd_jax.errors import DatasetError


class TfdsSource(Source):
    """A split that TensorFlow Datasets has prepared in its random-access format; reading needs no TensorFlow."""

    def __init__(self, name: str, split: str, value_range: ValueRange = ()):
        """Opens the data; the first time, every label is read, see `cached_labels`.

        Args:
            name: the dataset's TFDS name, prepared in TFDS_DATA_DIR or ~/tensorflow_datasets.
            split: TFDS split expression, such as "train+validation".
            value_range: see `read_image`.

        Raises:
            DatasetError: TFDS is not installed or the dataset has not been prepared.
        """
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise DatasetError(
                "TensorFlow Datasets is not installed; run: pip install 'vimd-jax[tfds]', "
                "or set config.dataset.directory to a folder of class folders"
            ) from None
        try:
            builder = tfds.builder(name, file_format="array_record")
            # Images stay encoded until decode_image, so that every source decodes alike.
            images = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
            decoders = {key: tfds.decode.SkipDecoding() for key in images}
            self._records = builder.as_data_source(split, decoders=decoders)
        except (KeyError, NotImplementedError, ValueError, OSError) as error:
            raise DatasetError(
                f"TensorFlow Datasets has not prepared {name}; run: tfds build {name} --file_format=array_record "
                "(needs tensorflow), or set config.dataset.directory to a folder of class folders"
            ) from error
        self.class_names = tuple(builder.info.features["label"].names)
        self.labels = cached_labels(self._records, f"{builder.info.full_name}-{split}")
        self._name, self._value_range = f"{name}[{split}]", value_range

    def read(self, i: int, reduction: Reduction | None = None) -> Record:
        record = self._records[int(i)]
        image = decode_image(io.BytesIO(record["image"]), self.name(i), reduction, self._value_range)
        return Record(image, int(record["label"]))

    def check(self, i: int) -> None:
        decode_image(io.BytesIO(self._records[int(i)]["image"]), self.name(i), header_only=True)

    def name(self, i: int) -> str:
        return f"{self._name} record {i}"


def load(config: ConfigDict, split: str, seed: int) -> Source:
    """A split of the dataset called config.name: see `load_source`."""
    info = DATASETS[config.name]
    if info.tfds_name is None:
        raise DatasetError(
            f"TensorFlow Datasets does not have {info.title}; set config.dataset.directory to a folder ({LAYOUT})"
        )
    part = info.tfds_test if split == "test" else info.tfds_train
    source = TfdsSource(info.tfds_name, part, tuple(config.value_range))
    sizes = (info.train_sizes[0], len(source)) if split == "test" else (len(source), info.test_size)
    place = f"TensorFlow Datasets' {info.tfds_name}"
    check_complete(config.name, place, len(source.class_names), *sizes)
    return source if split == "test" else hold_out(source, split, config.validation_fraction, seed)
