"""`swiftmoe bench rows`: what is routed, and mistakes; its times need two GPUs (tests/gpu)."""

import pytest
import torch

from lightning_swiftmoe.cli import bench_rows
from lightning_swiftmoe.cli.bench_rows import Options, routing


@pytest.mark.parametrize(("share", "away"), [(0.0, 0), (0.5, 50), (1.0, 100)])
def test_the_share_that_travels(share: float, away: int) -> None:
    options = Options(tokens=100, experts=12, top_k=3)
    for rank, topk_idx in enumerate(routing(options, 4, share)):
        hosts = topk_idx // 3
        assert int((hosts[:, 0] != rank).sum()) == away
        assert all(len(set(row)) == 3 for row in topk_idx.tolist())
        assert torch.equal(hosts.amin(dim=1), hosts.amax(dim=1))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tokens=0", "tokens must be at least 1, got 0"),
        ("experts=7", "experts must be a multiple of the 2 GPUs, got 7"),
        ("top_k=5", "top_k must be at most the 4 experts of one GPU, got 5"),
        ("travel=[1.5]", "travel must be shares from 0 to 1, got [1.5]"),
        ("token=4", "token"),
        ("width=wide", "wide"),
    ],
)
def test_a_mistake_is_one_line(
    override: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert bench_rows.main([override]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_one_gpu_is_too_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert bench_rows.main([]) == 2
    assert "needs at least 2 GPUs in this machine, got 1" in capsys.readouterr().err
