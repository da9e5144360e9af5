"""The parser of `raylaunch run`: argparse, as torchrun uses it, with two of its traps taken out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from raylaunch.torchrun.options import GROUPS, PROGRAM, RAY, USE_ENV, Option


class _Parser(argparse.ArgumentParser):
    """argparse, with abbreviations that go on meaning what they mean to torchrun."""

    def __init__(self, *, use_env: bool, prog: str) -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [options] PROGRAM [arguments ...]",
            description="Runs a program as the ranks of one process group on a Ray cluster, as torchrun does on nodes."
            " Takes torchrun's options; PET_<OPTION> gives an option's default.",
        )
        self._rays: set[argparse.Action] = set()
        for title, options in GROUPS.items():
            group = self.add_argument_group(title)
            for option in (*options, USE_ENV) if use_env and options is PROGRAM else options:
                action = self._add(group, option)
                if options is RAY:
                    self._rays.add(action)
        self.add_argument("training_script", metavar="PROGRAM", help="a Python script, unless options say otherwise")

    def _add(self, group: Any, option: Option) -> argparse.Action:
        default = os.environ.get(option.variable, option.default) if option.in_environment else option.default
        if option.parse is None:
            if isinstance(default, str):
                if default not in ("0", "1"):
                    self.error(f"{option.variable}={default!r}: must be 0 or 1")
                default = default == "1"
            if option.stored_as:  # the other option's default stands
                default = argparse.SUPPRESS
            flag: argparse.Action = group.add_argument(
                *option.all_names,
                action="store_const",
                const=option.const,
                dest=option.dest,
                default=default,
                help=option.help,
            )
            return flag
        if option.choices is not None and isinstance(default, str) and default not in option.choices:
            self.error(f"{option.variable}={default!r}: must be one of {', '.join(option.choices)}")
        valued: argparse.Action = group.add_argument(
            *option.all_names,
            type=option.parse,
            default=default,
            choices=option.choices,
            metavar=option.metavar,
            help=option.help.replace("%", "%%"),
        )
        return valued

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """What an abbreviation may mean: of torch's and Ray's options torch's; and an alias is no second meaning."""
        found: list[Any] = super()._get_option_tuples(option_string)
        found = [one for one in found if one[0] not in self._rays] or found
        return found[:1] if len({one[0] for one in found}) == 1 else found

    def own_part(self, arguments: Sequence[str]) -> int:
        """How many of the arguments are the launcher's: up to the program, which is the last of them.

        argparse (Python 3.11) would look for abbreviations in the program's own arguments too, and stop at those that
        could mean several of ours.
        """
        at = 0
        while at < len(arguments) and arguments[at].startswith("-") and arguments[at] not in ("-", "--"):
            at += 1 if self._whole(arguments[at]) else 2
        if at < len(arguments) and arguments[at] == "--":
            at += 1
        return min(at + 1, len(arguments))

    def _whole(self, argument: str) -> bool:
        """Whether this option needs no further argument: a flag, or one with its value."""
        if argument.startswith("--"):
            name, equals, _ = argument.partition("=")
            action = self._option_string_actions.get(name)
            if action is None:
                found = self._get_option_tuples(argument)
                action = found[0][0] if len(found) == 1 else None
            return bool(equals) or action is None or action.nargs == 0
        for position, letter in enumerate(argument[1:], 2):  # -m, -r3, -mr 3
            action = self._option_string_actions.get(f"-{letter}")
            if action is None or action.nargs != 0:
                return action is None or position < len(argument)
        return True


def parse(arguments: Sequence[str], *, prog: str = "raylaunch run", launch_style: bool = False) -> argparse.Namespace:
    """The options of a command line, by torch's names.

    Args:
        arguments: the command line, without the command.
        prog: what usage and errors call it.
        launch_style: as torch.distributed.launch has it, with --use-env.

    Raises:
        SystemExit: 2 and a message for what is malformed; 0 after --help.
    """
    parser = _Parser(use_env=launch_style, prog=prog)
    end = parser.own_part(arguments)
    chosen = parser.parse_args(arguments[:end])
    own = arguments[end:]
    # argparse counts a `--` behind the program as the program's end, unless there was one before: so torchrun drops it.
    chosen.training_script_args = list(own[1:] if own[:1] == ["--"] and "--" not in arguments[:end] else own)
    return chosen
