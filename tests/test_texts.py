"""Texts: what ships is there and licensed, what a user brings is read or refused in one sentence."""

import json
import sys
from pathlib import Path

import pytest

from kvtool import texts
from kvtool.errors import InputError

SHIPPED = Path(texts.__file__).parent


def test_each_role_has_a_text_of_its_own():
    assert texts.names() == ["austen", "wiki", "kjv"]
    assert [texts.TEXTS[name].role for name in texts.names()] == ["calibration", "heldout", "third"]
    assert (texts.CALIBRATION, texts.HELDOUT) == ("austen", "wiki")
    starts = {name: texts.load(name)[:40] for name in texts.names()}
    assert starts["austen"].startswith("EMMA")
    assert starts["wiki"].startswith("Anarchism")
    assert starts["kjv"].startswith("Genesis 1")


@pytest.mark.parametrize("name", texts.names())
def test_shipped_text_has_a_row_in_the_readme_and_the_tokens_it_says(name):
    row = next(line for line in (SHIPPED / "README.md").read_text().splitlines() if f"`{name}.txt.xz`" in line)
    assert f"{texts.TEXTS[name].tokens:,}" in row
    assert texts.TEXTS[name].licence.split("-SA")[0] in row
    # English prose: between three and five characters a token
    assert 3 < len(texts.load(name)) / texts.TEXTS[name].tokens < 5


def test_wikipedia_is_attributed():
    """CC-BY-SA asks for the authors, the licence and the changes beside the text."""
    notice = (SHIPPED / "wiki-licence.md").read_text()
    assert "creativecommons.org/licenses/by-sa" in notice
    assert "Changes:" in notice
    for title in ("Anarchism", "Abraham Lincoln", "Agricultural science"):
        assert title in notice
        assert title in texts.load("wiki")


def test_no_sentence_of_one_text_is_in_another():
    """Held out means held out."""
    sentences = {name: {s for s in texts.load(name).split(". ") if len(s) > 60} for name in texts.names()}
    assert not sentences["austen"] & sentences["wiki"]
    assert not sentences["austen"] & sentences["kjv"]
    assert not sentences["wiki"] & sentences["kjv"]


def test_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("naïve text\n", encoding="utf-8")
    assert texts.load(tmp_path / "a.txt") == "naïve text\n"
    lines = [json.dumps({"text": "one", "id": 1}), "", json.dumps({"text": "two"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert texts.load(str(tmp_path / "a.jsonl")) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"\xff\xfe\x00", "expected UTF-8"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', 'line 2 has no string field "text"'),
        ("a.jsonl", b"[1]", 'line 1 has no string field "text"'),
    ],
)
def test_unreadable_file_is_one_sentence(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts.load(tmp_path / file)


def test_missing_text_names_the_shipped_ones():
    with pytest.raises(InputError, match="no such file, and none of the shipped texts austen, wiki, kjv"):
        texts.load("nosuch")


def test_several_texts_go_by_name(tmp_path):
    (tmp_path / "a,b.txt").write_text("one file")
    assert texts.load_all(str(tmp_path / "a,b.txt")) == {"a,b.txt": "one file"}
    (tmp_path / "c.txt").write_text("c")
    assert list(texts.load_all(f"kjv, {tmp_path / 'c.txt'}")) == ["kjv", "c.txt"]
    with pytest.raises(InputError, match="found one of them twice"):
        texts.load_all("kjv,kjv")
    with pytest.raises(InputError, match="'nosuch': no such file"):
        texts.load_all("kjv,nosuch")


def test_data_set_without_the_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'kvtool\[datasets\]'"):
        texts.load("datasets:someone/something")
