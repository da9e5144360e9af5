"""Training programs with libraries that nobody here wrote: they form one group, and survive a killed worker.

`make proofs` installs the libraries and runs this. Each program (`programs/`) is run as a function and as a script.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from starting import PATIENCE_SECONDS, AsFunction, AsScript, world_size_of_accelerate

pytestmark = [pytest.mark.proof, pytest.mark.timeout(600)]

#: As programs/training.py has it, which imports torch: 8 steps, killed in the 5th, the last checkpoint is the 4th's.
STEPS, SAVED, DEADLY_STEP = 8, 4, 5

forms = pytest.mark.parametrize("form", [AsFunction, AsScript], ids=["function", "script"])
#: For each library, what is preloaded for a script, and what a checkpoint looks like that was broken off. Lightning
#: 2.6 moves a file to its place when it is whole, so there is none.
LIBRARIES = {
    "accelerate": ("accelerate", "unfinished"),
    "trainer": ("transformers.trainer", "checkpoint-99"),
    "lightning": ("lightning", None),
    "deepspeed": ("deepspeed", "checkpoints/global_step99"),
}


@forms
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_killed_worker_costs_the_steps_since_the_checkpoint(program, tmp_path, library, form):
    module, broken_off = LIBRARIES[library]
    if broken_off:
        (tmp_path / broken_off).mkdir(parents=True)
    if form is AsFunction:
        survives(program, tmp_path, f"with_{library}", form, victim=1)
    else:  # with the library imported once, in the process that the ranks are forked from
        survives(program, tmp_path, f"with_{library}", form, victim=0, preload=f"torch,{module}")


def test_in_a_function_the_library_may_make_the_group_itself(program, tmp_path):
    survives(program, tmp_path, "with_accelerate", AsFunction, victim=0, backend=None, spares="auto")


def test_without_what_raylaunch_tells_it_accelerate_trains_alone(one_node, start):
    """Which the proofs would see: the world sizes that they compare are the libraries' own."""
    run = start(world_size_of_accelerate, num_workers=2, env={"ACCELERATE_USE_CPU": "false"})
    assert run.result(PATIENCE_SECONDS).values == (1, 1)


@forms
@pytest.mark.parametrize("library", ["dcp", "fsdp2"])
def test_what_two_ranks_have_saved_through_a_kill_one_and_four_can_load(program, tmp_path, library, form):
    (tmp_path / "unfinished").mkdir()  # a checkpoint that was broken off
    name = f"with_{library}"
    saved = survives(program, tmp_path, name, form, victim=1 if form is AsFunction else 0)
    for ranks in (1, 4):
        loaded = program(form, name, ranks=ranks).told()
        assert [told["world_size"] for told in loaded] == [ranks] * ranks
        assert [told["resumed_from"] for told in loaded] == [STEPS] * ranks
        assert [told["weights"] for told in loaded] == [saved] * ranks


def survives(program, folder: Path, name: str, form, *, victim: int, **arguments) -> dict:
    """Run a program on two ranks, and kill one in the middle; returns the weights that both have in the end."""
    run = program(form, name, victim=victim, **arguments)
    in_step = [folder / f"in-step-{rank}" for rank in range(2)]
    run.wait_until(lambda: all(file.exists() for file in in_step), f"both ranks in step {DEADLY_STEP}")
    run.kill(victim, int(in_step[victim].read_text()))
    told = run.told()

    assert [rank["world_size"] for rank in told] == [2, 2]
    assert [rank["resumed_from"] for rank in told] == [SAVED, SAVED]
    assert [rank["steps"] for rank in told] == [STEPS, STEPS]
    assert told[0]["weights"] == told[1]["weights"]
    taken = [set(rank["samples"]) for rank in told]
    assert taken[0]
    assert not taken[0] & taken[1], "both ranks trained on the same data"
    return told[0]["weights"]
