"""When a process that died is started again."""

from gpumesh_local.policy import RestartPolicy


def test_delays_double_from_a_fifth_of_a_second() -> None:
    policy = RestartPolicy()
    assert [policy.died(now) for now in (0.0, 1.0, 2.0, 3.0)] == [0.2, 0.4, 0.8, 1.6]


def test_the_fifth_death_within_30_seconds_is_one_too_many() -> None:
    policy = RestartPolicy()
    assert None not in [policy.died(float(now)) for now in range(4)]
    assert policy.died(30.0) is None


def test_five_deaths_over_a_longer_time_are_survived_with_at_most_five_seconds_between() -> None:
    policy = RestartPolicy()
    delays = [policy.died(8.0 * number) for number in range(10)]
    assert None not in delays
    assert delays[-1] == 5.0


def test_a_long_life_makes_the_next_restart_quick_again() -> None:
    policy = RestartPolicy()
    for now in (0.0, 1.0, 2.0):
        policy.died(now)
    assert policy.died(100.0) == 0.2
