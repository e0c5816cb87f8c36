"""The command line in processes of torchrun, the second of which is killed in one of its steps.

torchrun … -m tests.app.train.fail_at_step STEP tune …
"""

from __future__ import annotations

import os
import signal
import sys

from skipkernels.app.cli.main import main
from skipkernels.app.methods.skip import Skip
from tests.app.runs import shortened

if __name__ == "__main__":
    number, *arguments = sys.argv[1:]
    whole, calls = Skip.step, iter(range(1, 1000))

    def step(self, *args):
        if next(calls) == int(number) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *args)

    Skip.step = step
    with shortened():
        sys.exit(main(arguments))
