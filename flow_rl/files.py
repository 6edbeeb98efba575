"""Files and folders that the project writes: whole or not there, and never in the place of somebody else's."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flow_rl.errors import CannotWrite, SettingError

#: SHA-256 by name of the texts that `put_text` wrote into a folder
MANIFEST = ".flow-rl-written.json"
#: in a folder that an export wrote: the names of its files
MARK = ".flow-rl-export.json"
#: reasons that say that the disk, not the program, is at fault
STORAGE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.ENODEV, errno.ESTALE, errno.ENOTEMPTY, errno.EMFILE,
}  # fmt: skip


def reason(error: BaseException) -> str:
    """Why the disk refused, in the system's words."""
    said = getattr(error, "strerror", None) or str(error).splitlines()[0]
    if getattr(error, "errno", None) == errno.EFBIG:
        said += ", see `ulimit -f`"
    return said


@contextmanager
def writing(path: str | Path, *, advice: str = "Free space there, or write to another disk.") -> Iterator[None]:
    """Inside, an error of the disk ends in one message that names the path.

    Args:
        path: what is being written.
        advice: what to do.

    Raises:
        CannotWrite: the disk refused.
    """
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"Can't write '{path}': {reason(error)}. {advice}") from error


def nearest_existing(path: str | Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    absolute = Path(os.path.abspath(path))
    return next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))


def why_unwritable(directory: str | Path) -> str | None:
    """Why no file could be made in a folder that may not exist yet; None where it could. Nothing is written."""
    place = nearest_existing(directory)
    if not place.is_dir():
        return f"'{place}' is a file, and a folder is needed there" if place.exists() else f"'{place}' is a broken link"
    longest = max((len(os.fsencode(part)) for part in Path(directory).parts), default=0)
    try:
        limit = os.pathconf(place, "PC_NAME_MAX")
    except OSError as error:
        return f"'{place}': {reason(error)}"
    if longest > limit:
        return f"a name in it has {longest} bytes, and the disk takes at most {limit}"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"'{place}' is read-only"
    return None


# ----------------------------------------------------------------- texts


def put_text(path: str | Path, text: str) -> None:
    """Write a text whole or not at all, and remember it, so that the next `put_text` may replace it.

    Raises:
        SettingError: something is there that `put_text` did not write, or that was edited since.
        CannotWrite: the disk refused.
    """
    put_texts({path: text})


def put_texts(texts: Mapping[str | Path, str]) -> None:
    """Write texts that belong together, see `put_files`."""
    put_files({path: text.encode() for path, text in texts.items()})


