"""A sign that this process gets on, for whoever watches it: work that lasts gives one now and then."""

_count = 0


def pulse() -> None:
    """Say that the work of this process gets on."""
    global _count  # noqa: PLW0603
    _count += 1


def pulses() -> int:
    """How often it was said."""
    return _count
