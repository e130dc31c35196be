"""Runs systems in turns, each in fresh processes, and keeps what they measured."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_swiftmoe.cli._peers.job import Job, Plan
from lightning_swiftmoe.cli._peers.meter import Result
from lightning_swiftmoe.cli._peers.systems import System
from lightning_swiftmoe.cli._peers.worker import Turn, forget_earlier_run, loaded_file
from lightning_swiftmoe.report.paper import steps_until

GRACE_S = 5.0  # for the other ranks to say what they failed at
POLL_S = 0.05
MESSAGE_CHARS = 160


@dataclass
class Row:
    """What is known of one system.

    Args:
        system: which.
        rounds: results of its ranks, round by round.
        error: why there are none, or no more.
        seconds: how long its last round took, start to end.
    """

    system: System
    rounds: list[list[Result]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


class Group:
    """The processes of one system in one round.

    Args:
        system: which.
        config: of ``swiftmoe train``, for all systems.
        plan: what is measured.
        folder: of this system and round.
    """

    def __init__(self, system: System, config: DictConfig, plan: Plan, folder: Path) -> None:
        self.system, self.folder = system, folder
        forget_earlier_run(folder)
        Job(system.name, 0, system.num_ranks, system.configure(config), plan, folder).write()
        self.processes = [self._start(rank) for rank in range(system.num_ranks)]

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        ranks = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "NODE_RANK": 0,
            "WORLD_SIZE": self.system.num_ranks,
            "LOCAL_WORLD_SIZE": self.system.num_ranks,
            "MASTER_ADDR": "127.0.0.1",
        }
        # One thread a rank, as torchrun does: Lightning would share out all cores, and others would not.
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {key: str(value) for key, value in ranks.items()}
        with (self.folder / f"log.rank{rank}.txt").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lightning_swiftmoe.cli._peers.worker", str(self.folder), str(rank)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def loaded_files(self) -> list[Path]:
        """What will be there when all ranks have loaded their packages."""
        return [loaded_file(self.folder, rank) for rank in range(self.system.num_ranks)]

    def run(self, limit_s: float, others_loaded: Sequence[Path]) -> list[Result]:
        """Let the ranks train; what each measured.

        Args:
            limit_s: after which they are stopped.
            others_loaded: what will be there when others have loaded their packages, which the timed steps wait for.

        Raises:
            RuntimeError: a rank failed, or the time was up; one line says which.
        """
        Turn(free_port(), [str(path) for path in others_loaded]).give(self.folder)
        deadline = time.monotonic() + limit_s
        try:
            while any(process.poll() is None for process in self.processes):
                if any(process.poll() for process in self.processes):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                if time.monotonic() > deadline:
                    break
                time.sleep(POLL_S)
            if all(process.poll() == 0 for process in self.processes):
                return [self._result(rank) for rank in range(self.system.num_ranks)]
            raise RuntimeError(self._why(limit_s))
        finally:
            self.stop()

    def stop(self) -> None:
        """End processes that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _result(self, rank: int) -> Result:
        return Result(**json.loads((self.folder / f"result.rank{rank}.json").read_text()))

    def _why(self, limit_s: float) -> str:
        for rank in range(self.system.num_ranks):
            said = self.folder / f"error.rank{rank}.txt"
            if said.exists():
                return one_line(said.read_text())
        failed = [process.returncode for process in self.processes if process.returncode]
        if failed:
            return f"a rank ended with status {failed[0]}, see {self.folder}/log.rank*.txt"
        return f"stopped after {limit_s:.0f} s"


