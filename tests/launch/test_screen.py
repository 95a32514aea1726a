"""What `autoflip run` shows of a run's log: `logs/` holds real ones, the failed one cut to two of ten clients."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from autoflip_flwr.costs.savings import lines
from autoflip_flwr.launch.screen import Screen

LOGS = Path(__file__).parent / "logs"

DEVICE = "ConfigError: device = 'cuda': not available here; auto takes what there is"
FAILURE = f"the exploration failed: no explorer answered; node 13047209414020473105 and 9 more: {DEVICE}"


class Terminal(io.StringIO):
    """A terminal to write to."""

    def isatty(self) -> bool:
        return True


def shown(log: str, **options: bool) -> tuple[Screen, str]:
    out = io.StringIO()
    screen = Screen(out, **options)
    for line in log.splitlines(keepends=True):
        screen.feed(line)
    screen.close()
    return screen, out.getvalue()


def info(text: str) -> str:
    return f"\x1b[92mINFO \x1b[0m:      {text}\n"


def test_a_completed_run_has_a_line_a_step_and_a_round():
    screen, text = shown((LOGS / "completed.txt").read_text("utf-8"), own=True)
    steps, table = text.split(" Run\n")
    assert steps.splitlines() == [
        "starting Ray and the clients' processes ...",
        "10 nodes are connected",
        "[EXPLORATION 1/1] 10 explorers",
        "[exploration] 10 explorers, 2.16 MB so far, 21.3 s",
        "exploration: 10 of 10 explorers answered",
        "mask: 13023 of 43408 prunable parameters kept",
        "[round 0/2] accuracy 0.0944, loss 2.2983, 2.16 MB so far, 21.4 s",
        "[round 1/2] accuracy 0.3444, loss 2.1480, 3.32 MB so far, 24.1 s, about 3 s left",
        "[round 2/2] accuracy 0.5917, loss 1.4614, 4.42 MB so far, 26.7 s, about 0 s left",
    ]
    assert table.splitlines()[-1] == "run record: /home/user/runs/20261125-181513-autoflip-digits"
    assert screen.record == "/home/user/runs/20261125-181513-autoflip-digits"
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_a_failed_run_has_one_line_for_all_clients_that_failed_alike_and_its_reason_once():
    screen, text = shown((LOGS / "failed.txt").read_text("utf-8"), own=True)
    assert text.splitlines()[3:] == [f"error: {DEVICE}", "[exploration] 0 explorers, 1.87 MB so far, 10.9 s"]
    assert screen.errors == [FAILURE]
    assert screen.reason(f"Simulation failed with exception: {FAILURE}") == FAILURE


def test_the_first_traceback_of_another_app_is_shown_and_no_other():
    screen, text = shown((LOGS / "failed.txt").read_text("utf-8"))
    assert text.count("ray::ClientAppActor.run()") == 2  # an exception, and the one that it has caused
    assert text.count('training.py", line 45, in choose_device') == 1
    assert screen.reason("") == FAILURE


@pytest.mark.parametrize("name", ["completed.txt", "failed.txt"])
def test_verbose_shows_the_whole_log_without_colours(name):
    log = (LOGS / name).read_text("utf-8")
    _, text = shown(log, verbose=True)
    assert "\x1b" not in text
    assert len(text.splitlines()) == len(log.splitlines())


def test_what_an_app_prints_is_shown_whatever_it_is():
    prints = [
        "hello",
        "  indented",
        "epoch 1: 100%|#####| 3/3",
        "my_app.py:3: UserWarning: careful",
        "(2, 3)",
        "Error rate: 0.5",
        "│ a table │",
        "\tindented by a tab",
        "",
        "Final results: 3",
        "[ROUND 1/3]",
        "  warnings.warn(",
    ]
    log = "".join([info("Starting Flower Simulation"), *(f"{line}\n" for line in prints), info("it is done")])
    assert shown(log)[1].splitlines() == ["starting Ray and the clients' processes ...", *prints, "it is done"]


def test_another_app_has_its_rounds_and_their_metrics():
    log = "".join(
        map(
            info,
            [
                "Starting FedAvg strategy:",
                "\t├── Number of rounds: 3",
                "",
                "[ROUND 1/3]",
                "configure_train: Sampled 2 nodes (out of 2)",
                "aggregate_train: Received 1 results and 1 failures",
                "\t└──> Aggregated MetricRecord: {'loss': 0.5}",
                "Global evaluation",
                "\t└──> MetricRecord: {'accuracy': 0.7}",
                "Strategy execution finished in 5.39s",
                "Final results:",
                "\tServerApp-side Evaluate Metrics:",
            ],
        )
    )
    assert shown(log)[1].splitlines() == [
        "[round 1/3]",
        "aggregate_train: Received 1 results and 1 failures",
        "  Aggregated MetricRecord: {'loss': 0.5}",
        "  MetricRecord: {'accuracy': 0.7}",
    ]


def test_what_the_summary_of_the_shipped_app_says_anyway_is_not_shown_twice():
    dense = {"train_up": 4_000_000, "train_down": 4_000_000, "total": 8_000_000}
    sent = {"exploration_up": 500_000, "mask_down": 30_000, "train_up": 1_200_000, "other": 20_000, "total": 1_750_000}
    log = "".join(info(line) for line in [*lines(sent, dense, pruned=True), *lines(sent, dense, pruned=False)])
    assert shown(log, own=True)[1] == ""
    assert len(shown(log)[1].splitlines()) == 8
    assert shown(info("mask: 3 of 9 prunable parameters kept"), own=True)[1] != ""


def test_a_resumed_run_counts_its_rounds_on():
    told = "going on after round 4; Flower counts the rounds that follow from 1"
    assert shown(info(told) + info("[ROUND 1/2]"))[1].splitlines() == ["going on after round 4", "[round 5/6]"]


def test_warnings_and_errors_of_the_library_are_never_cut():
    reason = "node 3: " + "x" * 300
    log = f"\x1b[93mWARNING \x1b[0m:   {reason}\n\x1b[91mERROR \x1b[0m:     round 2 has no checkpoint\n"
    assert shown(log, own=True)[1].splitlines() == [f"warning: {reason}", "error: round 2 has no checkpoint"]


def test_an_error_reply_is_one_line_and_what_follows_is_shown():
    log = info(
        "\t> Received error in reply from node 7: <class 'ValueError'>:<'Traceback (most recent call last):\n"
        '  File "client.py", line 3, in train\n    raise ValueError("bad")\nValueError: bad\'>'
    )
    assert shown(log * 2 + "printed\n", own=True)[1].splitlines() == ["error: ValueError: bad", "printed"]


def test_what_is_printed_after_an_error_is_not_part_of_it():
    log = "\x1b[91mERROR \x1b[0m:     it broke\n  printed\n\nprinted\n"
    assert shown(log)[1].splitlines() == ["error: it broke", "  printed", "", "printed"]


def test_a_record_that_another_app_speaks_of_is_not_ours():
    assert shown(info("run record: /somewhere"))[0].record == ""


def test_what_clients_print_is_told_apart():
    log = "\x1b[36m(ClientAppActor pid=7)\x1b[0m training\n"
    log += "\x1b[36m(ClientAppActor pid=7)\x1b[0m \x1b[93mWARNING \x1b[0m:   Manually terminating ClientAppActor\n"
    assert shown(log)[1].splitlines() == ["ClientAppActor: training"]


@pytest.mark.parametrize(
    ("errors", "details", "reason"),
    [
        ([], "Simulation failed with exception: it broke", "it broke"),
        (["lr = 0: is wrong"], "Simulation failed with exception: lr = 0: is wrong", "lr = 0: is wrong"),
        (["lr = 0: is wrong"], "finished:failed", "lr = 0: is wrong; finished:failed"),
        (["lr = 0: is"], "lr = 0: is wrong", "lr = 0: is wrong"),
        (["first", "second"], "No heartbeat", "first; second; No heartbeat"),
    ],
)
def test_a_reason_is_told_once(errors, details, reason):
    screen = Screen(io.StringIO())
    for error in errors:
        screen.feed(f"\x1b[91mERROR \x1b[0m:     autoflip: error: {error}\n")
    screen.close()
    assert screen.reason(details) == reason


def test_a_crash_is_told_by_its_first_exception():
    log = (
        "\x1b[91mERROR \x1b[0m:     Simulation raised an exception\nTraceback (most recent call last):\n"
        '  File "server.py", line 3, in main\n    x\nmy.Wrong: it broke\n'
    )
    screen, _ = shown(log.replace("my.Wrong", "my.WrongError"))
    assert screen.reason("Simulation failed with exception: it broke") == "WrongError: it broke"
    assert screen.reason("Simulation Runtime crashed.") == "WrongError: it broke"


def test_progress_is_written_over_on_a_terminal_and_a_line_each_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    log = info("explorer 7 of 20, about 4 min left") + info("round 3: 4 of 5 replies after 20 s") + info("done")
    terminal = Terminal()
    screen = Screen(terminal)
    for line in log.splitlines(keepends=True):
        screen.feed(line)
    assert terminal.getvalue() == (
        "\rexplorer 7 of 20, about 4 min left\x1b[K\rround 3: 4 of 5 replies after 20 s\x1b[K\r\x1b[Kdone\n"
    )
    assert shown(log)[1].splitlines() == [
        "explorer 7 of 20, about 4 min left",
        "round 3: 4 of 5 replies after 20 s",
        "done",
    ]


@pytest.mark.parametrize(("no_colour", "kept"), [("", True), ("1", False)])
def test_colours_stay_on_a_terminal_that_wants_them(no_colour, kept, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_colour)
    terminal = Terminal()
    Screen(terminal, verbose=True).feed(info("hello"))
    assert ("\x1b[92m" in terminal.getvalue()) is kept
