"""The documentation says what is so: links, code, the diagram, the tables of arguments, the map of the code."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import raylaunch
from raylaunch.coordinator.phase import Phase
from raylaunch.worker.env import DEFAULT_COPY_ENV

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The names of a page's headings, as they are linked to."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@page
def test_links_lead_somewhere(path: Path) -> None:
    """Relative links, to files and to headings."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(path))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{path.name}: {target}"


@page
def test_python_in_the_pages_compiles(path: Path) -> None:
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text_of(path), flags=re.DOTALL), 1):
        compile(code, f"{path.name}, block {number}", "exec")


@page
def test_calls_in_the_pages_have_arguments_that_exist(path: Path) -> None:
    """In blocks of Python and in single lines of it: the keywords of `raylaunch.run` and its like."""
    ours = {
        "raylaunch.run": raylaunch.run,
        "raylaunch.Launcher": raylaunch.Launcher,
        "raylaunch.Timeouts": raylaunch.Timeouts,
        "launcher.run": raylaunch.Launcher.run,
        "launcher.submit": raylaunch.Launcher.submit,
    }
    blocks = re.findall(r"```python\n(.*?)```", text_of(path), flags=re.DOTALL)
    lines = re.findall(r"`((?:raylaunch|launcher)\.\w+\(.*?\))`", text_of(path))
    for code in blocks + lines:
        for call in ast.walk(ast.parse(code)):
            if isinstance(call, ast.Call) and (function := ours.get(ast.unparse(call.func))):
                unknown = {word.arg for word in call.keywords} - {None, *inspect.signature(function).parameters}
                assert not unknown, code


def test_the_readme_shows_the_example() -> None:
    """The code in the README is the example that `make examples` runs."""
    assert f"```python\n{text_of(ROOT / 'examples' / 'ddp_digits.py').rstrip()}\n```" in text_of(ROOT / "README.md")


def generator() -> ModuleType:
    """docs/make_state_diagram.py."""
    path = DOCS / "make_state_diagram.py"
    spec = importlib.util.spec_from_file_location("make_state_diagram", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diagram_is_the_table() -> None:
    """After a change of the table: `make diagram`."""
    drawer = generator()
    text = text_of(drawer.PAGE)
    assert drawer.page_with(drawer.diagram(), text) == text
    assert "rendezvous --> forming" in text


def rows(path: Path, heading: str) -> dict[str, list[str]]:
    """The first table below a heading: first cell, without backquotes, to the others."""
    _, _, below = text_of(path).partition(f"\n{heading}\n")
    assert below, f"{path.name} has no heading {heading!r}"
    table = re.search(r"(?:^\|.*\|\n)+", below, flags=re.MULTILINE)
    assert table is not None
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table[0].splitlines()[2:]]
    return {first.strip("`"): others for first, *others in lines}


def test_every_phase_is_explained() -> None:
    text = text_of(DOCS / "state-machine.md")
    assert all(f"| {phase.value} |" in text for phase in Phase)


def test_every_argument_of_run_is_documented_with_its_default() -> None:
    documented = rows(DOCS / "configuration.md", "## `raylaunch.run`")
    parameters = inspect.signature(raylaunch.run).parameters
    assert list(documented) == list(parameters)
    for name, (meaning, unit, default) in documented.items():
        assert meaning
        assert unit
        actual = parameters[name].default
        if actual is inspect.Parameter.empty:
            assert default == "required"
        elif name == "copy_env":
            assert default == "the list below"
        else:
            assert default == f"`{actual!r}`", name


def test_a_launcher_and_its_runs_have_the_arguments_of_run() -> None:
    """Each stands in one of the two places, with the same default, and in the documentation."""

    def parameters(of: Callable[..., object]) -> dict[str, inspect.Parameter]:
        return {name: one for name, one in inspect.signature(of).parameters.items() if name != "self"}

    of_run = parameters(raylaunch.run)
    of_run["name"] = of_run.pop("run_id")
    of_launcher, of_its_runs = parameters(raylaunch.Launcher), parameters(raylaunch.Launcher.run)
    assert parameters(raylaunch.Launcher.submit) == of_its_runs
    both = {**of_launcher, **of_its_runs}
    assert len(of_launcher) + len(of_its_runs) == len(both)
    assert set(both) == set(of_run)
    assert [name for name in both if both[name].default != of_run[name].default] == []
    documented = rows(DOCS / "configuration.md", "## `raylaunch.Launcher`")
    for where, those in zip(documented, (of_launcher, of_its_runs), strict=True):
        names = re.findall(r"`(\w+)`", documented[where][0].replace("in place of `run_id`", ""))
        assert set(names) == set(those), where


