"""Configurations on ranks beside one process: whatever differs is named."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_swiftmoe import ExpertRebalancer, SwiftMoEStrategy
from lightning_swiftmoe.parallel import setup
from lightning_swiftmoe.parallel.nccl_rows import NcclRows
from lightning_swiftmoe.placement import Placement, get_policy, next_placement, uniform
from lightning_swiftmoe.step import Step
from tests.configs.configuration import Configuration
from tests.configs.module import Module, batches, held_out, trainer_options
from tests.configs.truth import Counted, Outcome, cluster_of, of_record, truth
from tests.ranks import Ranks, run_ranks
from tests.strategy.test_bytes import Recorder

EXACT = 1e-12
ROUNDED = 1e-5  # rows that are planned are added up in fp32
CHUNK = 25  # configurations that one set of ranks trains: a fork costs little, but not nothing
TIMEOUT_S = 20  # of an exchange


# -- on the ranks ------------------------------------------------------------------------------------------------------


def fit(c: Configuration) -> Outcome:
    """On every rank: train with the strategy."""
    torch.manual_seed(0)
    module: Module | None = None
    try:
        module = Module(c, c.num_ranks)
        recorder = Recorder()
        strategy = SwiftMoEStrategy(
            c.slots,
            c.offload,
            c.capacity_scope,  # type: ignore[arg-type]
            c.optimizer_state,
            timeout=TIMEOUT_S,
            expert_parallel_size=c.group_size,
            split=c.split,  # type: ignore[arg-type]
            transient_copies=c.transient_copies,
            find_unused_parameters=c.find_unused,
        )
        rebalancer = ExpertRebalancer(c.make_policy(), c.every_n_steps)
        options = {"num_nodes": c.num_ranks, "plugins": [Ranks()], "callbacks": [recorder, rebalancer]}
        trainer = pl.Trainer(strategy=strategy, **options, **trainer_options(c))
        rank = dist.get_rank()
        with rows_of(c):
            trainer.fit(module, batches(c, rank), held_out(c, rank))
    except ValueError as error:
        if (module is None or not module.losses) and "\n" not in str(error):
            return Outcome(refused=str(error))
        return Outcome(failed=traceback.format_exc())
    except Exception:
        return Outcome(failed=traceback.format_exc())
    counted = [list(map(of_record, step.layers)) for step in recorder.steps]
    return Outcome(module.state_dict(), module.losses, module.validated, counted, recorder.steps)


def rows_of(c: Configuration) -> AbstractContextManager[Any]:
    """Lets rows travel as the configuration says; on CPUs nobody may ask for what is planned on a device."""
    if c.transport == "auto":
        return nullcontext()

    def exchanges(transport: str, tokens: Any, control: Any, bound: Any) -> tuple[NcclRows, None]:
        return NcclRows(tokens, bound), None

    return patch.object(setup, "_device_exchanges", exchanges)


def fit_each(configurations: Sequence[Configuration]) -> list[Outcome]:
    """On every rank: one after the other, up to the first that did not train; ranks are not used on after that."""
    found: list[Outcome] = []
    dist.barrier()  # who is refused at once may not leave while others still connect to it
    for c in configurations:
        found.append(fit(c))
        if found[-1].refused:
            dist.barrier()
        if found[-1].refused or found[-1].failed:
            break
    return found


def on_ranks(configurations: Sequence[Configuration]) -> Iterator[tuple[Configuration, list[Outcome]]]:
    """Train configurations for the same number of ranks; an outcome of every rank for each."""
    todo = list(configurations)
    while todo:
        chunk = todo[:CHUNK]
        try:
            by_rank = run_ranks(todo[0].num_ranks, fit_each, chunk, timeout_s=2 * TIMEOUT_S + 4 * len(chunk))
        except RuntimeError as error:
            if len(chunk) > 1:
                for c in chunk:
                    yield from on_ranks([c])
            else:
                yield chunk[0], [Outcome(failed=str(error))]
            todo = todo[len(chunk) :]
            continue
        done = min(map(len, by_rank))
        for index in range(done):
            yield todo[index], [outcomes[index] for outcomes in by_rank]
        todo = todo[done:]


# -- what must be equal ------------------------------------------------------------------------------------------------


def faults_of(c: Configuration, outcomes: Sequence[Outcome]) -> list[str]:
    """What is wrong with the outcomes of all ranks, in a few words each; nothing where all is right."""
    failed = [outcome.failed for outcome in outcomes if outcome.failed]
    if failed:
        return [failed[0].strip().splitlines()[-1]]
    refusals = {outcome.refused for outcome in outcomes}
    if refusals != {""}:
        return [] if len(refusals) == 1 else [f"refused on some ranks, or with different words: {sorted(refusals)}"]
    first = outcomes[0]
    expected = truth(c, first.steps)
    bound = EXACT if c.is_exact else ROUNDED
    return [
        *different_weights(first.weights, expected.weights, bound),
        *unequal_ranks([outcome.weights for outcome in outcomes]),
        *different("losses", mean(outcome.losses for outcome in outcomes), np.array(expected.losses), bound),
        *different("validation", mean(outcome.validated for outcome in outcomes), np.array(expected.validated), bound),
        *[fault for outcome in outcomes for fault in different_counts(outcome.counted, expected.counted)][:1],
        *wrong_placements(c, first.steps),
    ]


def mean(of_ranks: Iterable[list[float]]) -> np.ndarray:
    """Of the ranks' losses, batch by batch."""
    return np.mean(list(of_ranks), axis=0)


