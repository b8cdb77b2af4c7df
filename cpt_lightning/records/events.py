"""TensorBoard's event files, read for their scalars.

Its own reader, which checks each byte in Python, takes forty times as long, seconds at the end of each run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
"""Around each event: how long it is, and checksums."""


@dataclass
class Scalars:
    """What event files have of one run.

    Args:
        entries: By name, step and value of each that was logged.
        seconds: From the first to the last scalar of each file, summed.
    """

    entries: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def load(cls, files: Sequence[Path]) -> Scalars:
        """Reads the files in their order.

        What a resumed run logs again takes the place of what the killed one had logged, as TensorBoard shows it.

        Raises:
            ValueError: A file is broken; it is named.
        """
        scalars = cls()
        for file in files:
            times = []
            for event in _events(file):
                if scalars._take(event):
                    times.append(event.wall_time)
            scalars.seconds += max(times) - min(times) if times else 0.0
        return scalars

    def _take(self, event: Event) -> bool:
        """Adds what an event says; whether there was a scalar in it."""
        if event.session_log.status == event.session_log.START:
            kept = {name: [each for each in found if each[0] < event.step] for name, found in self.entries.items()}
            self.entries = {name: found for name, found in kept.items() if found}
        found = [(each.tag, each.simple_value) for each in event.summary.value if each.HasField("simple_value")]
        for name, value in found:
            self.entries.setdefault(name, []).append((event.step, value))
        return bool(found)


def _events(path: Path) -> Iterator[Event]:
    """All that are whole: the last one of a killed run may be cut off."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    content, begin = memoryview(path.read_bytes()), 0
    while begin + _HEADER.size <= len(content):
        start = begin + _HEADER.size
        end = start + _HEADER.unpack_from(content, begin)[0]
        if end + _FOOTER.size > len(content):
            return
        try:
            yield Event.FromString(bytes(content[start:end]))
        except DecodeError as error:
            raise ValueError(
                f"{path} is broken at byte {begin}: take it out of the folder, or cut it off there"
            ) from error
        begin = end + _FOOTER.size
