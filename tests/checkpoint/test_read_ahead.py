"""The next item is made while one is in use, and no more than that."""

import threading
import weakref

import pytest

from neox.checkpoint.storage.ahead import read_ahead


class Item:
    def __init__(self, number):
        self.number = number


def test_the_next_is_made_while_one_is_in_use():
    made = [threading.Event() for _ in range(4)]

    def items():
        for number in range(4):
            made[number].set()
            yield number

    for number in read_ahead(items()):
        assert made[min(number + 1, 3)].wait(60)
        assert not any(event.is_set() for event in made[number + 2 :])
    assert list(read_ahead([])) == []


def test_two_are_alive_at_most():
    alive = weakref.WeakSet()

    def items():
        for number in range(5):
            assert len(alive) <= 1, "one more than that in use"
            item = Item(number)
            alive.add(item)
            yield item
            del item

    seen = []
    for item in read_ahead(items()):
        seen.append(item.number)
        del item
    assert seen == [0, 1, 2, 3, 4]


def test_an_error_comes_where_the_item_would(tmp_path):
    def items():
        yield 1
        yield 2
        raise OSError("disk")

    ahead = read_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="disk"):
        next(ahead)
    stopped = read_ahead(items())
    assert next(stopped) == 1
    stopped.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
