"""Where a data set lies: a folder of this machine, or one behind a URL whose files come through a cache."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from data_pipeline.cache import Cache, Entry
from data_pipeline.fault import UserError
from data_pipeline.index import DATASET_FILE, DatasetIndex, Shard, parse_dataset, read_dataset
from data_pipeline.objects import object_body, require_driver
from data_pipeline.transfer import Patience, Wanted, transfer
from data_pipeline.urls import (
    check_url,
    file_url,
    folder_url,
    is_object,
    is_remote,
    local_path,
    tars_url,
)
from data_pipeline.web import web_body

CACHE_BYTES = 64 << 30
MOST_JSON = 1 << 30  # bytes of a dataset.json: four million shards
MOST_INDEX = 64 << 20  # bytes of an index beyond those of its tar
PATIENCE = Patience()


class Folder:
    """A data set in a folder of this machine; the tars may lie in another one."""

    def __init__(self, root: Path, *, tars: str = "") -> None:
        self.root = root
        self._tars = root / local_path(tars) if tars else root

    def shard_path(self, shard: Shard) -> Path:
        """The tar as a file of this machine; DATA where it is not there or of another size."""
        os.close(self.open_shard(shard))
        return self._tars / shard.name

    def open_shard(self, shard: Shard) -> int:
        """A descriptor of the tar, for reading; DATA as for its path."""
        path = _inside(self._tars, shard.name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(
                f"cannot open shard '{path}': {error.strerror}",
                mend="put the shard back and make it readable, or pack the data set again",
                place={"shard": shard.name},
            ) from None
        found = os.fstat(descriptor).st_size
        if found != shard.bytes:
            os.close(descriptor)
            raise UserError(
                f"shard '{path}' has {found} bytes, dataset.json says {shard.bytes}",
                mend="copy the shard again, or pack the data set again",
                place={"shard": shard.name},
            )
        return descriptor

    def index_path(self, shard: Shard) -> Path:
        """The index of a tar as a file of this machine."""
        return _inside(self.root, shard.index_name)


class RemoteFolder:
    """A data set whose tars lie behind a URL, and their indexes there, elsewhere, or in a folder.

    It holds neither connections nor locks, so threads can share it, and it can be copied, pickled and forked.
    """

    def __init__(self, indexes: Path | str, tars: str, cache: Cache) -> None:
        self.indexes, self.tars, self.cache = indexes, tars, cache

    def shard_path(self, shard: Shard) -> Path:
        """The tar as a file of this machine, fetched if need be; later it may be gone to make room."""
        with _placed(shard):
            return self.cache.path(self._tar(shard))

    def open_shard(self, shard: Shard) -> int:
        """A descriptor of the tar, for reading, fetched if need be; it stays whole while it is open."""
        with _placed(shard):
            return self.cache.open(self._tar(shard))

    def index_path(self, shard: Shard) -> Path:
        """The index of a tar as a file of this machine, fetched if need be; it stays a minute at least."""
        if isinstance(self.indexes, Path):
            return _inside(self.indexes, shard.index_name)
        with _placed(shard):
            return self.cache.path(self._index(shard, self.indexes))

    def prefetch(self, shard: Shard, stop: threading.Event) -> None:
        """Fetch the tar and its index if they are not there; StoppedError once `stop` is set."""
        if not isinstance(self.indexes, Path):
            self.cache.path(self._index(shard, self.indexes), stop)
        self.cache.path(self._tar(shard), stop)

    def forget(self, shard: Shard) -> bool:
        """To call where a member is not what was packed: drop the tar if it is not what was fetched.

        True where that was so, and the next start fetches it again; False where it came like that.
        """
        return self.cache.forget(self._tar(shard))

    def _tar(self, shard: Shard) -> Entry:
        url = file_url(self.tars, shard.name)
        return Entry("tar", Wanted(url, shard.bytes, shard.bytes), shard.sha256)

    def _index(self, shard: Shard, folder: str) -> Entry:
        url = file_url(folder, shard.index_name)
        return Entry("idx", Wanted(url, None, shard.bytes + MOST_INDEX), shard.index_sha256)


Store = Folder | RemoteFolder


class Opened(NamedTuple):
    """A data set: what dataset.json says, and where its files are."""

    dataset: DatasetIndex
    store: Store


def load_dataset(
    root: str | Path,
    *,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    patience: Patience = PATIENCE,
) -> Opened:
    """Read dataset.json at a path or URL; UserError (DATA, UNSAFE, USAGE, CONFIG) where that cannot be."""
    place = str(root) if isinstance(root, Path) else check_url(root)
    if isinstance(root, str) and is_remote(place):
        url = file_url(folder_url(place), DATASET_FILE)
        dataset = parse_dataset(_content(url, patience), url)
    else:
        dataset = read_dataset(root if isinstance(root, Path) else local_path(place))
    store = open_store(root, tars=dataset.tars, cache=cache, cache_bytes=cache_bytes, patience=patience)
    return Opened(dataset, store)


def open_store(
    root: str | Path,
    *,
    tars: str = "",
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    patience: Patience = PATIENCE,
) -> Store:
    """The files of a data set whose dataset.json is at `root` and names `tars` as their place.

    A Path is taken as it is, a text may also be a URL. `cache` is a folder of this machine (by default one
    in the user's cache folder), `cache_bytes` is what may lie there.
    """
    indexes: Path | str
    if isinstance(root, str) and is_remote(check_url(root)):
        indexes = folder_url(root)
        url = tars_url(indexes, tars)
        _require_drivers(indexes, url)
    else:
        indexes = root if isinstance(root, Path) else local_path(root)
        if not is_remote(check_url(tars)):
            return Folder(indexes, tars=tars)
        url = folder_url(tars)
        _require_drivers(url)
    folder = (cache if cache is not None else default_cache(url)).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder '{folder}': {error.strerror}",
            mend="give a folder of this machine that can be written, for what is fetched",
            code="CONFIG",
        ) from None
    return RemoteFolder(indexes, url, Cache(folder, cache_bytes, _body, patience))


def default_cache(url: str) -> Path:
    """Where the files of a URL are kept: a folder of its own below $XDG_CACHE_HOME or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = base if base.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a container whose user has no entry in passwd and no HOME
        folder = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return folder / "lockstep" / sha256(url.encode()).hexdigest()[:16]


def _body(url: str, start: int, size: int | None, patience: Patience) -> Iterator[bytes]:
    return (object_body if is_object(url) else web_body)(url, start, size, patience)


def _require_drivers(*urls: str) -> None:
    for url in filter(is_object, urls):
        require_driver(url)


def _content(url: str, patience: Patience) -> bytes:
    _require_drivers(url)
    content = bytearray()
    transfer(Wanted(url, None, MOST_JSON), _body, content.extend, patience=patience)
    return bytes(content)


@contextmanager
def _placed(shard: Shard) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        error.place.setdefault("shard", shard.name)
        raise


def _inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder; UNSAFE where it is a link that leads out."""
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"'{path}' is a link to '{path.resolve()}', outside its folder",
            mend="put the file itself there, or index the folder it is in: lockstep index FOLDER --out DEST",
            code="UNSAFE",
            place={"shard": name},
        )
    return path
