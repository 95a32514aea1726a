"""What is logged while replies are awaited."""

import pytest
from apps import message_app
from flwr.app import ConfigRecord, MessageType, RecordDict

from autoflip_flwr.server import waiting
from autoflip_flwr.server.waiting import Waiting, duration
from autoflip_flwr.testing import LocalGrid
from autoflip_flwr.wire.keys import EXPLORE, HEADER, TRAIN
from autoflip_flwr.wire.messages import make_header


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("kind", "config", "lines"),
    [
        (
            MessageType.TRAIN,
            {HEADER: make_header(EXPLORE, 0)},
            ["explorer 0 of 20 after 11 s", "explorer 7 of 20, about 4 min left"],
        ),
        (
            MessageType.TRAIN,
            {HEADER: make_header(TRAIN, 3)},
            ["round 3: 0 of 20 replies after 11 s", "round 3: 7 of 20 replies, about 4 min left"],
        ),
        (
            MessageType.EVALUATE,
            {"config": ConfigRecord({"server-round": 4})},
            ["round 4: 0 of 20 evaluations after 11 s", "round 4: 7 of 20 evaluations, about 4 min left"],
        ),
    ],
)
def test_a_line_every_ten_seconds(kind, config, lines, clock, caplog):
    caplog.set_level("INFO", "flwr")
    sent = LocalGrid(message_app(), 1).create_message(RecordDict(config), kind, 100, "")
    progress = Waiting(sent, 20)
    for now, done in ((5.0, 0), (11.0, 0), (20.0, 3), (94.0, 7), (98.0, 8)):
        clock[0] = now
        progress.tell(done)
    assert caplog.messages == lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (240, "4 min"), (5970, "1 h 40 min"), (9000, "2 h 30 min")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
