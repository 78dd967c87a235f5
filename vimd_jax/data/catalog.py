"""The eight fine-grained datasets of the ViMD experiments, and ImageNet: classes, split sizes, names in TFDS."""

import dataclasses


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
