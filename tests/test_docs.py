"""The documentation says what the program does: generated pages are current, the Python page runs, links lead on."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "calibrations" / "README.md"])


@pytest.fixture(scope="module")
def generated():
    return runpy.run_path(str(DOCS / "generate.py"))["pages"]()


@pytest.mark.parametrize("name", ["docs/cli.md", "docs/methods/index.md", "docs/artifact.schema.json", "README.md"])
def test_generated_page_is_current(generated, name):
    # python docs/generate.py writes it again
    assert (ROOT / name).read_text() == generated[ROOT / name]


def test_every_option_in_help_is_on_the_cli_page():
    import typer

    from kvtool.cli import COMMANDS, app

    page = (DOCS / "cli.md").read_text()
    commands = typer.main.get_command(app).commands
    assert set(commands) == {name for name, *_ in COMMANDS}
    for name, command in commands.items():
        section = page.split(f"## kvtool {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            assert parameter.name == "help" or parameter.help, f"{name} {parameter.name} has no help"
            for spelling in parameter.opts if parameter.param_type_name == "option" else []:
                assert f"`{spelling}`" in section or spelling in ("--help", "-h")


def test_every_method_has_a_page_in_the_navigation():
    from kvtool.methods import METHODS

    navigation = (ROOT / "mkdocs.yml").read_text()
    for name in METHODS:
        assert (DOCS / "methods" / f"{name}.md").is_file(), name
    for page in DOCS.rglob("*.md"):
        assert page.relative_to(DOCS).as_posix() in navigation, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_published_schema_accepts_what_is_written_and_refuses_another_format(tmp_path):
    from jsonschema import Draft202012Validator, ValidationError
    from safetensors import safe_open

    from kvtool.calibration import Calibration
    from kvtool.methods import make_method
    from kvtool.shapes import CacheShape, LayerShape, Rope

    rope = Rope(inv_freq=(1.0, 0.1))
    layer = LayerShape(kind="full", num_heads=4, num_kv_heads=2, head_dim=32, scale=0.2, rope=0)
    made = Calibration(make_method("exact"), CacheShape(layers=(layer,), ropes=(rope,)))
    with safe_open(made.save(tmp_path / "x.safetensors"), "pt") as file:
        header = json.loads(file.metadata()["kvtool"])
    schema = Draft202012Validator(json.loads((DOCS / "artifact.schema.json").read_text()))
    schema.validate(header)
    schema.validate(header | {"something": "new"})
    for broken in ({**header, "format": 2}, {k: v for k, v in header.items() if k != "shape"}):
        with pytest.raises(ValidationError):
            schema.validate(broken)


def test_the_python_page_runs(tiny_model, tmp_path, monkeypatch, capsys):
    import kvtool

    monkeypatch.setattr(kvtool, "load_model", lambda: tiny_model, raising=False)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    runpy.run_path(str(script))
    lines = capsys.readouterr().out.splitlines()
    assert "bits per value" in lines[-2]
    # 4-bit keys and 3-bit values: far from exact and far from noise
    assert 0 < float(lines[-1].split("(")[-1].split(",")[0].rstrip(")")) < 0.5
