"""`python -m raylaunch`: the same as the `raylaunch` command."""

import sys

from raylaunch.cli import main

sys.exit(main())
