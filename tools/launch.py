"""torchrun without the tracebacks that it adds: each rank has said already why it stopped.

    python tools/launch.py --standalone --nproc_per_node 8 train_gpt.py [OPTIONS]

The arguments are torchrun's. Its own last words, twenty-five lines, would push what the first rank
says at the end out of sight. Exit status: that of the first rank that failed (128 + n for one that
signal n ended), 128 + n where signal n asked all ranks to stop.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def launch(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SignalException as asked:
        return 128 + int(asked.sigval)
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        return status if status >= 0 else 128 - status
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
