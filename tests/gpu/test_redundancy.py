"""``redundancy=2`` on GPUs: the same bits as without, and a fit that loses a rank is saved from the other's memory."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.job import BEHIND_THE_VOTE
from tests.faults.trials import Trial, expected_weights, faults_of, run_job
from tests.gpu.cases import DEVICE, HOPPER, TRANSPORTS, GpuJob, fit
from tests.gpu.test_same_bits import assert_same_bits
from tests.jobs import adamw

pytestmark = pytest.mark.gpu

# Rank 0 waits for rank 1 in a kernel; it has all votes, and rank 1 had them too.
PHASES = ("forward", "after backward", BEHIND_THE_VOTE)
KILLS = [(transport, phase) for transport in TRANSPORTS for phase in PHASES]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_nothing_changes(several, tmp_path, precision, transport):
    job = GpuJob(width=64, moe=HOPPER, precision=precision, transport=transport, optimizer=adamw)
    once = several.run(fit, job)
    options = {"strategy": {"redundancy": 2}, "trainer": {"default_root_dir": str(tmp_path)}}
    twice = several.run(fit, dataclasses.replace(job, **options))
    assert_same_bits(once, twice)


def trial_of(number, transport, phase, folder):
    """Rank 1 of two is killed in a step in the middle."""
    folder.mkdir()
    trial = Trial.of(number, folder, ("popen",), 2, transport)
    plan = dataclasses.replace(trial.plan, num_ranks=2, killed=(1, 3 + number % 3, phase))
    return Trial(plan, "popen", 1)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of all jobs, at once: each spends most of its time starting."""
    expected = expected_weights(TRANSPORTS[0])
    folders = tmp_path_factory.mktemp("redundancy")

    def faults(number):
        transport, phase = KILLS[number]
        folder = folders / str(number)
        return faults_of(trial_of(number, transport, phase, folder), expected, folder)

    def stuck(transport):
        folder = folders / transport
        plan = trial_of(0, transport, "after backward", folder).plan
        return run_job(dataclasses.replace(plan, meets_in_copy=True), "popen", folder / "killed")

    with ThreadPoolExecutor(len(KILLS) + len(TRANSPORTS)) as pool:
        ended = pool.map(stuck, TRANSPORTS)
        found = dict(zip(KILLS, pool.map(faults, range(len(KILLS))), strict=True))
        return found | dict(zip(TRANSPORTS, ended, strict=True))


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.timeout(200)
@pytest.mark.parametrize("kill", KILLS, ids="-".join)
def test_the_other_rank_saves_what_both_held(outcomes, kill):
    assert outcomes[kill] == []


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a driver to wait in")
@pytest.mark.timeout(200)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_cannot_save_ends(outcomes, transport):
    """Its main thread waits in a copy to pageable memory, and no other thread of it can read what the device holds."""
    code, _, output = outcomes[transport]
    assert code not in (None, 0), output
    assert "rank 0 cannot save what it holds: another thread of it waits in CUDA's driver" in output
