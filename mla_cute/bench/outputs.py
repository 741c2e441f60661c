"""Whether results can be written where they are to go: asked before a run, for afterwards they would be lost."""

import pathlib
import tempfile


def check_file(path: pathlib.Path) -> None:
    """Make the folder of `path`. Raises OSError, naming `path`, where no file can be written there."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, got a folder")
    _check(path, path.parent)


def check_folder(path: pathlib.Path) -> None:
    """Make the folder `path`. Raises OSError, naming it, where that cannot be, or no file can be written into it."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder, got a file")
    _check(path, path)


def _check(path: pathlib.Path, folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Only writing tells: permission bits do not show that a file system is read-only, and do not hold for root.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise NotADirectoryError(f"{path}: cannot be written: {folder} is a file") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None
