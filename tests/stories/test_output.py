"""What functions write, in actors and in processes of their own: in files, and rank 0's on the driver's console.

What commands write is in test_commands.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch.distributed as dist


@pytest.mark.parametrize("isolation", ["actor", "process"])
def test_output_is_captured_below_python_and_rank_0s_is_on_the_console(one_node, start, isolation, capfdbinary):
    def train():
        rank = dist.get_rank()
        print("python", rank)
        os.write(1, b"descriptor %d\n" % rank)
        os.system(f"echo shell {rank} 1>&2")
        dist.barrier()  # a rank that leaves while another is still joining fails it

    run = start(train, num_workers=2, isolation=isolation)
    run.result()
    for rank in range(2):
        folder = run.journal.parent / "generation_1" / str(rank)
        assert (folder / "stdout.log").read_text() == f"python {rank}\ndescriptor {rank}\n"
        assert (folder / "stderr.log").read_text() == f"shell {rank}\n"
    seen = capfdbinary.readouterr()
    assert b"python 0\ndescriptor 0\n" in seen.out
    assert b"python 1" not in seen.out + seen.err
    assert b"shell 0\n" in seen.err


@pytest.mark.parametrize("isolation", ["actor", "process"])
def test_each_generation_has_its_files_and_nothing_of_them_is_lost(one_node, start, isolation, capfdbinary):
    line = "x" * 100

    def train():
        generation = os.environ["RAYLAUNCH_GENERATION"]
        for number in range(5000):
            print(generation, number, line)
        sys.stdout.write("no end of line\r")
        sys.stdout.flush()
        if generation == "1" and dist.get_rank() == 1:
            os._exit(3)
        dist.barrier()

    run = start(train, num_workers=2, isolation=isolation)
    run.result()
    for generation in (1, 2):
        written = b"".join(b"%d %d %s\n" % (generation, number, line.encode()) for number in range(5000))
        for rank in range(2):
            file = run.journal.parent / f"generation_{generation}" / str(rank) / "stdout.log"
            if (generation, rank) != (1, 0):  # that one was killed at any moment
                assert file.read_bytes() == written + b"no end of line\r"
    assert written + b"no end of line\r" in capfdbinary.readouterr().out


def test_a_recorded_error_lies_beside_the_logs(one_node, start):
    def train():
        from torch.distributed.elastic.multiprocessing.errors import record

        record(fail)()

    run = start(train, num_workers=1, max_restarts=0)
    run.error()
    assert "no such column" in (run.journal.parent / "generation_1" / "0" / "error.json").read_text()


def fail():
    raise LookupError("no such column")
