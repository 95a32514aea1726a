"""When a mask changes, and by how much: exact shares, round by round."""

import pytest

from autoflip_flwr.core.pace import Exchange, Fall, cosine, falling


def test_a_cubic_begins_and_ends_where_it_should():
    assert [falling(1.0, 0.1, done, 3) for done in (0, 0.5, 1)] == [1.0, pytest.approx(0.1 + 0.9 / 8), 0.1]


def test_a_cosine_begins_with_half_of_twice_the_share_and_ends_at_0():
    assert [cosine(0.3, done) for done in (0, 0.5, 1)] == [0.3, pytest.approx(0.15), 0.0]


def test_a_density_falls_in_steps_and_reaches_the_target_exactly():
    fall = Fall(initial=1.0, share=0.6, every=2)
    found = {round_: fall.sparsity(0.9, round_, 10) for round_ in range(1, 11)}
    assert {round_: value for round_, value in found.items() if value is not None} == {
        3: round(1 - (0.1 + 0.9 * (2 / 3) ** 3), 9),
        5: round(1 - (0.1 + 0.9 * (1 / 3) ** 3), 9),
        7: 0.9,
    }


@pytest.mark.parametrize(
    ("share", "every", "rounds", "steps"),
    [(0.6, 1, 60, 36), (0.6, 10, 60, 3), (1.0, 1, 5, 4), (0.1, 1, 5, 1), (0.6, 4, 5, 1), (0.22, 1, 50, 11)],
)
def test_the_last_step_is_before_the_last_round(share: float, every: int, rounds: int, steps: int):
    fall = Fall(0.8, share, every)
    assert fall.steps(rounds) == steps
    assert fall.sparsity(0.9, steps * every + 1, rounds) == 0.9
    assert steps * every + 1 <= rounds


def test_without_room_for_a_step_it_says_so():
    with pytest.raises(ValueError, match="5 rounds with a step every 5: the density would never fall"):
        Fall(1.0, 0.6, 5).steps(5)
    with pytest.raises(ValueError, match="1 round with"):
        Fall(1.0, 0.6, 1).steps(1)


def test_an_exchange_shrinks_and_ends():
    exchange = Exchange(share=0.3, every=10, until=0.6)
    found = {round_: exchange.after(round_, 100) for round_ in range(101)}
    assert {round_: share for round_, share in found.items() if share} == {
        10: 0.279904, 20: 0.225, 30: 0.15, 40: 0.075, 50: 0.020096,
    }  # fmt: skip
