"""``python -m kvtool.kernels.check`` has a case for every kernel, says PASS or FAIL, and exits with 1 on a failure."""

import os
import subprocess
import sys

import pytest
import torch

from kvtool.attention import Attended
from kvtool.backends import has_kernel
from kvtool.kernels import check
from kvtool.methods import METHODS


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["check", *arguments])
    code = check.main()
    return code, capsys.readouterr()


def test_every_method_with_a_kernel_has_a_case(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "--list")
    assert code == 0
    for name in METHODS:
        assert not has_kernel(name) or any(line.startswith(name) for line in said.out.splitlines()), name
    for word in ("triton: 1 bit", "gluon: 2 bits", "3 bits", "4 bits", "8 bits", "mixed", "encode", "tail"):
        assert word in said.out


def test_a_listing_needs_neither_a_gpu_nor_the_interpreter():
    # a process of its own: kernels are made for the interpreter, or not, when they are imported
    hidden = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = [sys.executable, "-m", "kvtool.kernels.check", "--list", "gluon"]
    done = subprocess.run(asked, env=hidden | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(check._PACKED)


def test_cases_pass_and_what_no_back_end_would_run_is_skipped(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "8 bits, D 64", "encode 2", "tail of 1 ", "published")
    assert code == 0, said
    verdicts = [line.split()[0] for line in said.out.splitlines()]
    dialects = 2 if torch.cuda.is_available() else 1
    assert sorted(verdicts) == ["PASS"] * (2 + dialects) + ["SKIP"]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_kernel_fails(monkeypatch, capsys, factor):
    exact = check.attend_tail
    monkeypatch.setattr(check, "attend_tail", lambda *arguments, **options: factor * exact(*arguments, **options))
    code, said = run(monkeypatch, capsys, "tail of 1 ")
    assert code == 1
    assert said.out.startswith("FAIL")


@pytest.mark.parametrize("lse", [0.0, float("inf"), float("nan")])
def test_a_wrong_log_sum_exp_is_found(lse):
    exact = Attended(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1))
    found = check._compare(Attended(exact.out, torch.full((1, 1, 1), lse)), exact)
    assert not found.lse <= found.limit


def test_a_kernel_that_cannot_run_fails(monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(check, "attend_tail", broken)
    code, said = run(monkeypatch, capsys, "tail of 1 ")
    assert code == 1
    assert "an illegal memory access" in said.out


def test_without_gpu_and_interpreter_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, said = run(monkeypatch, capsys)
    assert code == 2
    assert "TRITON_INTERPRET=1" in said.err
