"""Reading archives that may come from strangers: tar, tar.gz and zip, never more of them than a dataset can need.

Nothing is unpacked here: the caller gets the contents of the files it asks for. Links are never followed.
"""

import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vimd_jax.errors import DatasetError

MAX_FILES = 500_000  # in one archive; ImageNet's validation images are 50,000
MAX_FILE_BYTES = 2**28
# Images hardly shrink in an archive, but lists do, so that a small archive may grow by more.
MAX_GROWTH, MAX_GROWTH_BYTES = 4, 2**28
SUFFIXES = (".tar", ".tgz", ".gz", ".zip")

# What the readers raise on damaged files; RuntimeError and its like are zipfile's.
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error),
    *(EOFError, ValueError, LookupError, OverflowError, RuntimeError),
)

Wanted = Callable[[str, int], bool]


class Archive:
    """The files of a tar, tar.gz or zip archive; any other file is taken for the only file of an archive.

    Attributes:
        path: the archive.
        progress: the share of it that has been read, from 0 to 1.
    """

    def __init__(self, path: Path):
        self.path, self.progress = path, 0.0
        self._read = 0  # bytes of the files so far

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Yields the paths and contents of the regular files for which `wanted(path, size)` holds.

        A tar within a tar is read too; the paths of its files begin with its own.

        Raises:
            DatasetError: the archive is damaged or too large, or a path or link leads out of it.
        """
        with self.path.open("rb") as file:
            magic = file.read(4)
        try:
            if magic.startswith(b"PK"):
                yield from self._read_zip(wanted)
            elif magic.startswith(b"\x1f\x8b") or tarfile.is_tarfile(self.path):
                yield from self._read_tar(wanted)
            elif self.path.name.lower().endswith(SUFFIXES):
                raise DatasetError(f"{self.path}: not a tar, tar.gz or zip archive; download it again")
            elif wanted(self.path.name, size := self.path.stat().st_size):
                self._check_size(self.path.name, size)
                yield self.path.name, self.path.read_bytes()
        except DatasetError:
            raise
        except _DAMAGE as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DatasetError(f"{self.path}: damaged or truncated ({cause!r}); download it again") from None
        self.progress = 1.0

    def _read_tar(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        with self.path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = _Bounded(gzip.GzipFile(fileobj=raw) if zipped else raw, self._refused_size(), self._max_bytes())
            for file in self._tar_files(stream, wanted):
                self.progress = raw.tell() / self.path.stat().st_size
                yield file
            while stream.read(2**20):  # gzip compares its checksum at the end
                pass

    def _tar_files(self, stream: BinaryIO, wanted: Wanted, folder: str = "") -> Iterator[tuple[str, bytes]]:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=2**16) as tar:
            for number, member in enumerate(tar):
                self._check_count(number)
                path = folder + self._checked_path(member.name)
                if member.issym() or member.islnk():
                    self._check_link(path, member.linkname, relative=member.issym())
                elif member.isreg() and path.endswith(".tar") and not folder:
                    yield from self._tar_files(tar.extractfile(member), wanted, f"{path}/")
                elif member.isreg() and wanted(path, member.size):
                    self._check_size(path, member.size)
                    self._read += member.size  # which of a sparse file is more than the archive holds
                    if self._read > self._max_bytes():
                        raise self._refused_size()
                    yield path, tar.extractfile(member).read()
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all

    def _read_zip(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
            self._check_count(len(members))
            if any(member.header_offset < 0 for member in members):
                raise zipfile.BadZipFile("a file begins before the archive")
            if sum(member.file_size for member in members) > self._max_bytes():
                raise self._refused_size()
            for number, member in enumerate(members):
                self.progress = number / len(members)
                path = self._checked_path(member.filename)
                if stat.S_ISLNK(member.external_attr >> 16):
                    self._check_link(path, self._content(archive, member).decode(errors="replace"), relative=True)
                elif not member.is_dir() and wanted(path, member.file_size):
                    yield path, self._content(archive, member)

    def _content(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
        self._check_size(member.filename, member.file_size)
        with archive.open(member) as file:
            return file.read(member.file_size)  # without the size, as much would be inflated as there is

    def _max_bytes(self) -> int:
        return MAX_GROWTH * self.path.stat().st_size + MAX_GROWTH_BYTES

    def _checked_path(self, path: str) -> str:
        if _leads_out(path):
            raise self._refused(f"the path {path!r} leads out of the archive")
        return str(PurePosixPath(path))

    def _check_link(self, path: str, target: str, relative: bool) -> None:
        """Refuses a link that leads out; a symbolic link is relative to its own folder, a hard link to the archive."""
        if _leads_out(target, start=str(PurePosixPath(path).parent) if relative else ""):
            raise self._refused(f"the link {path!r} leads out of the archive")

    def _check_count(self, count: int) -> None:
        if count > MAX_FILES:
            raise self._refused(f"more than {MAX_FILES:,} files")

    def _check_size(self, path: str, size: int) -> None:
        if size > MAX_FILE_BYTES:
            raise self._refused(f"{path!r} is larger than {MAX_FILE_BYTES >> 20} MiB")

    def _refused_size(self) -> DatasetError:
        return self._refused(f"it unpacks to more than {self._max_bytes() >> 20} MiB")

    def _refused(self, reason: str) -> DatasetError:
        return DatasetError(f"{self.path}: {reason}; this is not an official archive")


class _Bounded:
    """A stream that raises an error once more than `limit` bytes have been read."""

    def __init__(self, stream: BinaryIO, error: DatasetError, limit: int):
        self._stream, self._error, self._left = stream, error, limit

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise self._error
        return data


def _leads_out(path: str, start: str = "") -> bool:
    """Whether a path, seen from the folder `start`, is absolute or climbs above the root."""
    path = path.replace("\\", "/")
    depth = len(PurePosixPath(start).parts)
    for part in PurePosixPath(path).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return path.startswith("/")
