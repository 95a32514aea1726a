"""What is left of an error reply's text: the exception's own words."""

import pytest

from autoflip_flwr.costs.reason import last_words

RAY = """<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=7)
                  ^^^^^^^^^^^^^^^^^^^
  File "/app/experiment/training.py", line 45, in choose_device
    raise ConfigError(f"device = '{device}'")
app.config.ConfigError: device = 'cuda':
  not available

The above exception was the direct cause of the following exception:

\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=7)
           ^^^^^^^^^^
  File "/flwr/ray_actor.py", line 65, in run
    raise ClientAppException(str(ex)) from ex
flwr.clientapp.client_app.ClientAppException: \n\
Exception ClientAppException occurred. Message: device = 'cuda':
  not available'>"""

TRACEBACK = """Traceback (most recent call last):
  File "a.py", line 1, in f
    x
    ^
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in f
    raise my.Wrong("second")
my.Wrong: second"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RAY, "ConfigError: device = 'cuda': not available"),
        (TRACEBACK, "Wrong: second"),
        (
            "<class 'flwr.clientapp.client_app.ClientAppException'>:<'\n"
            "Exception ClientAppException occurred. Message: it broke'>",
            "it broke",
        ),
        ("<class 'KeyError'>:<''x''>", "KeyError: 'x'"),
        ("no reply\n in time ", "no reply in time"),
        ('  File "a.py", line 1, in f\n    x', 'File "a.py", line 1, in f x'),
        ("", ""),
    ],
)
def test_the_exceptions_own_words_are_left(text, words):
    assert last_words(text) == words


def test_a_long_reason_of_a_hostile_node_is_read_at_once():
    assert len(last_words("a" * 30_000)) == 30_000
    assert len(last_words("a." * 15_000)) == 30_000
