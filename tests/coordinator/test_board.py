"""The board: of two values the later wins, wherever copies meet, in whatever order, and whoever has lost everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylaunch.coordinator.board import NAMES, PAUSE, SAVE, STOP, Board, Note


def test_what_is_put_stands_and_wins_over_all_that_was_seen():
    here, there = Board(), Board()
    here.put(SAVE, 1, writer=-1)
    here.put(SAVE, 2, writer=-1)
    there.offer(here.since(0))
    there.put(SAVE, 3, writer=0)
    here.offer(there.since(0))
    assert here.get(SAVE) == there.get(SAVE) == 3
    assert here.get(STOP) is None
    assert here.get(STOP, False) is False


def test_since_tells_what_has_changed_once_and_by_name():
    board = Board()
    board.put(PAUSE, (1, True), writer=-1)
    seen = board.seq
    board.put(SAVE, 1, writer=-1)
    board.put(SAVE, 2, writer=-1)
    assert {name: note.value for name, note in board.since(seen).items()} == {SAVE: 2}
    assert board.since(0, {PAUSE}).keys() == {PAUSE}
    assert board.since(board.seq) == {}
    board.offer(board.since(0))  # what is known is no news
    assert board.since(seen).keys() == {SAVE}


def test_a_board_that_has_lost_everything_learns_what_stood_and_then_what_came_after():
    driver, rank, coordinator = Board(), Board(), Board()
    driver.put(PAUSE, (1, True), writer=-1)
    rank.offer(driver.since(0))
    driver.put(PAUSE, (1, False), writer=-1)
    coordinator.offer(driver.since(0))
    coordinator.offer(rank.since(0))  # the rank had not heard of the end of the pause
    assert coordinator.get(PAUSE) == (1, False)


def test_who_hears_only_some_of_the_names_still_wins_with_what_he_puts_later():
    board, rank = Board(), Board()
    for number in range(5):
        board.put(SAVE, number, writer=-1)
    rank.offer({}, board.version)
    rank.put(SAVE, 9, writer=0)
    board.offer(rank.since(0))
    assert board.get(SAVE) == 9


def test_another_name_is_refused():
    with pytest.raises(AssertionError, match="no such names"):
        Board().put("anything", 1, writer=0)


writers = st.integers(-1, 3)
#: Who puts what, or (None) whose copy meets whose.
happenings = st.lists(
    st.one_of(
        st.tuples(writers, st.sampled_from(sorted(NAMES)), st.integers()), st.tuples(writers, writers, st.none())
    ),
    max_size=40,
)


@given(happenings, st.permutations([-1, 0, 1, 2, 3]), st.permutations([-1, 0, 1, 2, 3]))
def test_whoever_meets_whom_and_when_all_agree_in_the_end(happened, one_order, other_order):
    copies = {writer: Board() for writer in (-1, 0, 1, 2, 3)}
    for first, second, value in happened:
        if value is None:
            copies[first].offer(copies[second].since(0))
        else:
            copies[first].put(second, value, first)

    def merged(order):
        board = Board()
        for writer in order:
            board.offer(copies[writer].since(0))
        return board.since(0)

    assert merged(one_order) == merged(other_order)


@given(st.lists(st.tuples(st.integers(1, 5), writers), min_size=1))
def test_equal_versions_are_decided_by_the_writer(stamps):
    board = Board()
    for version, writer in stamps:
        board.offer({STOP: Note(version, writer, (version, writer))})
    assert board.get(STOP) == max(stamps)
