"""Where data lies: a path of this machine, or an address in an object store or another file system.

    s3://bucket/folder/pairs.parquet                                             S3, and what speaks as it does
    s3://bucket/pairs.parquet?endpoint_override=127.0.0.1:9000&scheme=http       MinIO, Ceph, R2 and others
    gs://bucket/...   abfs://container@account.dfs.core.windows.net/...   hdfs://host:8020/...   file:///...

What logs in comes from the environment, never from an address: addresses stand in recipes and messages.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, urlsplit

from anchored.errors import DataError
from anchored.runs import one_line, written_aside

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://(?P<authority>[^/?]*)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
_BUCKETS = ("s3", "s3a", "s3n", "gs", "gcs")
"""What stands first in these is a bucket alone."""
_SECRET_OPTION = re.compile(r"[?&][^=&]*(key|secret|token|password|credential)[^=&]*=", re.IGNORECASE)
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY")
_WHOLE_WHEN_CLOSED = ("s3", "gcs", "abfs")
"""Types of file systems where nothing is seen of a file before all of it is there."""
_READ_AHEAD = 4 * 2**20
"""Bytes that come with one request where a file is read from its beginning to its end."""

_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "gcs": "set GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "abfs": "set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or `az login`",
    "abfss": "set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or `az login`",
}
_NO_ACCESS = re.compile(
    r"ACCESS_DENIED|ACCESS_KEY|SIGNATURE|TOKEN|HTTP response code 40[13]|UNAUTH|PERMISSION|Unauthorized|credential",
    re.I,
)
_NO_NETWORK = re.compile(r"curlCode|NETWORK|resolve|connect|timed? ?out|unavailable", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Address:
    """A file or folder elsewhere: as much of a `Path` as data needs. What fails is a DataError that names it."""

    name: str
    _spelt: str
    """For people, without options."""
    _system: FileSystem
    _path: str

    def __str__(self) -> str:
        return self._spelt

    def __truediv__(self, below: str) -> Address:
        return replace(
            self, name=PurePosixPath(below).name, _spelt=f"{self._spelt}/{below}", _path=f"{self._path}/{below}"
        )

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self._info().is_file

    def is_dir(self) -> bool:
        from pyarrow.fs import FileType

        return self._info().type == FileType.Directory

    def bucket(self) -> Address:
        """What it lies in: nothing can be put where that is not."""
        first = self._path.lstrip("/").partition("/")[0] if self._system.type_name in _WHOLE_WHEN_CLOSED else "/"
        return replace(self, name=first, _path=first)

    def files(self) -> list[str]:
        """The files in this folder and those below it, as seen from here."""
        from pyarrow.fs import FileSelector

        with self._named("read"):
            found = self._system.get_file_info(FileSelector(self._path, recursive=True))
        return [str(PurePosixPath(one.path).relative_to(self._path)) for one in found if one.is_file]

    def open(self) -> Any:
        """The file, to read from any place of it."""
        return self._system.open_input_file(self._path)

    def put(self, file: Path) -> None:
        """A copy of `file` under this address: whole, or not at all."""
        from pyarrow.fs import LocalFileSystem, copy_files

        def copy_to(path: str) -> None:
            copy_files(str(file), path, source_filesystem=LocalFileSystem(), destination_filesystem=self._system)

        with self._named("written"):
            if self._system.type_name in _WHOLE_WHEN_CLOSED:
                copy_to(self._path)
                return
            place = PurePosixPath(self._path)
            aside = str(place.with_name(f".{place.name}.partial"))
            self._system.create_dir(str(place.parent), recursive=True)
            copy_to(aside)
            if self._info().is_file:  # Hadoop moves nothing onto a file
                self._system.delete_file(self._path)
            self._system.move(aside, self._path)

    def _info(self) -> FileInfo:
        with self._named("read"):
            return cast("FileInfo", self._system.get_file_info(self._path))

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self}: cannot be {what} ({problem(self, error)})") from None


Place = Path | Address


def place_of(source: str | Path) -> Place:
    """Where a source is, of this machine or elsewhere; raises DataError for an address that is none of ours."""
    match = _ADDRESS.match(source) if isinstance(source, str) else None
    if match is None:
        return Path(source).expanduser()
    source, scheme = str(source), match["scheme"].lower()
    check_harmless(source)
    if scheme not in _SCHEMES:
        told = source if "@" not in source else f"{scheme}://..."
        raise DataError(
            f"{told}: no data is had by {scheme}://; use s3://, gs://, abfs://, hdfs:// or file://, or a copy here"
        )
    if scheme == "file":
        return Path(unquote(urlsplit(source).path))
    return _address(source)


def is_address(source: str | Path) -> bool:
    """Whether it says by which way it is to be had (`s3://`), so that it is no path."""
    return isinstance(source, str) and bool(_ADDRESS.match(source))


def holds_login(text: str) -> bool:
    """Whether an address holds what logs in, which must not be written or told anywhere."""
    match = _ADDRESS.match(text)
    if match is None or (scheme := match["scheme"].lower()) in (
        "http",
        "https",
    ):  # an endpoint's, which has its own rule
        return False
    authority, rest = match["authority"], match["rest"]
    if scheme in _BUCKETS:  # a secret may have a slash in it
        named = ":" in authority or "@" in authority.removeprefix("anonymous@")
    else:
        named = ":" in authority.rpartition("@")[0]
    return named or bool(_SECRET_OPTION.search(rest))


def check_harmless(text: str) -> None:
    """Raise a DataError, which does not repeat it, for an address that holds a login."""
    if holds_login(text):
        scheme = text.partition(":")[0].lower()
        way = _LOGIN.get("s3" if scheme in _BUCKETS[:3] else scheme, "log in as that file system's own tools do")
        raise DataError(f"{scheme}://...: the address holds a login, which others would read; leave it out and {way}")


def problem(place: Place, error: Exception) -> str:
    """What went wrong there, on one line, with the way out; no key stands in it."""
    if isinstance(place, Path):
        return one_line(error)
    scheme, said = str(place).partition(":")[0].lower(), (str(error).splitlines() or [""])[0]
    for name in _SECRETS:
        if secret := os.environ.get(name):
            said = said.replace(secret, f"[{name}]")
    if "libjvm" in said or "libhdfs" in said:
        return f"{said}: it takes Hadoop's own libraries; set JAVA_HOME, HADOOP_HOME and CLASSPATH"
    if _NO_NETWORK.search(said):
        way = (
            "; AWS_ENDPOINT_URL, or ?endpoint_override=HOST:PORT&scheme=http, names the server"
            if scheme == "s3"
            else ""
        )
        return f"{one_line(said)}; see whether it can be reached from here{way}"
    if _NO_ACCESS.search(said):
        return f"{one_line(said)}; to log in {_LOGIN.get(scheme, 'use the tools of that file system')}"
    return one_line(said)


def opened(place: Place, in_order: bool) -> IO[bytes]:
    """A file to read; `in_order` if it is read from its beginning to its end."""
    if isinstance(place, Path):
        return open(place, "rb")
    handle = place.open()
    return cast("IO[bytes]", io.BufferedReader(handle, _READ_AHEAD) if in_order else handle)


def files_below(folder: Place) -> list[PurePosixPath]:
    """The files in a folder and those below it, as seen from there, sorted."""
    if isinstance(folder, Address):
        return sorted(map(PurePosixPath, folder.files()))
    below = (PurePosixPath(file.relative_to(folder).as_posix()) for file in folder.rglob("*") if not file.is_dir())
    return sorted(below)


@contextmanager
def written_whole(place: Place) -> Iterator[Path]:
    """A file of this machine to write; it is at `place` when the block succeeds, and nothing is there when it fails."""
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(place) as aside:
            yield aside
        return
    with tempfile.TemporaryDirectory(prefix="anchored-") as folder:
        aside = Path(folder) / place.name
        yield aside
        place.put(aside)


def copied(file: Path, to: Place) -> None:
    """A copy of a file of this machine: whole, or not at all. Raises DataError."""
    if isinstance(to, Address):
        to.put(file)
        return
    try:
        with written_whole(to) as aside:
            shutil.copyfile(file, aside)
    except OSError as error:
        raise DataError(f"{to}: cannot be written ({one_line(error)})") from None


def check_folder(folder: Place) -> None:
    """Raise a DataError where files could not be put into a folder, which need not be there yet."""
    if folder.is_file():
        raise DataError(f"{folder}: is a file; name a folder")
    check_bucket(folder)


def check_bucket(place: Place) -> None:
    """Raise a DataError for a bucket that is not there or cannot be reached."""
    if isinstance(place, Address) and not place.bucket().exists():
        raise DataError(f"{place}: there is no such bucket at this store; make it, or correct its name")


def _address(source: str) -> Address:
    from pyarrow.fs import FileSystem

    spelt = source.partition("?")[0].rstrip("/")
    # people write blanks and umlauts, which an URI spells otherwise
    uri = quote(source, safe="%/:?#[]@!$&'()*+,;=~")
    nowhere = Address(PurePosixPath(spelt).name, spelt, cast("FileSystem", None), "")
    try:
        system, path = FileSystem.from_uri(uri)
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{spelt}: cannot be opened ({problem(nowhere, error)})") from None
    return replace(nowhere, _system=system, _path=path.rstrip("/"))
