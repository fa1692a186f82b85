"""Make a CUDA build of torchvision importable beside a CPU build of torch.

PyPI carries only the CUDA build of torchvision. Beside a CPU torch its compiled operators cannot
load, and ``import torchvision`` fails while it registers fake kernels for two operators that do not
exist ("operator torchvision::nms does not exist"). Declaring the two is enough: nothing here
calls them. Registered in the entry-point group ``torch.backends``, so it runs at the end of
``import torch`` in every process, vLLM's own subprocesses included.
"""

from importlib import metadata

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def define_missing_operators() -> None:
    """Declare the operators when torch is a CPU build and torchvision is not; else do nothing."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return
    if version.endswith("+cpu"):
        return
    for name, schema in _SCHEMAS.items():
        if not _is_defined(name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(name + schema)
            # It must outlive this call: its destructor withdraws the schema.
            _LIBRARIES.append(library)


def _is_defined(name: str) -> bool:
    import torch

    return hasattr(torch.ops.torchvision, name)


_LIBRARIES: list[object] = []
