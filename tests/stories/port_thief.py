"""A thief of ports: binds every ephemeral port that is free, again and again, giving back now these, now those.

A port that was chosen, closed, and is to be bound again later is his within a tenth of a second; one that is held is
not. So that the machine goes on working, a part of his loot is free at any moment.
"""

from __future__ import annotations

import random
import socket
import sys
import time
from pathlib import Path


def steal(ports: range, ready: Path) -> None:
    held: dict[int, socket.socket] = {}
    while True:
        for port in ports:
            if port not in held:
                one = socket.socket()
                try:
                    one.bind(("", port))
                except OSError:  # somebody has it
                    one.close()
                else:
                    held[port] = one
        for port in random.sample(sorted(held), len(held) // 20):
            held.pop(port).close()
        ready.write_text(str(len(held)))
        time.sleep(0.1)


if __name__ == "__main__":
    steal(range(int(sys.argv[1]), int(sys.argv[2])), Path(sys.argv[3]))
