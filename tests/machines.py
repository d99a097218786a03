"""How long the state machines run, and the proof that each of them can fail.

CI runs few examples of each. `pytest --hypothesis-profile=nightly` runs many, with longer
sequences of calls: `python -m pytest --hypothesis-profile=nightly -k Machine`.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyFailure, HypothesisException
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

NIGHTLY = "nightly"
_MORE_EXAMPLES, _MORE_STEPS = 40, 2
# On a busy machine drawing takes long, which says nothing about the tested code.
_NOT_CHECKED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def effort(n_examples: int, n_steps: int) -> settings:
    """Return the settings of a machine: these numbers in CI, larger ones in the nightly run."""
    if settings.get_current_profile_name() == NIGHTLY:
        n_examples, n_steps = n_examples * _MORE_EXAMPLES, n_steps * _MORE_STEPS
    return settings(
        max_examples=n_examples,
        stateful_step_count=n_steps,
        deadline=None,
        suppress_health_check=_NOT_CHECKED,
    )


def assert_fails(
    machine: type[RuleBasedStateMachine], n_examples: int = 400, n_steps: int = 40
) -> None:
    """Assert that a machine finds the fault that the caller has planted.

    Without shrinking, so that it ends soon.
    """
    tried = settings(
        max_examples=n_examples,
        stateful_step_count=n_steps,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=_NOT_CHECKED,
    )
    try:
        run_state_machine_as_test(machine, settings=tried)
    except FlakyFailure:  # it depends on a random secret, and is absent when run again
        return
    except HypothesisException:  # the machine itself is wrong
        raise
    except Exception:  # noqa: BLE001 (an assertion, or an error that the code itself raises)
        return
    pytest.fail("the machine has not found the planted fault")
