"""The report: self-contained, complete, and with numbers that are those of the runs."""

import csv
import itertools
import re
import struct
import sys
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("jinja2")

from lightning_swiftmoe.cli import report as command
from lightning_swiftmoe.report import first_steps, load_runs, write_report
from lightning_swiftmoe.report.style import CIVIDIS, OKABE_ITO, byte_size, heat_colours, line_style, number
from lightning_swiftmoe.report.svg import Line, averaged, png_data_uri, ticks
from lightning_swiftmoe.simulate import Hardware, ModelShape, Scenario, Workload, generate, simulate

MODEL = ModelShape(dim=64, ffn_dim=256, num_layers=2, num_moe_layers=2, num_experts=6)
HARDWARE = Hardware("A100", 312, 2039, 80, 32, 100, 5, gpus_per_node=1, num_nodes=4)


@pytest.fixture
def simulated(tmp_path):
    trace = generate("drift", Workload(15, 2, 6, tokens=480, num_ranks=4))
    simulate(trace, Scenario(MODEL, HARDWARE, 3), ["static", "flexmoe_5", "proportional"]).write(tmp_path / "sim")
    return tmp_path / "sim"


@pytest.fixture
def trained(tmp_path):
    """What Lightning's CSVLogger and our trace leave: rows with holes, validation on lines of its own."""
    folder = tmp_path / "gpt <tiny>"
    folder.mkdir()
    with (folder / "metrics.csv").open("w", newline="") as file:
        names = [
            "epoch",
            "step",
            "train/loss",
            "val/loss",
            "moe/token_survival",
            "moe/rank_imbalance",
            "moe/ms_gradient",
        ]
        writer = csv.DictWriter(file, [*names, "moe/bytes_gradient", "moe/tokens_per_s"])
        writer.writeheader()
        for step in range(10):
            row = {"step": step, "epoch": 0, "train/loss": 5 - 0.1 * step, "moe/token_survival": 0.5 + 0.04 * step}
            row |= {"moe/ms_gradient": 2.0 if step >= 5 else 99.0, "moe/bytes_gradient": 4.2e6}
            writer.writerow(row | {"moe/rank_imbalance": 1.5, "moe/tokens_per_s": 1000})
        writer.writerow({"step": 9, "val/loss": 4.25})
        writer.writerow({"step": 10, "val/loss": "nan"})
    trace = generate("drift", Workload(10, 2, 6, tokens=480, num_ranks=4))
    replicas = np.full((10, 2, 6), 2)
    rank_load = np.arange(10 * 2 * 4).reshape(10, 2, 4)
    arrays = {"counts": trace.counts, "steps": trace.steps, "replicas": replicas, "rank_load": rank_load}
    np.savez(folder / "trace.npz", **arrays, meta=np.array("{}"))
    (folder / "config.yaml").write_text("model: {num_experts: 6}\npolicy: {name: static}\nseed: 7\n")
    return folder


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.headings, self.titles = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.fetched += [v for k, v in values.items() if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        assert tag not in ("script", "link", "iframe")
        if tag != "meta":
            self.open.append(tag)
        self.titles += tag == "title"

    def handle_startendtag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k == "href"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data.strip())


def test_everything_is_inside_the_page(tmp_path, simulated, trained):
    text = write_report([trained, simulated], tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.fetched
    assert all(url.startswith("data:image/png;base64,") for url in page.fetched)
    assert "http" not in text.replace("http-equiv", "")
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text)
    assert len(text) < 1_000_000


def test_every_section_is_there(tmp_path, simulated, trained):
    headings = Page(write_report([trained, simulated], tmp_path / "r.html").read_text()).headings
    for wanted in (
        "Training loss",
        "Token survival",
        "Load of every expert",
        "Replicas against load",
        "Load of every rank",
        "Where a step's time goes",
        "Bytes by phase",
        "Staleness",
    ):
        assert wanted in headings


def test_names_are_escaped(tmp_path, trained):
    text = write_report([trained], tmp_path / "r.html").read_text()
    assert "gpt <tiny>" not in text
    assert "gpt &lt;tiny&gt;" in text