def different(what: str, found: np.ndarray, expected: np.ndarray, bound: float) -> list[str]:
    """Relative to the largest."""
    if found.shape != expected.shape:
        return [f"{what}: {found.size} instead of {expected.size}"]
    if not expected.size:
        return []
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    return [] if error <= bound else [f"{what} differ by {error:.1e}"]


def different_weights(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> list[str]:
    """The one that differs most."""
    if found.keys() != expected.keys():
        return [f"other weights: {sorted(found.keys() ^ expected.keys())}"]
    errors = {
        name: ((found[name] - value).norm() / value.norm().clamp_min(1e-3)).item() for name, value in expected.items()
    }
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return [] if errors[worst] <= bound else [f"{worst} differs by {errors[worst]:.1e}"]


def unequal_ranks(weights: Sequence[dict[str, Tensor]]) -> list[str]:
    """Bit by bit."""
    names = [name for name in weights[0] if any(not torch.equal(weights[0][name], other[name]) for other in weights)]
    return [f"ranks have other bits of {', '.join(names)}"] if names else []


def different_counts(found: list[list[Counted]], expected: list[list[Counted]]) -> list[str]:
    """Assignments, step by step; placements where one process decides too."""
    if len(found) != len(expected):
        return [f"{len(found)} steps instead of {len(expected)}"]
    for step, (layers, others) in enumerate(zip(found, expected, strict=True)):
        if len(layers) != len(others):
            return [f"{len(layers)} sets of experts instead of {len(others)}"]
        for layer, (one, other) in enumerate(zip(layers, others, strict=True)):
            where = f"of step {step}, layer {layer}"
            by_rank = one.routed.shape == other.routed.shape
            routed, processed = (one.routed, one.processed) if by_rank else (one.routed.sum(0), one.processed.sum(0))
            if (routed != other.routed).any():
                return [f"routed {where}: {routed.tolist()} instead of {other.routed.tolist()}"]
            if (processed != other.processed).any():
                return [f"processed {where}: {processed.tolist()} instead of {other.processed.tolist()}"]
            if other.next_placement is not None and one.next_placement != other.next_placement:
                return [f"next placement {where}"]
    return []


def wrong_placements(c: Configuration, steps: Sequence[Step]) -> list[str]:
    """Each group's policy, asked again with the loads that were recorded."""
    cluster = cluster_of(c)
    for first in range(0, c.num_ranks, c.sharers):
        ranks = slice(first, first + c.sharers)
        policy = get_policy(c.make_policy())
        for layer in range(len(steps[0].layers) if steps else 0):
            previous, loads = uniform(cluster), np.zeros(c.num_experts, dtype=np.int64)
            for number, step in enumerate(steps, start=1):
                record = step.layers[layer]
                loads = loads + record.counts[ranks].sum(axis=0)
                expected = previous
                if number % c.every_n_steps == 0:
                    expected, loads = next_placement(policy, loads, cluster, previous), np.zeros_like(loads)
                now, following = (
                    Placement(of.table[ranks], c.num_experts) for of in (record.placement, record.next_placement)
                )
                if (now, following) != (previous, expected):
                    return [f"placement of step {number - 1}, layer {layer}, ranks from {first}"]
                previous = following
    return []


# -- making it smaller -------------------------------------------------------------------------------------------------


def fails(c: Configuration) -> bool:
    """Whether it is wrong when it is run alone."""
    ((_, outcomes),) = on_ranks([c])
    try:
        return bool(faults_of(c, outcomes))
    except Exception:
        return False  # one process cannot do it either


def shrunk(c: Configuration, attempts: int = 80) -> Configuration:
    """A configuration nearer to the defaults that still fails; ``c`` itself where it does not fail alone."""
    tried = {c}
    goes_on = fails(c)
    while goes_on:
        goes_on = False
        for other in simpler(c):
            if other in tried or len(tried) > attempts:
                continue
            tried.add(other)
            if fails(other):
                c, goes_on = other, True
                break
    return c


def simpler(c: Configuration) -> Iterator[Configuration]:
    """One thing less."""
    for rank in range(c.num_ranks if c.num_ranks > 1 else 0):
        rest = c.tokens[:rank] + c.tokens[rank + 1 :]
        if any(rest):
            yield dataclasses.replace(c, tokens=rest)
    for f in dataclasses.fields(c):
        if f.name != "tokens" and getattr(c, f.name) != f.default:
            yield dataclasses.replace(c, **{f.name: f.default})
