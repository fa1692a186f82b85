"""A section of the configuration: frozen, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Keys and values of one part of the configuration."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


def check_single_gpu(key: str, gpus: float, more: str) -> None:
    """Refuse several GPUs for a process that computes on one."""
    if gpus > 1:
        raise ValueError(
            f"{key} = {gpus:g}: one process uses one GPU: set {key}=1, or a fraction of 1 to share "
            f"a GPU; to use more GPUs raise {more}"
        )


def check_ranks_apart(key: str, gpus: float, count_key: str, count: int) -> None:
    """Refuse ranks of one process group on the same GPU."""
    if count > 1 and 0 < gpus <= 0.5:
        raise ValueError(
            f"{key} = {gpus:g} with {count_key} = {count}: ranks would share a GPU, which NCCL "
            f"refuses: set {key}=1, or {count_key}=1"
        )
