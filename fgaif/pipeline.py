"""Run a job from Python, as ``fgaif run`` does from the command line."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from fgaif.config import Config, load_config, with_overrides
from fgaif.errors import ConfigError


def run(
    config: Config | Path | str,
    overrides: Sequence[str] = (),
    *,
    stages: Sequence[str] | None = None,
    force: bool = False,
) -> Path:
    """Run the stages of a job that are not up to date; return its run folder.

    It starts Ray, on this machine unless the configuration says otherwise, and stops it at the end.

    Args:
        config: the configuration, or its YAML file.
        overrides: dotted, such as ``"ppo.lr=1e-5"``; they come last.
        stages: by their names on the command line; default: all, in order.
        force: redo stages that are up to date; what they wrote before moves aside.

    Raises:
        FgaifError: what stopped a stage; finished ones stay finished.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        config = with_overrides(config, overrides)
    # Like ``python -m fgaif``: the method itself imports nothing of the cluster.
    known: tuple[str, ...] = import_module("cluster.pipeline.keys").ORDER
    for stage in stages or ():
        if stage not in known:
            raise ConfigError(f"stages: no stage {stage!r}; the stages are {', '.join(known)}")
    chosen = known if stages is None else [stage for stage in known if stage in stages]
    import_module("cluster.pipeline.stages").run_stages(config, chosen, force, Console())
    return config.run_dir
