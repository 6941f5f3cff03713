"""A writer of TensorBoard's event files that loads no TensorFlow, where it is installed, and so prints no line of its.

`torch.utils.tensorboard` imports it for the sake of remote file systems. Formats: TensorBoard's protocol buffers.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ww_monitor.errors import MissingDependency

_numbers = itertools.count()  # of files that one process begins in one second


class EventFile:
    """Has those methods of a `torch.utils.tensorboard.SummaryWriter` that are used here; made at the first write.

    Args:
        folder: Where the file is; a new one for each time that the writer is opened.

    Raises:
        MissingDependency: if tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        except ImportError as error:
            raise MissingDependency("TensorBoard: needs tensorboard; pip install 'ww-monitor[tensorboard]'") from error
        self.log_dir = Path(folder)
        self._event, self._summary, self._tensor, self._types = event_pb2, summary_pb2, tensor_pb2, types_pb2
        self._records: Any = None

    def __reduce__(self) -> tuple[type[EventFile], tuple[Path]]:
        return EventFile, (self.log_dir,)  # a copy writes a file of its own

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """A point of a curve."""
        self._add(global_step, tag=tag, simple_value=value)

    def add_image(self, tag: str, picture: np.ndarray, global_step: int, *, dataformats: str = "HWC") -> None:
        """A picture, uint8 `[height, width, 3]`."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(picture).save(png, format="PNG")
        height, width, colours = picture.shape
        image = {"height": height, "width": width, "colorspace": colours, "encoded_image_string": png.getvalue()}
        self._add(global_step, tag=tag, image=self._summary.Summary.Image(**image))

    def add_text(self, tag: str, text: str, global_step: int) -> None:
        """A text in Markdown."""
        self._add_string("text", f"{tag}/text_summary", text.encode(), global_step)

    def add_histogram_raw(self, tag: str, *, bucket_limits: Any, global_step: int, **fields: Any) -> None:
        """A histogram; the fields are those of TensorBoard's `HistogramProto`, of which one has another name here."""
        fields["bucket"] = fields.pop("bucket_counts")
        histogram = self._summary.HistogramProto(bucket_limit=bucket_limits, **fields)
        self._add(global_step, tag=tag, histo=histogram)

    def add_custom_scalars(self, layout: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
        """The charts of the custom-scalars page: category → title → kind of chart and its tags."""
        from tensorboard.plugins.custom_scalar import layout_pb2 as pb

        categories = []
        for category, charts in layout.items():
            made = []
            for title, (kind, tags) in charts.items():
                if kind == "Margin":
                    triples = [tags[place : place + 3] for place in range(0, len(tags), 3)]
                    series = [pb.MarginChartContent.Series(value=v, lower=low, upper=up) for v, low, up in triples]
                    made.append(pb.Chart(title=title, margin=pb.MarginChartContent(series=series)))
                else:
                    made.append(pb.Chart(title=title, multiline=pb.MultilineChartContent(tag=tags)))
            categories.append(pb.Category(title=category, chart=made))
        self._add_string(
            "custom_scalars", "custom_scalars__config__", pb.Layout(category=categories).SerializeToString()
        )

    def flush(self) -> None:
        """Hand what was written to the system."""
        if self._records is not None:
            self._records.flush()

    def close(self) -> None:
        """Close the file; a later write begins another."""
        if self._records is not None:
            self._records.close()
            self._records = None

    def _add_string(self, plugin: str, tag: str, content: bytes, step: int = 0) -> None:
        data = self._summary.SummaryMetadata.PluginData(plugin_name=plugin)
        # As torch's writer shapes them: a text is a vector of one, a layout a scalar.
        shape = {"tensor_shape": {"dim": [{"size": 1}]}} if plugin == "text" else {}
        tensor = self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=[content], **shape)
        self._add(step, tag=tag, metadata=self._summary.SummaryMetadata(plugin_data=data), tensor=tensor)

    def _add(self, step: int, **value: Any) -> None:
        summary = self._summary.Summary(value=[self._summary.Summary.Value(**value)])
        event = self._event.Event(wall_time=time.time(), step=step, summary=summary)
        if self._records is None:
            self._open()
        self._records.write(event.SerializeToString())

    def _open(self) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.log_dir.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names: the time comes first.
        name = f"events.out.tfevents.{now:010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}.ww_monitor"
        self._records = RecordWriter((self.log_dir / name).open("ab"))
        # The first record of a file says its version.
        self._records.write(self._event.Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
