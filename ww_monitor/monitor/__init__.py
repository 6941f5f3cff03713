"""The Monitor, and how it reads the weights of a model: now, or as copies in the background.

`monitor` is the object with state; `analyzer` makes the snapshots, `frozen` keeps the rows of frozen matrices, `copies`
copies the weights of one step, `background` is the thread that analyses them, `queued` waits for what training does on
its accelerators, `guarded` turns exceptions into warnings, and `checkpoint` is what a resumed run continues from.
"""

from ww_monitor.monitor.monitor import Monitor, MonitorOptions

__all__ = ["Monitor", "MonitorOptions"]
