"""One model on many ranks → one snapshot on each of them, through `torch.distributed`.

`inventory` lists what every rank holds and puts it together, `assign` says which rank owns which matrix, `layout` how
the shards of a matrix come to its owner, `orders` what each rank has to do, `shards` moves the weights, `run` does it
all in order, and `ranks` is how the ranks talk and what is said of one that is missing.
"""

from ww_monitor.distributed.assign import assign_owners, rounds
from ww_monitor.distributed.frozen import FrozenRows
from ww_monitor.distributed.ranks import exchange
from ww_monitor.distributed.run import analyze_on_ranks

__all__ = ["FrozenRows", "analyze_on_ranks", "assign_owners", "exchange", "rounds"]
