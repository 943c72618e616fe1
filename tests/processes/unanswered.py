"""A process of a run whose coordination service answers nothing any more, as it is while JAX aborts the process."""

from __future__ import annotations

import time

from lm.processes import coordination, rendezvous


def main() -> None:
    coordination.take = coordination.put = lambda *_, **__: time.sleep(3600)
    rendezvous.connect()
    print("connected", flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
