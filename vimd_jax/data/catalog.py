"""The eight fine-grained datasets of the ViMD experiments, and ImageNet: classes, split sizes, where to find them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a published dataset; `load_source` checks the pictures it finds against it.

    Attributes:
        title: the dataset's usual name.
        num_classes: number of classes.
        train_sizes: accepted numbers of training pictures, held-out validation pictures included.
        test_size: number of test pictures.
        tfds_name: name in TensorFlow Datasets, or None where TFDS does not have it.
        tfds_train: the TFDS splits that make up the training pictures.
        tfds_test: the TFDS split of the test pictures.
    """

    title: str
    num_classes: int
    train_sizes: tuple[int, ...]
    test_size: int
    tfds_name: str | None = None
    tfds_train: str = "train"
    tfds_test: str = "test"


DATASETS = {
    "cub": DatasetInfo("Caltech-UCSD Birds 200-2011", 200, (5994,), 5794, "caltech_birds2011"),
    "cars": DatasetInfo("Stanford Cars", 196, (8144,), 8041, "cars196"),
    "dogs": DatasetInfo("Stanford Dogs", 120, (12000,), 8580, "stanford_dogs"),
    "pets": DatasetInfo("Oxford-IIIT Pets", 37, (3680,), 3669, "oxford_iiit_pet"),
    # Experiments differ in whether the 1,020 validation pictures are trained on; both sizes are in use.
    "flowers": DatasetInfo("Oxford Flowers 102", 102, (2040, 1020), 6149, "oxford_flowers102", "train+validation"),
    "mit67": DatasetInfo("MIT Indoor Scenes 67", 67, (5360,), 1340),
    "action": DatasetInfo("Stanford 40 Actions", 40, (4000,), 5532),
    "aircraft": DatasetInfo("FGVC-Aircraft", 100, (6667,), 3333),
    "imagenet": DatasetInfo("ImageNet-1k", 1000, (1281167,), 50000, "imagenet2012", tfds_test="validation"),
}
