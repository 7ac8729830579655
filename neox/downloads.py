"""What a download that went wrong leaves in the place of a file."""

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
_LOGGED_IN = "a web page and not the file itself; download it again, logged in where the model asks for that"
_BEGINNINGS = {
    POINTER: "a Git LFS pointer and not the file itself; run `git lfs pull` in its repository",
    b"<!doctype html": _LOGGED_IN,
    b"<html": _LOGGED_IN,
    b"<?xml": "a server's answer in XML and not the file itself; download it again",
}


def in_its_place(path: Path) -> str:
    """What lies where a file should be, and how to fetch the file; empty where it is none of the known ones.

    Readers ask when they cannot make sense of a file: such a file has to be fetched, and not repaired.
    """
    start = _start(path)
    return next((found for beginning, found in _BEGINNINGS.items() if start.startswith(beginning)), "")


def pointer_in_its_place(path: Path) -> str:
    """The same for files of any text, which may well be a web page."""
    return _BEGINNINGS[POINTER] if _start(path).startswith(POINTER) else ""


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return b""
