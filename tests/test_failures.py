"""
Walk through the table of docs/failures.md: every case, no traceback, no hang, nothing accepted in silence.
"""
import contextlib, signal

import pytest

import failure_cases
from failure_cases import SECTIONS, fits

CASE_SECONDS = 120

def all_cases():
    """List every case as a parameter of the test below."""
    cases = []
    for module, _ in SECTIONS:
        for case in failure_cases.load(module):
            cases.append(pytest.param(case, id=f"{module[6:]}: {case.what}"))
    return cases

@contextlib.contextmanager
def no_hang():
    """Let a block that takes too long fail, where the system has an alarm clock."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*args):
        raise TimeoutError(f"this hangs for more than {CASE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(CASE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

@pytest.mark.parametrize("case", all_cases())
def test_a_case_ends_as_the_table_says(case, tmp_path, capsys, monkeypatch):
    """The user reads the sentence of the table, and no traceback."""
    monkeypatch.chdir(tmp_path)
    with no_hang():
        call = case.make(str(tmp_path))
        capsys.readouterr()
        said = ""
        try:
            said = call() or ""
        except SystemExit as error:
            assert isinstance(error.code, str), f"exit code {error.code!r} without a sentence"
            assert "\n" not in error.code.strip(), error.code
            said = error.code
    printed = capsys.readouterr()
    text = "\n".join([printed.out, printed.err, said])
    assert "Traceback" not in text
    assert fits(case.then, text), text

def test_the_table_is_up_to_date():
    """docs/failures.md shows the cases as they are."""
    _, tables, _ = failure_cases.split_docs()
    assert tables == failure_cases.table(), "run python tests/failure_cases.py --write"
