"""Ten random deaths in a run of twenty steps; more by hand with chaos.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_ten_random_deaths_change_no_bit_of_the_policy(tmp_path: Path, layout: str) -> None:
    script = Path(__file__).with_name("chaos.py")
    arguments = ["--kills", "10", "--seed", "0", "--layout", layout, "--folder", tmp_path]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["survived"]
    assert report["kills"] == 10
    assert report["answers_lost"] == report["answers_twice"] == 0
    assert sum(row["kills"] for row in report["rejoin"].values()) == 10
