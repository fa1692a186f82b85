"""Damage files many times and count what their readers do: python tests/fuzz/fuzz.py --count 2000.

Each reader must return or raise one of fgaif's own errors, with a message of bounded length, within
the memory limit. Anything else is printed with the seed that makes it again. Prints the table of
docs/reliability.md.
"""

import argparse
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from damage import damaged
from readers import READERS, Reader

from fgaif.errors import LONGEST_MESSAGE, FgaifError


def attempt(reader: Reader, content: bytes, folder: Path) -> str:
    """Read damaged content: "read", "refused", or what went wrong."""
    path = folder / reader.file
    path.write_bytes(content)
    try:
        reader.read(path)
    except FgaifError as error:
        return "refused" if len(str(error)) <= LONGEST_MESSAGE else f"message of {len(str(error))}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "read"


def main() -> None:
    """Run and report; exit code 1 if a reader did anything else than read or refuse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="damaged files per reader")
    parser.add_argument("--start", type=int, default=0, help="first seed: others, other damage")
    parser.add_argument("--memory-gib", type=float, default=8, help="address space of the process")
    parser.add_argument("--only", help="a part of a reader's name")
    options = parser.parse_args()
    limit = int(options.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    failed = False
    print("| reader | files | read | refused | anything else |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for reader in READERS:
            if options.only and options.only not in reader.name:
                continue
            found: Counter[str] = Counter()
            for seed in range(options.start, options.start + options.count):
                outcome = attempt(reader, damaged(reader.seed, seed), Path(scratch))
                if outcome not in ("read", "refused"):
                    print(f"{reader.name}, seed {seed}: {outcome}", file=sys.stderr)
                    outcome, failed = "else", True
                found[outcome] += 1
            counts = " | ".join(str(found[key]) for key in ("read", "refused", "else"))
            print(f"| {reader.name} | {options.count} | {counts} |", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