def put_files(contents: Mapping[str | Path, bytes], *, durable: bool = True) -> None:
    """Write files that belong together, and remember them: all are complete before one replaces an older one.

    A file that has its content already is left alone, whoever wrote it.

    Args:
        contents: by path.
        durable: see `replacing_file`.

    Raises:
        SettingError: something is there that was not written here, or that was edited since; nothing was written.
        CannotWrite: the disk refused.
    """
    files = {Path(path): content for path, content in contents.items()}
    known = {folder: _written(folder) for folder in {path.parent for path in files}}
    new = {path: content for path, content in files.items() if not _refuse_foreign(path, known[path.parent], content)}
    with ExitStack() as stack:
        for path, content in new.items():
            stack.enter_context(writing(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(replacing_file(path, durable=durable)).write_bytes(content)
            known[path.parent][path.name] = hashlib.sha256(content).hexdigest()
    for folder in {path.parent for path in new}:
        with writing(folder):
            replace_file(folder / MANIFEST, (json.dumps(known[folder], indent=1, sort_keys=True) + "\n").encode())


def refuse_foreign_text(path: str | Path) -> None:
    """Refuse to replace a file that `put_files` did not write, or that was edited since.

    Raises:
        SettingError: naming the file.
    """
    _refuse_foreign(Path(path), _written(Path(path).parent), None)


def _refuse_foreign(path: Path, known: Mapping[str, str], content: bytes | None) -> bool:
    """Whether a file has this content already; see `put_files` for what is refused."""
    if not os.path.lexists(path):
        return False
    if path.is_file():
        there = path.read_bytes()
        if there == content:
            return True
        if hashlib.sha256(there).hexdigest() == known.get(path.name):
            return False
        what = "was edited since it was written here" if path.name in known else "was not written here"
    else:
        what = "is no file"
    raise SettingError(f"'{path}' {what}, and would be replaced. Move it or delete it, or write to another path.")


@contextmanager
def replacing_file(
    path: str | Path,
    *,
    partial: Path | None = None,
    put: Callable[[Path, Path], object] | None = None,
    durable: bool = True,
) -> Iterator[Path]:
    """A name to write a file under, which takes the place of `path` once the block is through.

    A crash leaves the old file or the new one, whole and on the disk. What the block wrote is removed where it fails.

    Args:
        path: of the file; its folder exists.
        partial: the name to write under; None makes one of this process.
        put: gives a file its name; None renames it.
        durable: wait until the disk has it; false leaves a file to a power cut that can be made again.
    """
    final = Path(path)
    partial = partial or final.with_name(f".{final.name[:200]}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        (put or os.replace)(partial, final)
        if durable:
            sync(final.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all, see `replacing_file`."""
    with replacing_file(path) as partial:
        partial.write_bytes(content)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _written(directory: Path) -> dict[str, str]:
    return _json(directory / MANIFEST)


def _json(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


# ----------------------------------------------------------------- folders of exports


def why_not_ours(directory: str | Path) -> str | None:
    """Why an export must not replace a folder: what it holds was not all written by an export. None where it may."""
    directory = Path(directory)
    if not os.path.lexists(directory):
        return None
    if not directory.is_dir():
        return f"'{directory}' is not a folder"
    found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir() or p.is_symlink()}
    if not found and not any(directory.iterdir()):
        return None
    mark = _json(directory / MARK)
    if not isinstance(mark.get("files"), list):
        return f"'{directory}' holds {_some(found)}, and was not written by an export of this project"
    foreign = found - {MARK, *mark["files"]}
    return f"'{directory}' holds {_some(foreign)}, which its export did not write" if foreign else None


def refuse_foreign_folder(directory: str | Path) -> None:
    """Refuse to replace a folder that no export of this project wrote.

    Raises:
        SettingError: naming it and what it holds.
    """
    if why := why_not_ours(directory):
        raise SettingError(f"The export would replace a folder: {why}. Export to a new folder, or move that one away.")
    if why := why_unwritable(Path(directory).parent):
        raise SettingError(f"The export can't be written to '{directory}': {why}. Export to another folder.")


@contextmanager
def replacing(directory: str | Path, *, writes: bool = True) -> Iterator[Path]:
    """A folder to write an export into, which takes the place of `directory` once the block is through.

    If somebody put files into `directory` meanwhile, they stay, and the export gets a name beside it.

    Args:
        directory: the final one; what is there stays until then.
        writes: whether this process is the one that writes; the others get a name that they must not use.

    Raises:
        CannotWrite: the disk refused; what was there is there still.
    """
    final = Path(os.path.realpath(directory))
    partial = final.with_name(f".{final.name[:150]}.{os.getpid()}.partial")
    if not writes:
        yield partial
        return
    try:
        with writing(final):
            _sweep(final)
            partial.mkdir(parents=True)
            (partial / MARK).write_text(json.dumps({"writer": os.getpid()}), encoding="utf-8")
            yield partial
            files = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if not p.is_dir())
            replace_file(partial / MARK, (json.dumps({"files": files}, indent=1) + "\n").encode())
        _put_in_place(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _put_in_place(partial: Path, final: Path) -> None:
    foreign, place = why_not_ours(final), final
    if foreign is not None:
        numbers: Iterable[int] = range(2, 1000)
        place = next(p for n in numbers if not os.path.lexists(p := final.with_name(f"{final.name}-{n}")))
    with writing(place):
        replaced = final.with_name(f".{final.name[:150]}.{os.getpid()}.replaced")
        if place.exists():
            place.rename(replaced)
        partial.rename(place)
        shutil.rmtree(replaced, ignore_errors=True)
    if foreign is not None:
        raise CannotWrite(f"The export is at '{place}', not where it was meant to be: {foreign}.")


def _sweep(final: Path) -> None:
    """Remove what exports to the same folder left when they were killed."""
    for left in final.parent.glob(f".{final.name[:150]}.*.partial"):
        writer = _json(left / MARK).get("writer")
        if isinstance(writer, int) and not _alive(writer):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more files" if len(listed) > 3 else ""
    return ", ".join(f"'{name}'" for name in listed[:3]) + more or "folders"