def test_numbers_are_those_of_the_runs(simulated, trained):
    runs = {run.name: run for run in load_runs([trained, simulated])}
    assert list(runs) == ["gpt <tiny>", "static", "flexmoe_5", "proportional"]
    own = runs["gpt <tiny>"]
    assert own.origin == "measured"
    assert own.curves["loss"].values.tolist() == pytest.approx([5 - 0.1 * s for s in range(10)])
    assert own.curves["val_loss"].values.tolist() == [4.25]
    assert own.phase_ms == {"gradient": 2.0}  # the second half
    assert own.facts == {"experts": "6", "policy": "static", "seed": "7"}
    trace = generate("drift", Workload(10, 2, 6, tokens=480, num_ranks=4))
    assert (own.loads == trace.counts.sum(axis=2)).all()
    assert own.rank_load.tolist() == [[72, 73, 74, 75], [76, 77, 78, 79]]  # of the last step
    table = {row["policy"]: row for row in csv.DictReader((simulated / "simulation.csv").open())}
    for name in ("static", "flexmoe_5", "proportional"):
        run = runs[name]
        assert run.origin == "modelled"
        assert run.curves["survival"].values.mean() == pytest.approx(float(table[name]["mean_survival"]))
        last = run.curves["survival"].values[-1]
        assert run.rank_load.sum() == pytest.approx(last * run.loads[-1].sum())  # after drops, as in training
        assert run.phase_bytes["migration"] * 15 == pytest.approx(float(table[name]["total_migration_bytes"]))
        assert sum(run.phase_ms.values()) == pytest.approx(1e3 * float(table[name]["mean_step_s"]))


def test_runs_of_the_same_name_are_told_apart(simulated):
    names = [run.name for run in load_runs([simulated, simulated])]
    assert len(set(names)) == 6


def test_jobs_of_a_sweep_are_named_by_what_tells_them_apart(simulated, trained):
    sweep = trained.parent / "sweep"
    for job, policy in enumerate(["static", "proportional"]):
        folder = sweep / str(job)
        (folder / "hydra").mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,train/loss\n0,3.0\n")
        (folder / "config.yaml").write_text(f"policy: {{name: {policy}}}\nseed: 7\n")
        (folder / "hydra" / "config.yaml").write_text("policy: {name: another}\n")  # Hydra's own
    assert [run.name for run in load_runs([sweep])] == ["static", "proportional"]
    with_simulation = [run.name for run in load_runs([sweep, simulated])]
    assert with_simulation[:3] == ["static (measured)", "proportional (measured)", "static (modelled)"]
    (sweep / "1" / "config.yaml").write_text("policy: {name: static}\nseed: 7\n")
    assert [run.name for run in load_runs([sweep])] == ["0", "1"]


def test_the_expert_shown_over_time_is_the_one_that_varies_most(tmp_path, trained):
    text = write_report([trained], tmp_path / "r.html").read_text()
    with np.load(trained / "trace.npz") as file:
        loads = file["counts"].sum(axis=2)
    share = loads / loads.sum(axis=2, keepdims=True)
    spread = {(layer, e): np.std(share[:, layer, e]) for layer in range(2) for e in range(6)}
    layer, expert = max(spread, key=spread.get)
    assert f"expert {expert} of layer {layer}</h3>" in text


