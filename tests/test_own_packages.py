"""fgaif started in a folder that has packages named as ours."""

import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

import fgaif
from fgaif.own_packages import shadowed

ROOT = Path(fgaif.__file__).parents[1]
IN_A_WORKER = """
import psutil
import ray
from fgaif.own_packages import own_packages_first

own_packages_first()
from cluster.launch import connect
from fgaif.config import load_config

connect(load_config(None, ["cluster.local_cpus=1"]))

@ray.remote
def where():
    import actors, cluster
    return actors.__file__, cluster.__file__

print(*ray.get(where.remote()))
for process in psutil.Process().children(recursive=True):
    for socket in process.net_connections("tcp"):
        if socket.status == psutil.CONN_LISTEN:
            print("LISTEN", socket.laddr.ip, process.name())
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    for name in ("actors", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the user own {name}')")
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_only_a_foreign_folder_shadows(foreign: Path, tmp_path: Path) -> None:
    assert shadowed(foreign)
    assert not shadowed(ROOT)
    assert not shadowed(tmp_path / "nothing")


def test_the_command_line_is_ours(foreign: Path) -> None:
    assert fgaif.__version__ in run(foreign, "-m", "fgaif", "version")


@pytest.mark.long
@pytest.mark.ci
def test_workers_of_ray_import_ours(foreign: Path) -> None:
    """And of what such a Ray starts only this machine reaches anything."""
    lines = [line.split() for line in run(foreign, "-c", IN_A_WORKER).splitlines()]
    actors, cluster = next(paths for paths in lines if paths[0].endswith("__init__.py"))
    assert Path(actors).parents[1] == ROOT
    assert Path(cluster).parents[1] == ROOT
    sockets = [line for line in lines if line[0] == "LISTEN"]
    assert len(sockets) > 3
    assert all(ip_address(line[1].removeprefix("::ffff:")).is_loopback for line in sockets), sockets
