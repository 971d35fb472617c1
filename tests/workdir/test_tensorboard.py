"""TensorBoard event files."""

import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog

from imp_jax.workdir.tensorboard import TensorBoardWriter


def read_events(folder):
    """Yield every event in the files of a folder.

    A record is the length of the event (8 bytes), a checksum (4), the event and a checksum (4).
    """
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_event_files_hold_the_scalars_of_all_members_but_twins(tmp_path):
    events = TensorBoardWriter(tmp_path, first_epoch=3)
    members = [("imp", 0), ("reinit", 0), ("twin", 0)]
    events.write(3, members, {"test_accuracy": [0.5, 0.75, 0.0], "loss": [1.0, 2.0, 3.0]})
    events.close()
    assert {path.name for path in (tmp_path / "events").iterdir()} == {"imp-0", "reinit-0"}
    version, start, scalars = read_events(tmp_path / "events" / "reinit-0")
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (3, SessionLog.START)
    assert scalars.step == 3
    assert {v.tag: v.simple_value for v in scalars.summary.value} == {"test_accuracy": 0.75, "loss": 2.0}


def test_event_files_made_in_the_same_second_have_different_names(tmp_path):
    for _ in range(2):
        events = TensorBoardWriter(tmp_path, first_epoch=0)
        events.write(0, [("imp", 0)], {"loss": [1.0]})
        events.close()
    assert len(list((tmp_path / "events" / "imp-0").iterdir())) == 2
