"""One model on many ranks → one snapshot on each of them, through `torch.distributed`.

`inventory` lists what every rank holds and puts it together, `deal` says which rank analyses what, `reach` what the
shards of a matrix allow, `shards` reads it at its owner, `run` does it all in order, and `ranks` is how they talk and
what is said of a rank that is missing.
"""

from ww_monitor.distributed.deal import deal
from ww_monitor.distributed.ranks import exchange
from ww_monitor.distributed.run import analyze_on_ranks

__all__ = ["analyze_on_ranks", "deal", "exchange"]
