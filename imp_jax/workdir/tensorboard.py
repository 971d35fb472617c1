"""TensorBoard event files."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class TensorBoardWriter:
    """Writes TensorBoard event files, one folder per member in `events`; the step is the epoch of the run.

    Writes in the calling thread, because tensorboardX's own thread dies if the disk is full, and its queue then
    blocks.
    """

    def __init__(self, workdir: Path, first_epoch: int):
        """Open the writer; TensorBoard ignores events of earlier writers from `first_epoch` on."""
        self._folder, self._first_epoch = workdir / "events", first_epoch
        self._writers: dict[tuple[str, int], EventsWriter] = {}

    def write(
        self, epoch: int, members: Sequence[tuple[str, int]], scalars: Mapping[str, Sequence[float]]
    ) -> None:
        """Write each named scalar of each member at the end of `epoch`; twins are skipped."""
        for i, (arm, replicate) in enumerate(members):
            if arm != "twin":
                values = [
                    Summary.Value(tag=name, simple_value=by_member[i]) for name, by_member in scalars.items()
                ]
                event = Event(wall_time=time.time(), step=epoch, summary=Summary(value=values))
                self._writer(arm, replicate).write_event(event)

    def flush(self) -> None:
        """Flush all event files."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Close all event files."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # a full disk has been reported
                writer.close()

    def _writer(self, *member):
        if member not in self._writers:
            folder = self._folder / "{}-{}".format(*member)
            folder.mkdir(parents=True, exist_ok=True)
            writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
            writer.write_event(Event(step=self._first_epoch, session_log=SessionLog(status=SessionLog.START)))
            self._writers[member] = writer
        return self._writers[member]
