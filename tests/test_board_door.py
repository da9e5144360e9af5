"""The board's place in the coordinator actor: who is answered when. Without Ray."""

from __future__ import annotations

import asyncio

import pytest

from raylaunch.cluster import board_door
from raylaunch.cluster.board_door import BoardDoor, News
from raylaunch.coordinator.board import PAUSE, PROGRESS, STOP, Board, Group

PAUSES = frozenset({PAUSE})
NOBODY = Group()


def note(name, value, version=1, writer=-1):
    board = Board()
    board.offer({}, version - 1)
    board.put(name, value, writer)
    return board.since(0)


async def waits(task):
    """The call is still open after everybody had his turn."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not task.done()


def test_a_rank_hears_nothing_before_the_driver_has_told_and_then_what_stands():
    async def story():
        door = BoardDoor()
        rank = asyncio.ensure_future(door.news("", 0, PAUSES, NOBODY))
        door.offer(note(PROGRESS, (1, 2, 1), writer=0), by_driver=False)
        assert await waits(rank)
        door.offer(note(PAUSE, (1, True)), by_driver=True)
        news = await rank
        assert {name: one.value for name, one in news.notes.items()} == {PAUSE: (1, True)}
        return news

    assert asyncio.run(story()).version == 1


def test_everybody_is_woken_by_what_he_listens_to_and_by_nothing_else():
    async def story():
        door = BoardDoor()
        door.offer({}, by_driver=True)
        first = await door.news("", 0, PAUSES, NOBODY)  # a new epoch is told at once
        assert first.notes == {}
        rank = asyncio.ensure_future(door.news(first.epoch, first.seq, PAUSES, NOBODY))
        driver = asyncio.ensure_future(door.news(first.epoch, first.seq, None, NOBODY))
        door.offer(note(STOP, True), by_driver=False)
        assert (await driver).notes.keys() == {STOP}
        assert await waits(rank)
        driver = asyncio.ensure_future(door.news(first.epoch, 1, None, NOBODY))
        door.set_group(Group(1, 2, 0))
        assert (await driver).group == Group(1, 2, 0)
        assert await waits(rank)
        door.offer(note(PAUSE, (1, True), version=7), by_driver=True)
        assert (await rank).version == 7

    asyncio.run(story())


def test_a_call_is_answered_before_long_whatever_happens(monkeypatch):
    monkeypatch.setattr(board_door, "NEWS_SECONDS", 0.01)

    async def story() -> tuple[News, News]:
        door = BoardDoor()
        rank = await door.news("", 0, PAUSES, NOBODY)
        door.offer({}, by_driver=True)
        epoch = (await door.news("", 0, None, NOBODY)).epoch
        return rank, await door.news(epoch, 0, None, NOBODY)

    unknown, nothing = asyncio.run(story())
    assert not unknown.epoch  # the driver has not told: that is no news
    assert nothing.epoch
    assert nothing.notes == {}


@pytest.mark.parametrize("names", [PAUSES, None])
def test_what_was_known_of_a_lost_board_is_not_taken_for_what_is_known_of_the_new_one(names):
    async def story():
        door = BoardDoor()
        door.offer(note(PAUSE, (1, True), version=3), by_driver=True)
        return await door.news("another", 57, names, NOBODY)

    assert asyncio.run(story()).notes.keys() == {PAUSE}
