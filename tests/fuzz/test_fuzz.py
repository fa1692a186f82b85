"""Damaged files end in fgaif's own errors or are read; fuzz.py does the same at length."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from damage import damaged
from fuzz import attempt
from readers import READERS, Reader

COUNT = 60


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_whole_file_is_read_and_a_damaged_one_is_read_or_refused(
    reader: Reader, tmp_path: Path
) -> None:
    assert attempt(reader, reader.seed, tmp_path) == "read"
    outcomes = {
        seed: attempt(reader, damaged(reader.seed, seed), tmp_path) for seed in range(COUNT)
    }
    wrong = {seed: what for seed, what in outcomes.items() if what not in ("read", "refused")}
    assert wrong == {}
    assert "refused" in outcomes.values()


@pytest.mark.parametrize(("name", "seed"), [("prompts (Parquet)", 101327)])
def test_what_a_longer_run_found_is_refused(name: str, seed: int, tmp_path: Path) -> None:
    """A column's name that is no UTF-8."""
    reader = next(reader for reader in READERS if reader.name == name)
    assert attempt(reader, damaged(reader.seed, seed), tmp_path) == "refused"
