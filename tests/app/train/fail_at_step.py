"""The command line in processes of torchrun, the second of which is killed or raises an error in one of its steps.

torchrun … -m tests.app.train.fail_at_step {kill,raise} STEP tune …
"""

from __future__ import annotations

import os
import signal
import sys

from skipkernels.app.cli.main import main
from skipkernels.app.methods.skip import Skip
from tests.app.runs import shortened

if __name__ == "__main__":
    kind, number, *arguments = sys.argv[1:]
    whole, calls = Skip.step, iter(range(1, 1000))

    def step(self, *args):
        if next(calls) == int(number) and os.environ["RANK"] == "1":
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("of a bug")
        return whole(self, *args)

    Skip.step = step
    with shortened():
        sys.exit(main(arguments))
