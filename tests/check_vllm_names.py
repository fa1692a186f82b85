"""Whether a vLLM has every name that fgaif uses of it, by reading sources alone.

    python tests/check_vllm_names.py                         # the installed package
    python tests/check_vllm_names.py vllm-0.32.0-....whl     # a wheel, as for GPU machines

Imports are found in our sources; engine arguments, fields of classes and attributes that are used
on objects of vLLM's are listed here. Prints what is looked for and where; exit code 1 if any is
missing. The GPU wheel is large, so this is run by hand when the pinned version changes.
"""

import ast
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINE_ARGUMENTS = """dtype seed max_model_len max_num_seqs tensor_parallel_size enforce_eager
limit_mm_per_prompt mm_processor_cache_gb skip_mm_profiling logprobs_mode max_logprobs
structured_outputs_config gpu_memory_utilization kv_cache_memory_bytes block_size
distributed_executor_backend worker_extension_cls weight_transfer_config enable_lora max_loras
max_lora_rank lora_target_modules mm_device_do_normalize"""
USED: tuple[tuple[str, str], ...] = (
    ("engine/arg_utils.py", ENGINE_ARGUMENTS),
    ("sampling_params.py", "detokenize flat_logprobs output_kind skip_clone logit_bias seed"),
    ("sampling_params.py", "allowed_token_ids prompt_logprobs structured_outputs"),
    ("lora/request.py", "lora_name lora_int_id lora_path"),
    ("lora/worker_manager.py", "_adapter_manager"),
    ("lora/model_manager.py", "lora_index_to_id modules lora_config"),
    ("lora/layers/base_linear.py", "lora_a_stacked lora_b_stacked tp_size"),
    ("lora/layers/column_parallel_linear.py", "slice_lora_a slice_lora_b"),
    ("lora/layers/row_parallel_linear.py", "slice_lora_a slice_lora_b"),
    ("v1/worker/lora_model_runner_mixin.py", "lora_manager"),
    ("v1/engine/llm_engine.py", "add_request add_lora remove_lora collective_rpc step"),
    (
        "v1/engine/llm_engine.py",
        "reset_prefix_cache reset_encoder_cache get_num_unfinished_requests",
    ),
    ("multimodal/registry.py", "create_processor"),
    ("multimodal/processing/processor.py", "_get_mm_fields_config"),
    ("multimodal/inputs.py", "from_hf_inputs PlaceholderRange is_embed"),
    ("model_executor/models/utils.py", "map_name"),
    ("v1/worker/gpu_worker.py", "weight_transfer_engine model_runner"),
)
"""Files of the package, and names that are defined, assigned or annotated in them."""

Read = Callable[[str], str | None]
"""The text of a file of the package by its path inside it; None if it is not there."""


def reader(place: Path) -> Read:
    """Read from a wheel or from a package folder."""
    if place.suffix == ".whl":
        wheel = zipfile.ZipFile(place)
        names = set(wheel.namelist())
        return lambda path: wheel.read(f"vllm/{path}").decode() if f"vllm/{path}" in names else None
    return lambda path: (place / path).read_text("utf-8") if (place / path).is_file() else None


def imports(sources: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Modules of vLLM and the names that our sources import from them."""
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((str(node.module), alias.name) for alias in node.names)


def names_in(text: str) -> set[str]:
    """Everything that a module defines, imports, assigns or annotates, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).rpartition(".")[2])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # lazily exported names are keys of a table
    return found


def missing(
    read: Read, sources: Sequence[Path], used: Sequence[tuple[str, str]] = USED
) -> list[str]:
    """Print every name and where it is looked for; returns those that are not there."""
    wanted = [(path, name) for path, names in used for name in names.split()]
    for module, name in imports(sources):
        base = "/".join(module.split(".")[1:])
        files = [f"{base}.py", f"{base}/__init__.py"] if base else ["__init__.py"]
        wanted.append((next((file for file in files if read(file) is not None), files[0]), name))
    lost = []
    for path, name in dict.fromkeys(wanted):
        text = read(path)
        there = text is not None and name in names_in(text)
        print(f"{'ok     ' if there else 'MISSING'} {path}: {name}")
        if not there:
            lost.append(f"{path}: {name}")
    return lost


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    found = importlib.util.find_spec("vllm")
    if not arguments and (found is None or found.origin is None):
        sys.exit("no vllm is installed; name a wheel or a package folder")
    place = Path(arguments[0]) if arguments else Path(str(found and found.origin)).parent
    sources = sorted([*(ROOT / "actors").glob("*.py"), *(ROOT / "cluster").rglob("*.py")])
    lost = missing(reader(place), sources)
    print(f"{place}: {len(lost)} missing")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
