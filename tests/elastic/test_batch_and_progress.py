"""The parts of a batch, and what the driver shows of a launch's progress."""

from __future__ import annotations

import io

import pytest
from harness import eventually
from hypothesis import given
from hypothesis import strategies as st

from raylaunch import ConfigError
from raylaunch.coordinator.board import PAUSE, PROGRESS, Group
from raylaunch.elastic import progress as display
from raylaunch.elastic.batch import split_batch
from raylaunch.elastic.progress import Pace, PlainBar, ProgressDisplay, RichBar, TqdmBar, bar_for, describe
from raylaunch.worker.board_copy import BoardCopy


@given(st.lists(st.integers()), st.integers(1, 9))
def test_the_parts_are_the_batch_in_order_and_as_even_as_it_goes(batch, world_size):
    parts = [split_batch(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [item for part in parts for item in part] == batch
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == [split_batch(len(batch), rank=rank, world_size=world_size) for rank in range(world_size)]


def test_a_tensor_is_split_along_its_first_dimension():
    import torch

    batch = torch.arange(10).reshape(5, 2)
    assert split_batch(batch, rank=1, world_size=2).tolist() == [[6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("batch", "rank", "words"), [([1], 2, "rank=2: must be a rank of world_size=2"), (-1, 0, "batch=-1: a size")]
)
def test_what_cannot_be_split_is_refused(batch, rank, words):
    with pytest.raises(ConfigError, match=words):
        split_batch(batch, rank=rank, world_size=2)


def test_the_line_says_how_far_it_is_and_with_whom():
    group = Group(generation=2, world_size=4, restarts=1)
    line = describe(120, 1000, group, 35.21, paused=False)
    assert line == "step 120/1000 (12 %), 35.2 steps/s; 4 ranks, generation 2, 1 restart"
    assert describe(3, None, Group(1, 1, 0), None, paused=True) == "step 3; 1 rank, generation 1, 0 restarts, paused"
    assert "re-forming" in describe(3, None, Group(1, 0, 2), None, paused=False)


def test_the_pace_is_that_of_one_generation():
    pace = Pace()
    pace.note(0, 1, 100.0)
    pace.note(10, 1, 101.0)
    assert pace.rate is None  # too short to tell
    pace.note(40, 1, 104.0)
    assert pace.rate == 10.0
    pace.note(20, 2, 110.0)  # from its checkpoint on
    assert pace.rate is None
    pace.note(40, 2, 112.0)
    assert pace.rate == 10.0


def test_plain_lines_are_few_and_the_last_is_shown(monkeypatch):
    now = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    bar = PlainBar(stream)
    for iteration in range(4):
        bar.show(iteration, 100, f"step {iteration}")
    bar.close()
    bar.close()
    assert stream.getvalue().splitlines() == ["raylaunch: step 0", "raylaunch: step 2", "raylaunch: step 3"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_a_file_plain_lines(monkeypatch):
    assert isinstance(bar_for(io.StringIO()), PlainBar)
    pytest.importorskip("rich")
    terminal = Terminal()
    bar = bar_for(terminal)
    assert isinstance(bar, RichBar)
    bar.show(5, 10, "step 5/10")
    bar.close()
    assert "step 5/10" in terminal.getvalue()


def test_tqdm_stands_in_for_rich_and_lines_for_both(monkeypatch):
    def none(_):
        raise ImportError

    monkeypatch.setattr(display, "RichBar", none)
    try:
        import tqdm  # noqa: F401
    except ImportError:
        assert isinstance(bar_for(Terminal()), PlainBar)
    else:
        assert isinstance(bar_for(Terminal()), TqdmBar)


def test_what_stands_on_the_board_is_shown_until_the_end():
    copy, stream = BoardCopy(), io.StringIO()
    with ProgressDisplay(copy, stream):
        copy.take({}, Group(1, 2, 0))
        copy.put(PROGRESS, (1, 8, 1))
        copy.put(PAUSE, (1, True))
        copy.put(PROGRESS, (8, 8, 1))
        eventually(stream.getvalue, "a line")
        copy.take({}, Group(1, 0, 0))
    last = stream.getvalue().splitlines()[-1]
    assert last == "raylaunch: step 8/8 (100 %); 2 ranks, generation 1, 0 restarts, paused"


def test_nothing_is_shown_of_a_launch_that_says_nothing():
    copy, stream = BoardCopy(), io.StringIO()
    with ProgressDisplay(copy, stream):
        copy.take({}, Group(1, 2, 0))
    assert not stream.getvalue()
