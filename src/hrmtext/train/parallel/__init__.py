"""How several devices train one model; the model itself knows nothing of it.

`sharded.py` is imported where it is used: FSDP takes its time to load.
"""

from hrmtext.train.parallel.choose import Layout, choose_layout
from hrmtext.train.parallel.group import any_rank, process_group, sum_gradients, wait_for_all
from hrmtext.train.parallel.shards import Shards

__all__ = [
    "Layout",
    "Shards",
    "any_rank",
    "choose_layout",
    "process_group",
    "sum_gradients",
    "wait_for_all",
]
