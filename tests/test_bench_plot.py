"""The roofline plot draws what ``--json`` prints, measured or saved, and refuses before anything is measured."""

import json

import pytest
from typer.testing import CliRunner

from kvtool.bench import plot as plots
from kvtool.cli import app
from kvtool.errors import InputError

RECORDS = [
    {"record": "machine", "subject": "a test", "device": "a card", "read_bytes_per_s": 3e12,
     "bytes_per_token": 1000.0, "full_bytes_per_token": 4096},
    *({"record": "step", "context": n, "tokens": n, "batch": b, "bytes": 1000 * n * b, "full_bytes": 4096 * n * b,
       "ms": 1e-2 + 4e-7 * n * b, "spread_ms": 1e-4, "of_read_bandwidth": 0.8, "speedup": 3.5,
       "baselines_ms": {"flash": 1e-2 + 14e-7 * n * b, "cudnn": None}} for b in (1, 4) for n in (4096, 4137, 131072)),
    {"record": "step", "context": 10, "tokens": 0, "batch": 1, "bytes": 0, "full_bytes": 1, "not_run": "too short"},
    {"record": "crossover", "batch": 1, "context": 4096, "measured": 3},
]  # fmt: skip
PREDICTED = {
    "record": "predicted", "context": 4096, "batch": 1,
    "floor_ms": {"H100 SXM": {"compressed": 1.2e-3, "full": 5e-3}, "L40S": {"compressed": 4.7e-3, "full": 2e-2}},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def matplotlib():
    return pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is saved."""
    from matplotlib.figure import Figure

    axes, save = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        axes.append(figure.axes[0])
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return axes


def test_every_case_every_baseline_and_the_floor_are_drawn(drawn, tmp_path):
    plots.plot(RECORDS, tmp_path / "a.svg")
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].get_lines()}
    assert set(lines) == {
        "compressed, batch 1", "compressed, batch 4", "full, flash, batch 1", "full, flash, batch 4",
        "floor: reads 3000 GB/s",
    }  # fmt: skip
    assert lines["compressed, batch 1"][0] == [1000 * 4096, RECORDS[1]["ms"]]
    assert lines["full, flash, batch 4"][-1][0] == 4 * 4096 * 131072
    for size, ms in lines["floor: reads 3000 GB/s"]:
        assert ms == pytest.approx(1e3 * size / 3e12)
    assert drawn[0].get_xscale() == drawn[0].get_yscale() == "log"
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_named_cards_are_hollow_and_called_not_measured(drawn, tmp_path):
    plots.plot([*RECORDS, PREDICTED], tmp_path / "a.png")
    cards = [line for line in drawn[0].get_lines() if "not measured" in line.get_label()]
    assert [line.get_label() for line in cards] == ["H100 SXM, not measured", "L40S, not measured"]
    assert cards[0].get_xydata().tolist() == [[4096e3, 1.2e-3], [4096 * 4096, 5e-3]]
    assert {line.get_markerfacecolor() for line in cards} == {"none"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_benchmark_is_shown_drawn_and_gated_again(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    asked = ["bench", "--from", str(rows), "--plot", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, [*asked, "--fail-if-slower-than", "3"])
    assert done.exit_code == 0, done.output
    assert "compression wins from 4k tokens on" in done.stdout
    assert (tmp_path / "a.png").exists()
    assert CliRunner().invoke(app, [*asked, "--fail-if-slower-than", "4"]).exit_code == 1
    again = CliRunner().invoke(app, [*asked, "--json"])
    assert [json.loads(line) for line in again.stdout.splitlines()] == RECORDS


@pytest.mark.parametrize("text", ["", "no json", '{"record": "decode"}', "[1]"])
def test_other_lines_are_refused(text, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text)
    refused = CliRunner().invoke(app, ["bench", "--from", str(rows)])
    assert isinstance(refused.exception, InputError)
    assert "\n" not in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plot", "a.txt"], "ends in .png, .svg, .pdf"),
        (["--plot", "/no/such/folder/a.png"], "a folder that exists"),
        (["--plot", "a.png", "--e2e"], "leave out one"),
        (["--from", "/no/such/file"], "found"),
    ],
)
def test_what_cannot_be_drawn_is_refused_first(arguments, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvtool.bench.run.bandwidth", None)  # nothing is measured
    refused = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(refused.exception, InputError)
    assert says in str(refused.exception)


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"kvtool\[plot\]"):
        plots.check_plot(tmp_path / "a.png")
