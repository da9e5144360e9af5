"""The ranks' output on its way to the console: nothing lost, lines kept whole, bounded, whatever is written."""

from __future__ import annotations

import random

import pytest

from raylaunch.worker.logs import BATCH, CHUNK, Filter, Follower, Followers, Merger, Source

OUT = Source(1, 0, "stdout")
RED, BLUE = (Source(1, rank, "stdout", f"[{rank}]:") for rank in (0, 1))


class Console:
    def __init__(self):
        self.text = b""
        self.merger = Merger(self.write)

    def write(self, data):
        self.text += data

    def show(self, *outputs):
        for source, data in outputs:
            self.merger.show(source, data)
        return self.text


def all_of(follower, ended=True):
    data = b""
    while piece := follower.read(ended=ended):
        assert len(piece) <= CHUNK
        data += piece
    follower.close()
    return data


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n\n",
        b"no end",
        b"x" * 10_000_000 + b"\nend",
        b"\xff\xfe\x00\n" * 1000,
        b"short\n" * 1_000_000,
        b"".join(b"\r%d%%" % number for number in range(100)) + b"\n",
        b"\r\n" * CHUNK,
    ],
    ids=["nothing", "empty lines", "no end", "10 MB line", "no UTF-8", "a million lines", "progress bar", "CRLF"],
)
@pytest.mark.parametrize("whole_lines", [False, True])
def test_nothing_is_lost(tmp_path, text, whole_lines):
    path = tmp_path / "log"
    path.write_bytes(text)
    assert all_of(Follower(str(path), whole_lines=whole_lines)) == text


@pytest.mark.parametrize("text", [b"short\n" * 1_000_000, b"x" * 10_000_000 + b"\n" + b"y" * 1000 + b"\n"])
def test_prefixes_change_nothing_else(tmp_path, text):
    path = tmp_path / "log"
    path.write_bytes(text)
    console = Console()
    pieces = []
    console.merger = Merger(pieces.append)
    follower = Follower(str(path), whole_lines=True)
    while data := follower.read(ended=False):
        console.merger.show(RED, data)
    follower.close()
    assert b"".join(pieces) == b"".join(b"[0]:" + line for line in text.splitlines(keepends=True))


def test_a_file_is_followed_from_its_first_byte_as_it_grows(tmp_path):
    path = tmp_path / "log"
    plain, lines = (Follower(str(path), whole_lines=whole) for whole in (False, True))
    assert plain.read(ended=False) == lines.read(ended=False) == b""  # it isn't there yet
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert plain.read(ended=False) == b"one\ntw"
        assert lines.read(ended=False) == b"one\n"
        file.write(b"o\r")
        assert plain.read(ended=False) == b"o\r"
        assert lines.read(ended=False) == b""  # the carriage return may be half of a line's end
        file.write(b"\nthree")
        assert plain.read(ended=False) == b"\nthree"
        assert lines.read(ended=False) == b"two\r\n"
        assert lines.read(ended=True) == b"three"
        assert plain.read(ended=True) == b""
    plain.close()
    lines.close()


def test_one_goes_on_where_another_was(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    assert all_of(Follower(str(path), whole_lines=True, offset=4)) == b"two\n"


def test_what_is_read_at_a_time_is_bounded_and_each_source_keeps_its_order(tmp_path):
    rng = random.Random(5)
    followers = Followers()
    sources = [Source(1, rank, stream, "x") for rank in range(3) for stream in ("stdout", "stderr")]
    written = {}
    for number, source in enumerate(sources):
        text = b"".join(b"%d " % rng.randrange(1000) * rng.randrange(5) + b"\n" for _ in range(100_000))
        written[source] = text
        (tmp_path / str(number)).write_bytes(text)
        followers.follow(source, str(tmp_path / str(number)), 0)
    read = dict.fromkeys(sources, b"")
    while output := followers.read(ended=True):
        assert sum(len(data) for _, data in output) <= BATCH + CHUNK
        for source, data in output:
            read[source] += data
    assert read == written


def test_one_that_never_stops_keeps_nobody_waiting_and_no_line_is_cut_for_another(tmp_path):
    followers = Followers()
    texts = {"flood": b"\r 1%\r" + b"x" * 500_000 + b"\r" * 100_000 + b"\n", "quiet": b"hear me\n"}
    sources = {name: Source(1, rank, "stdout") for rank, name in enumerate(texts)}
    for name, source in sources.items():
        (tmp_path / name).write_bytes(texts[name] * (20 if name == "flood" else 1))
        followers.follow(source, str(tmp_path / name), 0)
    output = followers.read(ended=False)
    heard = next(number for number, (source, _) in enumerate(output) if source == sources["quiet"])
    assert b"".join(data for _, data in output[:heard]) == texts["flood"]  # one whole line of it
    with (tmp_path / "quiet").open("ab") as file:
        file.write(b"again\n")
    rest = followers.read(ended=False) + followers.read(ended=False)
    assert b"again\n" in [data for source, data in rest if source == sources["quiet"]]


def test_stdout_is_shown_before_stderr_of_the_same_moment(tmp_path):
    followers = Followers()
    for stream in ("stderr", "stdout"):
        (tmp_path / stream).write_bytes(b"text\n")
        followers.follow(Source(1, 0, stream), str(tmp_path / stream), 0)
    assert [source.stream for source, _ in followers.read(ended=False)] == ["stdout", "stderr"]


def test_old_generations_are_read_to_the_end_and_let_go(tmp_path):
    followers = Followers()
    for generation in range(1, 5):
        path = tmp_path / str(generation)
        path.write_bytes(b"generation %d" % generation)  # without an end
        followers.follow(Source(generation, 0, "stdout", "x"), str(path), 0)
    assert [(source.generation, data) for source, data in followers.read(ended=False)] == [
        (1, b"generation 1"),
        (2, b"generation 2"),
    ]
    assert [source.generation for source, _ in followers.read(ended=True)] == [3, 4]


def test_what_is_shown_as_it_is_stays_as_it_is():
    console = Console()
    shown = console.show((OUT, b"a\r"), (OUT, b"b\xff"), (OUT, b"c\n\nd"))
    console.merger.finish()
    assert shown == console.text == b"a\rb\xffc\n\nd"


def test_each_line_has_its_prefix_and_none_is_cut_by_another():
    console = Console()
    assert console.show((RED, b"a\nb\n"), (BLUE, b"c\n")) == b"[0]:a\n[0]:b\n[1]:c\n"
    console = Console()
    console.show((RED, b"long"), (RED, b" line"), (BLUE, b"c\n"), (RED, b" goes on\n"))
    assert console.text == b"[0]:long line\n[1]:c\n[0]: goes on\n"
    console = Console()
    console.show((RED, b"\r 1%\r 2%\r"), (BLUE, b"\n"), (RED, b"no end"))
    console.merger.finish()
    assert console.text == b"\r[0]: 1%\r[0]: 2%\r[1]:\n[0]:no end\n"


def test_wanted_lines_are_copied():
    copied = []
    wanted = Filter(["loss", "acc"], copied.append)
    wanted.copy(RED, b"loss 1\nother\nacc 2\r\nno\n")
    wanted.copy(BLUE, b"my loss\n")
    assert b"".join(copied) == b"[0]:loss 1\n[0]:acc 2\r\n[1]:my loss\n"