def test_every_parameter_of_an_elastic_launcher_is_documented_with_its_default() -> None:
    documented = rows(DOCS / "elastic-launcher.md", "## Parameters")
    parameters = inspect.signature(raylaunch.ElasticLauncher).parameters
    assert list(documented) == list(parameters)
    for name, (default, meaning) in documented.items():
        assert default == f"`{parameters[name].default!r}`", name
        assert meaning


def test_every_public_property_of_an_elastic_launcher_is_documented() -> None:
    documented = rows(DOCS / "elastic-launcher.md", "## Where a process stands")
    named = {name for names in documented for name in re.findall(r"\w+", names)}
    launcher = raylaunch.ElasticLauncher
    assert named == {name for name in dir(launcher) if isinstance(getattr(launcher, name), property)}


def test_every_pattern_of_copied_variables_is_documented() -> None:
    _, _, below = text_of(DOCS / "configuration.md").partition("By default `copy_env` takes")
    listed, _, _ = below.partition("Never copied")
    assert tuple(re.findall(r"`([A-Z_]+\*?)`", listed)) == DEFAULT_COPY_ENV


def test_every_timeout_is_documented_with_its_default() -> None:
    documented = rows(DOCS / "configuration.md", "## `raylaunch.Timeouts`")
    fields = dataclasses.fields(raylaunch.Timeouts)
    assert list(documented) == [field.name for field in fields]
    for field in fields:
        meaning, unit, default = documented[field.name]
        assert meaning
        assert unit == "seconds"
        assert default == f"`{field.default:g}`", field.name


def test_the_map_of_the_code_is_complete() -> None:
    """ARCHITECTURE.md names every module, and no other, in a size that is read."""
    text = text_of(ROOT / "ARCHITECTURE.md")
    assert len(text.splitlines()) <= 170
    _, _, below = text.partition("\n## The code map\n")
    listed, _, _ = below.partition("\n## ")
    named = set(re.findall(r"`(?:\w+/)*(\w+\.py)`", listed)) - {"demo.py"}
    modules = {path.name for path in (ROOT / "raylaunch").rglob("*.py")}
    assert named == modules


def test_frameworks_are_shown_as_the_proofs_run_them() -> None:
    """Each line of code stands in the section's program, in this order, and the versions are those that are pinned."""
    programs = ROOT / "tests" / "proofs" / "programs"
    page = DOCS / "frameworks.md"
    proven = {
        "Accelerate": "with_accelerate",
        "Transformers": "with_trainer",
        "Lightning": "with_lightning",
        "DeepSpeed": "with_deepspeed",
        "FSDP2": "with_fsdp2",
        "torch.distributed.checkpoint": "dcp_state",
    }
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", text_of(page), flags=re.MULTILINE))
    assert set(sections) == {"What is tested", "Function or script", *proven}
    for title, program in proven.items():
        left = iter(text_of(programs / f"{program}.py").splitlines())
        (code,) = re.findall(r"```python\n(.*?)```", sections[title], flags=re.DOTALL)
        for line in filter(lambda line: line.strip() not in ("", "...", "# ..."), code.splitlines()):
            # A signature may be shown without what it returns.
            assert any(there.startswith(line.removesuffix(":")) for there in left), f"{title}: {line}"
    pins = text_of(ROOT / "constraints.txt")
    tested = [version for version, _ in rows(page, "## What is tested").values()]
    assert [version for version in tested if version.replace(" ", "==") not in pins] == []


def test_every_target_of_make_is_documented() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    contributing = text_of(ROOT / "CONTRIBUTING.md")
    assert {"demo", "test", "test-all", "lint", "types", "core", "clean"} <= targets
    assert {target for target in targets - {"help", "clean"} if f"`make {target}`" not in contributing} == set()


def test_the_versions_are_one() -> None:
    """The version stands in one place, and the change log has a part for it."""
    assert 'path = "raylaunch/version.py"' in text_of(ROOT / "pyproject.toml")


def test_every_option_of_the_command_is_documented() -> None:
    from raylaunch.torchrun.options import RAY, TORCH_OPTIONS, WITHOUT_EFFECT

    kept = rows(DOCS / "torchrun.md", "## Options")
    assert list(kept) == [option.name for option in TORCH_OPTIONS]
    assert [name for name, (fate, what) in kept.items() if not fate or not what] == []
    without = [name for name, (fate, _) in kept.items() if fate == "without effect"]
    assert without == [option.name for option in WITHOUT_EFFECT]
    assert list(rows(DOCS / "torchrun.md", "Ray's own:")) == [option.name for option in RAY]
