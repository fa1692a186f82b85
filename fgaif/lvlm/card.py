"""The model card of a run's adapter, in place of PEFT's form that nobody fills in."""

import json
from pathlib import Path

from fgaif.lvlm.hub import split_name

CARD = "README.md"


def write_adapter_card(folder: Path, *, base: str, rank: int, alpha: float, steps: int) -> None:
    """Write ``README.md`` of a PEFT folder: what it is, of what, how it was made and is loaded.

    Args:
        base: the model that it was trained on, as the configuration names it.
        steps: PPO steps until now.
    """
    parts = split_name(base)
    header = ["library_name: peft", "pipeline_tag: image-text-to-text", "tags: [fgaif, lora]"]
    if parts:
        header.insert(0, f"base_model: {json.dumps(parts[0])}")
    lines = "\n".join(header)
    text = f"""---
{lines}
---
# FGAIF adapter after {steps} PPO steps

A LoRA adapter (PEFT, rank {rank}, alpha {alpha:g}) of `{base}`, trained by PPO with fine-grained AI
feedback (FGAIF, arXiv 2404.05046): a reward at the last token of every sub-sentence, from reward
models that learned from the verdicts of a verifier.

```python
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("path/of/this/folder")
```

Whether it hallucinates less, by which judge, and with which interval, is in the run's
`report/report.html`. The terms of the base model hold for it as well.
"""
    (folder / CARD).write_text(text, encoding="utf-8")
