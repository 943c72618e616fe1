"""train.py in which one process, LM_TEST_FAILING, raises after its third step, as a bug in the loop would."""

from __future__ import annotations

import os
import runpy

from lm.training import loop

_hold = loop._Log.hold


def hold(self, step, *arguments):
    if step == 3 and os.environ["LM_PROCESS"] == os.environ["LM_TEST_FAILING"]:
        raise RuntimeError("step 3 of the test")
    _hold(self, step, *arguments)


if __name__ == "__main__":
    loop._Log.hold = hold
    runpy.run_path("train.py", run_name="__main__")
