"""Schedules at concrete steps."""

import pytest

from sae_lightning.training.module import Schedule


def factors(steps: int, **settings) -> list[float]:
    schedule = Schedule(**settings)
    return [round(schedule.lr_factor(step, steps), 6) for step in range(steps)]


def test_without_settings_nothing_changes():
    schedule = Schedule.of(None)
    assert [schedule.lr_factor(step, 10) for step in range(10)] == [1.0] * 10
    assert [schedule.sparsity_factor(step, 10) for step in range(10)] == [1.0] * 10
    assert [schedule.k_at(5, step, 10) for step in range(10)] == [5] * 10


def test_warmup_rises_linearly_and_decay_falls_linearly_to_the_end():
    assert factors(10, warmup=0.4) == [0.25, 0.5, 0.75] + [1.0] * 7
    assert factors(10, decay=0.4) == [1.0] * 7 + [0.75, 0.5, 0.25]
    assert factors(10, warmup=0.2, decay=0.2) == [0.5] + [1.0] * 8 + [0.5]
    assert Schedule(decay=0.4).lr_factor(10, 10) == 0
    assert Schedule(decay=0.4).lr_factor(11, 10) == 0


def test_cosine_falls_over_the_whole_training_or_its_end():
    assert factors(4, decay=1, shape="cosine") == [1.0, 0.853553, 0.5, 0.146447]
    assert factors(8, decay=0.5, shape="cosine") == [1.0] * 5 + [0.853553, 0.5, 0.146447]
    assert Schedule(decay=1, shape="cosine").lr_factor(4, 4) == 0


def test_where_warmup_and_decay_meet_the_smaller_counts():
    assert factors(4, warmup=1, decay=1) == [0.25, 0.5, 0.5, 0.25]


def test_short_trainings_have_no_share_of_a_step():
    assert factors(3, warmup=0.1, decay=0.1) == [1.0] * 3
    assert factors(1, warmup=1, decay=1) == [1.0]
    assert Schedule(sparsity_warmup=0.1).sparsity_factor(0, 3) == 1


def test_the_sparsity_weight_rises_over_its_share():
    schedule = Schedule(sparsity_warmup=0.5)
    assert [schedule.sparsity_factor(step, 8) for step in range(8)] == [0.25, 0.5, 0.75] + [1.0] * 5
    assert schedule.lr_factor(0, 8) == 1


def test_k_falls_linearly_from_its_start_and_stays():
    schedule = Schedule(k_from=20, k_share=0.5)
    assert [schedule.k_at(4, step, 8) for step in range(8)] == [20, 16, 12, 8, 4, 4, 4, 4]
    assert Schedule(k_from=20).k_at(4, 0, 8) == 4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"warmup": 1.5}, r"schedule\.warmup=1\.5 must be a share"),
        ({"decay": -0.1}, r"schedule\.decay=-0\.1 must be a share"),
        ({"sparsity_warmup": 100}, r"schedule\.sparsity_warmup=100 must be a share"),
        ({"k_share": 2, "k_from": 9}, r"schedule\.k_share=2 must be a share"),
        ({"shape": "step"}, r"Unknown schedule\.shape=step; choose one of linear, cosine"),
        ({"k_share": 0.5}, r"k_share needs schedule\.k_from"),
        ({"warm_up": 0.1, "decay": 0.1}, r"Unknown schedule setting \['warm_up'\]; known: decay, k_from"),
    ],
)
def test_impossible_schedules_fail_with_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Schedule.of(settings)
