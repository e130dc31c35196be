"""With several expert groups, what users do to weights and gradients is what it is in one process."""

import pytest

from tests.jobs import Job, Net, adamw, sgd
from tests.semantics import test_clipping as clipping
from tests.semantics import test_edits as edits
from tests.semantics import test_gradients as gradients
from tests.semantics.systems import GROUPS, check, on

pytestmark = [pytest.mark.distributed, on(GROUPS)]


@pytest.mark.parametrize("module", [clipping.ClipsItself, clipping.ClipsGroups, clipping.ClipsMaxima])
def test_clipping(system, module):
    check(system, Job(steps=4, optimizer=sgd, module=module), without=Net)


@pytest.mark.parametrize("module", [clipping.ClipsItself, clipping.Manual])
def test_clipping_what_adds_up(system, module):
    accumulate = 1 if module is clipping.Manual else 2
    check(system, Job(steps=3, optimizer=adamw, module=module, trainer={"accumulate_grad_batches": accumulate}))


@pytest.mark.parametrize("module", [gradients.Totals, gradients.AddsUp, gradients.Rescales, gradients.Fills])
def test_gradients(system, module):
    check(system, Job(steps=2, optimizer=sgd, module=module))


@pytest.mark.parametrize("edit", edits.EDITS)
def test_edits(system, edit):
    check(system, edits.job_of(edits.AtEnd, edit), without=Net)


def test_weights_of_evaluation(system):
    check(system, edits.job_of(edits.BeforeValidation, edits.load, trainer=edits.VALIDATED), without=Net)
