"""What a download that went wrong leaves in place of a file."""

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
_LOGGED_IN = "a web page and not the file itself; download it again, logged in where the model asks for that"
_BEGINNINGS = {
    POINTER: "a Git LFS pointer and not the file itself; run `git lfs pull` in its repository",
    b"<!doctype html": _LOGGED_IN,
    b"<html": _LOGGED_IN,
    b"<?xml": "a server's answer in XML and not the file itself; download it again",
}


def failed_download(path: Path) -> str:
    """What a download has left in place of a file, and how to fetch the file; empty if it is none of the known kinds.

    Readers ask when they cannot make sense of a file: such a file has to be fetched, not repaired.
    """
    start = _start(path)
    return next((found for beginning, found in _BEGINNINGS.items() if start.startswith(beginning)), "")


def lfs_pointer(path: Path) -> str:
    """The same for Git LFS alone: a file of any text may well be a web page."""
    return _BEGINNINGS[POINTER] if _start(path).startswith(POINTER) else ""


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return b""
