"""What users see: the exported names, their documentation, the types, and the command."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import raylaunch
from raylaunch import cli, journal
from raylaunch.coordinator.events import BundlesPlaced, RunRequested, Tick
from raylaunch.coordinator.machine import Coordinator
from raylaunch.spec import make_spec

PACKAGE = Path(raylaunch.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", raylaunch.__all__)
def test_exported_names_are_there_and_documented(name: str) -> None:
    """`help(raylaunch.name)` says something of its own."""
    value = getattr(raylaunch, name)
    assert value.__doc__
    inherited = [getattr(base, "__doc__", None) for base in inspect.getmro(value)[1:]] if inspect.isclass(value) else []
    assert value.__doc__ not in inherited
    # A dataclass without a docstring gets its signature for one.
    assert not value.__doc__.startswith(f"{name}(")


def test_exported_names_are_sorted_and_complete() -> None:
    """What raylaunch/__init__.py imports is what it exports."""
    assert list(raylaunch.__all__) == sorted(raylaunch.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {alias.name for node in froms if str(node.module).startswith("raylaunch.") for alias in node.names}
    assert set(raylaunch.__all__) == imported
    with pytest.raises(AttributeError, match="no attribute 'Elastic'"):
        raylaunch.Elastic  # noqa: B018


def test_run_documents_every_argument() -> None:
    """Each argument has its line in the docstring."""
    text = inspect.getdoc(raylaunch.run) or ""
    undocumented = [name for name in inspect.signature(raylaunch.run).parameters if f"\n    {name}: " not in text]
    assert not undocumented


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    """A docstring that is more than a word."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring.split()) >= 4


def test_types_are_shipped() -> None:
    """Type checkers read the annotations of packages with this file only."""
    assert (PACKAGE / "py.typed").exists()


def record(path: Path, *, spoilt: bool = False) -> None:
    """A short journal, as the shell writes it."""
    coordinator, book = Coordinator(), journal.Journal(str(path.parent), "r1")
    events = [
        RunRequested(10.0, make_spec(num_workers=2, run_id="r1")),
        BundlesPlaced(11.5, 1, ("aaaaaaaabbbb", "aaaaaaaabbbb")),
        Tick(20.0),
    ]
    for seq, event in enumerate(events, 1):
        book.event(seq, event)
        book.decision(seq, coordinator.handle(event))
    book.close()
    assert book.path == str(path)
    if spoilt:
        lines = path.read_text(encoding="utf-8").splitlines()
        decision = json.loads(lines[3])
        assert decision["commands"]
        decision["commands"] = []
        lines[3] = json.dumps(decision)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_replay_prints_the_events_and_says_that_all_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal.jsonl"
    record(path)
    assert cli.main(["replay", str(path)]) == 0
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first.split()[:4] == ["1", "0.000", "s", "RunRequested"]
    assert "new -> rendezvous" in first
    assert "a run of 2 workers was requested" in first
    assert second.split()[:6] == ["2", "1.500", "s", "BundlesPlaced", "group=1", "rendezvous"]
    assert last == "3 events; every recorded decision was reproduced"


def test_replay_finds_another_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    record(path, spoilt=True)
    assert cli.main(["replay", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith("(decided differently then)")
    assert out.endswith("NOT the same decisions as recorded: 1 differ, events 2\n")


def test_replay_of_a_run_whose_driver_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line is cut short, and the last event has no decision."""
    path = tmp_path / "journal.jsonl"
    record(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert cli.main(["replay", str(path)]) == 0
    assert "3 events; every recorded decision was reproduced (1 had none" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", "no journal\n", '{"seq": 1, "event": "NoSuchEvent"}\n', "{}\n", "[]\n"])
def test_replay_refuses_what_is_no_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "journal.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert cli.main(["replay", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("raylaunch replay: ")
    assert str(path) in err


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        arguments, capture_output=True, text=True, check=False, cwd=os.sep, **options
    )


def test_the_command_and_the_module_are_one() -> None:
    """The installed script, and `python -m raylaunch`."""
    installed = command(str(Path(sys.executable).with_name("raylaunch")), "--version")
    module = command(sys.executable, "-m", "raylaunch", "--version")
    assert installed.stdout == module.stdout == f"raylaunch {raylaunch.__version__}\n"
    assert command(sys.executable, "-m", "raylaunch").returncode == 2


def test_replay_into_a_pipe_that_is_closed(tmp_path: Path) -> None:
    """`raylaunch replay JOURNAL | head -1` ends without a traceback."""
    path = tmp_path / "journal.jsonl"
    record(path)
    with subprocess.Popen(
        [sys.executable, "-m", "raylaunch", "replay", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
