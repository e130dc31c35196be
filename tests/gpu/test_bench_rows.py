"""`swiftmoe bench rows` on two GPUs: it checks itself that every token comes back."""

import json
from pathlib import Path

import pytest

from lightning_swiftmoe.cli import bench_rows

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("two_gpus")
def test_times_of_all_rows(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    sizes = ["tokens=300", "width=256", "experts=8", "top_k=2", "repeats=5", "plan_ranks=64", "plan_experts=32"]
    assert bench_rows.main([*sizes, "travel=[0,0.5,1]", f"output={output}"]) == 0
    results = json.loads(output.read_text())
    assert [row["travel"] for row in results["rows"]] == [0.0, 0.5, 1.0]
    times = [row[name] for row in results["rows"] for name in ("dispatch_us", "combine_us")]
    assert all(0 < time < 1e5 for time in [*times, results["plan_us"]])
