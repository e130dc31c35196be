"""``swiftmoe bench step`` from the outside."""

import json
from importlib.util import find_spec

import pytest

from lightning_swiftmoe.cli.bench_step import category
from lightning_swiftmoe.cli.main import main
from lightning_swiftmoe.trace_file import read_trace
from tests.processes import swiftmoe

SMALL = ["data.seq_len=32", "data.batch_size=8", "data.limit_bytes=50000", "warmup=2", "steps=3"]


def bench(cwd, *args):
    return swiftmoe("bench", "step", *args, f"hydra.run.dir={cwd}/run", cwd=cwd, env={"COLUMNS": "200"}, timeout_s=200)


@pytest.mark.distributed
@pytest.mark.parametrize("start_method", ["fork", pytest.param("popen", marks=pytest.mark.exhaustive)])
def test_what_rank_0_measured_arrives(tmp_path, start_method):
    method = f"cluster.start_method={start_method}"
    status, text = bench(tmp_path, *SMALL, "model.capacity_factor=1.0", "strategy=paper", "policy=static", method)
    assert status == 0, text
    result = json.loads((tmp_path / "run/step.json").read_text())
    assert result["tokens_per_s"] * result["step_ms"] / 1e3 == pytest.approx(32 * 8)
    trace = read_trace(tmp_path / "run/trace.npy.gz")
    routed, processed = trace["counts"].sum(axis=(1, 2, 3)), trace["rank_load"].sum(axis=(1, 2))
    assert len(routed) == 2 + 3 + 5
    assert result["survival"] == pytest.approx((processed / routed)[2:5].mean(), rel=1e-6)
    assert result["survival"] < 1
    # Both ranks host all 8 experts of both layers: each receives the other's halves of fp32 gradients and of weights,
    # and in a ring all-reduce of two ranks the dense gradients once.
    experts, dense = 2 * 8 * 2 * 64 * 256, 256 * 64 + 512 * 64 + 2 * (4 * 64 * 64 + 64 * 8)
    least = 4 * (experts + dense)
    assert least < result["received_bytes"] < 1.05 * least


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("steps=0", "steps must be an integer of at least 1, got 0"),
        ("warmup=x", "warmup must be an integer"),
        ("batch_per_rank=0", "batch_per_rank must be a positive integer or null, got 0"),
        ("peers=[ours+transport]", "an override in peers is written +KEY=VALUE, got 'transport'"),
        ("+bench.paers=[]", "bench.paers is unknown; there are"),
        ("peers=[megatron]", "peers must be among none, ours1, "),
        pytest.param(
            "peers=[deepspeed]",
            "lightning-swiftmoe[deepspeed]",
            marks=pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed"),
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capfd, argument, words):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "step", argument]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 256, 64>", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true, __nv_bfloat16>", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "matrix products"),
        ("void (anonymous namespace)::softmax_warp_forward", "other"),
    ],
)
def test_kernels_by_category(kernel, expected):
    assert category(kernel) == expected
