"""The eight fine-grained datasets of the ViMD experiments, and ImageNet: classes, split sizes, names in TFDS."""

import dataclasses

from vimd_jax.errors import DatasetError


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A published dataset; `load_source` checks the images it finds against these numbers.

    Attributes:
        title: the dataset's usual name.
        num_classes: number of classes.
        train_sizes: accepted numbers of training images, including any held out for validation; the first is what TFDS
            and the configs use.
        test_size: number of test images.
        tfds_name: name in TensorFlow Datasets, or None if it is not there.
        tfds_train: the TFDS splits that make up the training set.
        tfds_test: the TFDS split used as the test set.
    """

    title: str
    num_classes: int
    train_sizes: tuple[int, ...]
    test_size: int
    tfds_name: str | None = None
    tfds_train: str = "train"
    tfds_test: str = "test"


DATASETS = {
    "cub": DatasetInfo("CUB-200-2011", 200, (5994,), 5794, "caltech_birds2011"),
    "cars": DatasetInfo("Stanford Cars", 196, (8144,), 8041, "cars196"),
    "dogs": DatasetInfo("Stanford Dogs", 120, (12000,), 8580, "stanford_dogs"),
    "pets": DatasetInfo("Oxford-IIIT Pet", 37, (3680,), 3669, "oxford_iiit_pet"),
    # The official split has 1,020 training and 1,020 validation images; published work trains on both or the first.
    "flowers": DatasetInfo("Oxford Flowers 102", 102, (2040, 1020), 6149, "oxford_flowers102", "train+validation"),
    "mit67": DatasetInfo("MIT Indoor 67", 67, (5360,), 1340),
    "action": DatasetInfo("Stanford 40 Actions", 40, (4000,), 5532),
    "aircraft": DatasetInfo("FGVC-Aircraft", 100, (6667,), 3333),
    "imagenet": DatasetInfo("ImageNet-1k", 1000, (1281167,), 50000, "imagenet2012", tfds_test="validation"),
}


def check_complete(name: str, place: object, classes: int, train_size: int, test_size: int) -> None:
    """Raises unless the data are the whole published dataset: a missing image or class would skew every comparison.

    Args:
        name: of the dataset, in `DATASETS`.
        place: where the data lie, for the message.
        classes: number of classes found there.
        train_size: number of training images, including any held out for validation.
        test_size: number of test images.
    """
    info = DATASETS[name]
    if classes == info.num_classes and train_size in info.train_sizes and test_size == info.test_size:
        return
    expected = " or ".join(map(str, info.train_sizes))
    raise DatasetError(
        f"{place} contains {classes} classes, {train_size} training and {test_size} test images, but {info.title} "
        f"(config.dataset.name={name}) has {info.num_classes} classes, {expected} training and {info.test_size} "
        "test images; add what is missing, or use the data as they are with config.dataset.name=folder"
    )
