"""Write constraints-gpu.txt: what pip would install on a Linux x86-64 machine with NVIDIA GPUs.

    python3.11 .ci/resolve_gpu.py

Nothing is installed, and of wheels only the metadata is read. The pins of constraints.txt hold
where they can; those that the GPU build of vLLM or torch cannot have are left to pip.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("gpu", "dev", "baselines")
HEADER = """\
# What pip chooses for machines with NVIDIA GPUs (Linux x86-64), kept to the tested versions of
# constraints.txt where vllm and the CUDA build of torch allow it. Made by .ci/resolve_gpu.py.
"""
# Configured indexes and folders may hold CPU builds of torch, which would win.
INDEX_ALONE = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
CONFLICT = re.compile(r"\(constraint\) ([A-Za-z0-9._-]+)==")


def requirements() -> list[str]:
    """What `pip install .[gpu,dev,baselines]` asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    return [*project["dependencies"], *extras]


def resolve(wanted: list[str], pins: list[str]) -> tuple[dict[str, str], set[str]]:
    """Versions by name; or none, and the pins that keep pip from an answer.

    Raises:
        SystemExit: pip fails for another reason; what it said is shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-c", str(constraints), *wanted]
        done = subprocess.run(
            command, env=os.environ | INDEX_ALONE, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            found = json.loads(report.read_text(encoding="utf-8"))["install"]
            return {item["metadata"]["name"]: item["metadata"]["version"] for item in found}, set()
    blocking = set(CONFLICT.findall(done.stdout + done.stderr))
    if not blocking:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return {}, blocking


def main() -> None:
    """Drop the pins in the way, one failed attempt after the other, until pip succeeds."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if "==" in line and not line.startswith("#")]
    versions: dict[str, str] = {}
    while not versions:
        versions, blocking = resolve(requirements(), pins)
        if blocking:
            print("left to pip:", ", ".join(sorted(blocking)), flush=True)
        pins = [pin for pin in pins if pin.partition("==")[0] not in blocking]
    text = "".join(f"{name}=={versions[name]}\n" for name in sorted(versions, key=str.lower))
    (ROOT / "constraints-gpu.txt").write_text(HEADER + text, encoding="utf-8")
    print(f"constraints-gpu.txt: {len(versions)} packages")


if __name__ == "__main__":
    main()
