"""Loading LVLMs, prompts, token log-probabilities, LoRA and export."""

import logging

# Where it is installed PEFT imports it, and it warns of an optional kernel for CPUs each time.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
