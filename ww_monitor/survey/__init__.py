"""How the weights of a model are read: now, or as copies in the background.

`survey` makes the snapshots, `unchanged` keeps the rows of frozen matrices, `stills` copy the weights of one step, and
`background` is the thread that analyses them. `queued` waits for what training does on its accelerators.
"""

from ww_monitor.survey.queued import wait_for_queued
from ww_monitor.survey.survey import Survey

__all__ = ["Survey", "wait_for_queued"]