@dataclass
class Driver:
    """Runs all systems ``rounds`` times.

    Args:
        systems: in the order of their turns.
        config: of ``swiftmoe train``.
        plan: what is measured; only the first round is profiled.
        rounds: how often each takes its turn.
        limit_s: of one system's turn.
        budget_s: of everything: no turn starts or goes on behind it.
        folder: for files of the ranks.
        tell: called with a row whenever one changed.
    """

    systems: list[System]
    config: DictConfig
    plan: Plan
    rounds: int
    limit_s: float
    budget_s: float
    folder: Path
    tell: Callable[[Row, list[Row]], None]

    def run(self) -> list[Row]:
        """All rows, also of what failed. While one system starts, the next one's processes load their packages."""
        start = time.monotonic()
        rows = [Row(system, error=system.missing()) for system in self.systems]
        for row in rows:
            if row.error:
                self.tell(row, rows)
        turns = [(number, row) for number in range(self.rounds) for row in rows]
        following: tuple[Row, Group] | None = None
        try:
            for position, (number, row) in enumerate(turns):
                if row.error:
                    continue
                left_s = self.budget_s - (time.monotonic() - start)
                if left_s < max(row.seconds, 1.0):
                    if not row.rounds:
                        row.error = f"skipped: the budget of {self.budget_s:.0f} s is spent"
                        self.tell(row, rows)
                    continue
                if following is not None and following[0] is not row:
                    following[1].stop()
                    following = None
                group = following[1] if following else self._start(number, row)
                ahead = next(((n, r) for n, r in turns[position + 1 :] if not r.error), None)
                following = (ahead[1], self._start(*ahead)) if ahead else None
                others_loaded = following[1].loaded_files() if following else []
                self._take_turn(row, group, min(self.limit_s, left_s), others_loaded)
                self.tell(row, rows)
        finally:
            if following is not None:
                following[1].stop()
        return rows

    def _start(self, number: int, row: Row) -> Group:
        plan = self.plan
        if number > 0:
            plan = Plan(**{**vars(plan), "profiled": 0})
        name = "".join(c if c.isalnum() else "-" for c in row.system.label)
        return Group(row.system, self.config, plan, self.folder / f"{name}-{number}")

    def _take_turn(self, row: Row, group: Group, limit_s: float, others_loaded: Sequence[Path]) -> None:
        began = time.monotonic()
        try:
            row.rounds.append(group.run(limit_s, others_loaded))
        except RuntimeError as error:
            row.error = str(error)
        row.seconds = time.monotonic() - began


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_line(text: str) -> str:
    """The first words of a message."""
    words = " ".join(text.split())
    return words if len(words) <= MESSAGE_CHARS else words[: MESSAGE_CHARS - 3] + "..."


def summary(row: Row, tokens_per_rank: int, target_loss: float | None = None) -> dict[str, Any]:
    """One row as numbers: of ranks the slowest and the fullest, of rounds all steps.

    Args:
        row: of one system.
        tokens_per_rank: of one step.
        target_loss: to which steps are counted; minutes are these steps at the mean of the timed ones.
    """
    found: dict[str, Any] = {"gpus": row.system.num_ranks, "rounds": len(row.rounds), "error": row.error}
    if not row.rounds:
        return found
    steps_ms = [max(of_ranks) for ranks in row.rounds for of_ranks in zip(*(r.steps_ms for r in ranks), strict=True)]
    block_s = sum(max(result.block_s for result in ranks) for ranks in row.rounds)
    tokens = len(steps_ms) * tokens_per_rank * row.system.num_ranks
    everyone = [result for ranks in row.rounds for result in ranks]
    first = row.rounds[0]
    if target_loss is not None:
        steps = steps_until(first[0].losses, target_loss)
        if not math.isnan(steps):
            found |= {"steps_to_loss": steps, "minutes_to_loss": steps * block_s / len(steps_ms) / 60}
    return found | {
        "step_ms": {
            "mean": sum(steps_ms) / len(steps_ms),
            "median": statistics.median(steps_ms),
            "worst": max(steps_ms),
        },
        "wall_ms": block_s / len(steps_ms) * 1e3,
        "tokens_per_s": tokens / block_s,
        "allocated_gib": max(result.allocated_gib for result in everyone),
        "reserved_gib": max(result.reserved_gib for result in everyone),
        "device_gib": max(result.device_gib for result in everyone),
        "start_s": max(result.start_s for result in everyone),
        "start_host_gib": max(result.start_host_gib for result in everyone),
        "survival": first[0].survival,
        "losses": first[0].losses,
        "steps_ms": [round(value, 3) for value in steps_ms],
        "round_tokens_per_s": [
            len(ranks[0].steps_ms) * tokens_per_rank * row.system.num_ranks / max(r.block_s for r in ranks)
            for ranks in row.rounds
        ],
        "profile": [result.profile for result in first] if first[0].profile else None,
    }
