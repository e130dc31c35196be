"""Experts that are not fused, whose state travels through memory that all ranks reach; see ``symmetric_on_cpu``.

Their tokens are planned on the host. Under autocast residents and gradients are of two dtypes.
"""

import sys
import tempfile
from dataclasses import replace

import tests.strategy.symmetric_on_cpu as on_cpu  # first: it sets what ranks are forked with
from lightning_swiftmoe.parallel import setup
from lightning_swiftmoe.parallel.peer_memory import Channel
from lightning_swiftmoe.parallel.symmetric_rows import SymmetricRows
from lightning_swiftmoe.parallel.symmetric_shards import SymmetricState
from tests.hf.test_strategy import Causal, job_of, train, train_alone
from tests.jobs import largest_error, sgd
from tests.ranks import run_ranks

# Steps, and errors of moves. In bf16 a router may choose another expert, which later steps follow.
CASES = {"32-true": (3, 1e-4), "bf16-mixed": (1, 0.3)}


def through_files(job, folder):
    memories = []

    def exchanges(transport, tokens, control, bound):
        memories.append(on_cpu.FileMemory(tokens.group, control, folder))
        rows = SymmetricRows(tokens, memories[0], on_cpu.SameEverywhere(control))
        return rows, SymmetricState(memories[0])

    setup._device_exchanges = exchanges
    result = train(job, "gpt_oss")
    assert memories[0].signals.epochs[Channel.STATE] > 0, "state took another way"
    return result["weights"]


def check(precision):
    steps, error = CASES[precision]
    job = job_of(precision=precision, optimizer=sgd, steps=steps, slots=3, strategy={"transient_copies": 2})
    start = Causal(job, "gpt_oss").state_dict()
    expected = train_alone(replace(job, precision="32-true"), "gpt_oss").state_dict()
    names = [name for name in expected if ".experts." in name]
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(2, through_files, job, folder)
    for weights in results:
        moved = {name: weights[name] - start[name] for name in names}
        assert largest_error(moved, {name: expected[name] - start[name] for name in names}) < error


if __name__ == "__main__":
    for name in sys.argv[1:]:
        check(name)