def test_without_jinja2_a_run_still_ends_well(tmp_path, trained, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lightning_swiftmoe.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    message = command.write_report_of(trained)
    assert message == "no report.html: jinja2 is missing; install lightning-swiftmoe[report]"
    assert not (trained / "report.html").exists()


def test_the_first_steps_of_a_run(simulated, trained):
    own, *modelled = (first_steps(run, 4) for run in load_runs([trained, simulated]))
    assert own.curves["loss"].values.tolist() == pytest.approx([5, 4.9, 4.8, 4.7])
    assert "val_loss" not in own.curves  # of step 9
    assert (own.steps <= 4).all()
    assert len(own.loads) == len(own.replicas) == len(own.steps) < 10
    assert all(run.curves["survival"].values.size == 15 for run in modelled)
    assert command.main([str(trained), "--steps", "0"]) == 2


def test_a_run_with_metrics_only(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,train/loss\n0,3.0\n")
    headings = Page(write_report([tmp_path / "run"], tmp_path / "r.html").read_text()).headings
    assert headings == ["Over time", "Training loss"]


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "no run at"), ("empty", "holds neither"), ("broken", "is no simulation")]
)
def test_mistakes_are_one_line(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "simulation.json").write_text("{")
    assert command.main([str(tmp_path / name), "-o", str(tmp_path / "r.html")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_folders_without_a_run_are_left_out(tmp_path, simulated, trained, capsys):
    """As ``swiftmoe report outputs/*/*`` names them: folders of what was refused, and files."""
    (tmp_path / "refused" / "hydra").mkdir(parents=True)
    (tmp_path / "refused" / "hydra" / "config.yaml").write_text("seed: 7\n")
    (tmp_path / "notes.txt").write_text("mine")
    others = [str(tmp_path / "refused"), str(tmp_path / "notes.txt")]
    with_runs = [str(trained), str(simulated)]
    assert command.main([*others, *with_runs, "-o", str(tmp_path / "some.html")]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"left out, no run there: {', '.join(others)}\n"
    assert command.main([*with_runs, "-o", str(tmp_path / "only.html")]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "some.html").read_text() == (tmp_path / "only.html").read_text()
    assert command.main([*others, "-o", str(tmp_path / "none.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {others[0]} holds neither metrics.csv nor simulation.json nor a trace")
    assert not (tmp_path / "none.html").exists()


def test_a_folder_that_is_not_there_is_no_folder_to_leave_out(tmp_path, trained, capsys):
    assert command.main([str(trained), str(tmp_path / "nowhere"), "-o", str(tmp_path / "r.html")]) == 2
    assert "no run at" in capsys.readouterr().err


def test_where_the_page_is(tmp_path, simulated, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([str(simulated)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"wrote {tmp_path / 'report.html'} (")
    assert (tmp_path / "report.html").is_file()
    assert command.main([str(simulated), "-o", "pages/r.html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"wrote {tmp_path / 'pages' / 'r.html'} (")


def test_png_decodes_to_the_pixels():
    import base64

    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    data = base64.b64decode(png_data_uri(pixels).split(",")[1])
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert (width, height, depth, kind) == (3, 2, 8, 2)
    at = data.index(b"IDAT")
    size = struct.unpack(">I", data[at - 4 : at])[0]
    rows = zlib.decompress(data[at + 4 : at + 4 + size])
    assert [rows[i * 10] for i in range(2)] == [0, 0]
    assert np.frombuffer(b"".join(rows[i * 10 + 1 : i * 10 + 10] for i in range(2)), np.uint8).tolist() == list(
        range(18)
    )


def test_colour_is_never_alone():
    styles = [line_style(i) for i in range(6)]
    assert len({s.dash for s in styles}) == len({s.marker for s in styles}) == len({s.colour for s in styles}) == 6
    assert len({(s.colour, s.dash) for s in map(line_style, range(42))}) == 42

    def lightness(rgb):
        return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]

    shades = [lightness(c) for c in CIVIDIS]
    assert all(a < b for a, b in itertools.pairwise(shades))
    assert len(set(OKABE_ITO)) == 7
    assert heat_colours(np.array([0.0, 1.0])).tolist() == [[0, 34, 78], [254, 232, 56]]


def test_small_helpers():
    assert ticks(0.0, 1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3, 27) == [0, 10, 20]
    assert [number(v) for v in (0, 0.01234, 45.67, 1234.5, 4.5e8)] == ["0", "0.0123", "45.7", "1,234", "4.5e+08"]
    assert [byte_size(v) for v in (12, 4.2e6, 3e12)] == ["12 B", "4.2 MB", "3 TB"]
    line = averaged(Line("x", np.arange(1000.0), np.arange(1000.0) * 2, line_style(0)), 100)
    assert line.x.size == 100
    assert line.y[0] == np.arange(10).mean() * 2
