"""``fgaif replay``: the rollouts of a step, as PPO saw them, and computed anew."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fgaif.config import Config, load_config, parse_config, with_overrides
from fgaif.errors import DataError, FgaifError
from fgaif.files import write_whole
from fgaif.kinds import kind_colours
from fgaif.ppo.rollout_dump import COMPUTED, Dump, Row, read_dump, recompute
from fgaif.types import Kind, SegmentClass

_OK, _NONE = "green", "dim"
_SAME = 1e-6
_SETTINGS = ("estimator", "gamma", "lam")
_HTML_WIDTH = 140


def replay(
    file: Annotated[
        Path, typer.Argument(help="RUN/policy/rollouts/step_*.jsonl, or RUN: the last of it.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="With --recompute: dotted overrides."),
    ] = None,
    row: Annotated[
        int | None, typer.Option(min=0, help="This response alone, token by token.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Responses shown at most.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write it as HTML to this file.")] = None,
    again: Annotated[
        bool, typer.Option("--recompute", help="Compute rewards and advantages anew; compare.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Default: what the run's training ran with."),
    ] = None,
) -> None:
    """Show rollouts that `tracking.rollouts` kept: segments, kinds, rewards, advantages.

    Segments are green where their facts are right, coloured by the kind of hallucination where
    not, and dim without facts. --recompute shows what another reward shape, gamma or lambda would
    have made of the same scores.
    """
    file = _dump_file(file)
    dump = read_dump(file)
    if row is not None and row >= len(dump.rows):
        raise DataError(f"--row {row}: {file} has responses 0 to {len(dump.rows) - 1}")
    page = Console(record=True, width=_HTML_WIDTH, file=StringIO()) if out else None
    console = page or Console()
    if again:
        settings = _settings(config, file, overrides or [])
        console.print(differences(dump, settings))
    elif row is not None:
        kinds = dump.header.centers.kinds
        texts = _token_texts(dump.rows[row], config, file, overrides or [])
        console.print(show(dump.rows[row], row, kinds), token_table(dump.rows[row], texts))
    else:
        console.print(heading(dump))
        for index, one in enumerate(dump.rows[:limit]):
            console.print(show(one, index, dump.header.centers.kinds))
        if len(dump.rows) > limit:
            console.print(f"{len(dump.rows) - limit} more: --limit, --row", style="dim")
    if page and out:
        write_whole(out, page.export_html())


def _dump_file(path: Path) -> Path:
    """The file, or the last one of a run's folder.

    Raises:
        DataError: the run has kept none; says how to keep some.
    """
    if path.is_file():
        return path
    folder = path / "policy" / "rollouts" if path.is_dir() else path.parent
    kept = sorted(folder.glob("step_*.jsonl"))
    if path.is_dir() and kept:
        return kept[-1]
    if kept:
        raise DataError(f"{path}: no such file; {folder} has {kept[0].name} to {kept[-1].name}")
    raise DataError(
        f"{path}: no rollouts are kept there; train with tracking.rollouts=10, which keeps those "
        "of every tenth step from then on"
    )


def heading(dump: Dump) -> Text:
    """What the file holds, and the legend."""
    head = dump.header
    legend: list[str | tuple[str, str]] = [("right", _OK), " ", ("no facts", _NONE)]
    for kind, colour in kind_colours(head.centers.kinds).items():
        legend += [" ", (f"{kind} hallucinated", colour)]
    return Text.assemble(
        f"step {head.step}, {len(dump.rows)} responses, KL coefficient {head.kl_coef:g}\n",
        *legend,
    )


def show(row: Row, index: int, kinds: Sequence[Kind]) -> Group:
    """A response with coloured segments, and a table of them."""
    response = row.response
    text = Text(f"\n[{index}] {response.id} v{response.policy_version} ", style="bold")
    text.append(f"{response.prompt.image.path}\n", style="not bold dim")
    colours = list(kind_colours(kinds).values())
    for segment, probs in zip(row.segments, row.probs, strict=True):
        piece = response.text[segment.char_start : segment.char_end]
        text.append(piece, style=f"not bold {segment_style(probs, colours)}")
    return Group(text, _segment_table(row, kinds))


def segment_style(probs: np.ndarray, colours: Sequence[str]) -> str:
    """Colour of a segment by its class probabilities (K, C): of its surest hallucination, if any,
    by the colours of the kinds (K,)."""
    classes = probs.argmax(axis=1)
    wrong = [k for k in range(len(colours)) if classes[k] == SegmentClass.HALLU]
    if wrong:
        return colours[max(wrong, key=lambda k: float(probs[k, SegmentClass.HALLU]))]
    return _OK if (classes == SegmentClass.OK).any() else _NONE


def _segment_table(row: Row, kinds: Sequence[Kind]) -> Table:
    """Per segment: P(hallucinated) per kind, reward at its last token, sums over its tokens."""
    table = Table(box=None, padding=(0, 1))
    known = [name for name in ("advantage", "value") if f"{name}s" in row.tokens]
    for column in ("segment", *kinds, "penalty", "reward", "KL", *known):
        table.add_column(column, justify="left" if column == "segment" else "right")
    kl = row.tokens["old_logprobs"] - row.tokens["reference_logprobs"]
    for i, segment in enumerate(row.segments):
        span = slice(segment.token_start, max(segment.token_end, segment.token_start + 1))
        text = row.response.text[segment.char_start : segment.char_end].strip()
        cells = [_class(row.probs[i, k]) for k in range(len(kinds))]
        numbers = (
            row.penalties[i],
            row.tokens["task_rewards"][span].sum(),
            kl[span].sum(),
            *(row.tokens[f"{name}s"][span].mean() for name in known),
        )
        table.add_row(escape(text), *cells, *(f"{number:+.3f}" for number in numbers))
    return table


def _class(probs: np.ndarray) -> str:
    """The likeliest class and its probability."""
    best = SegmentClass(int(probs.argmax()))
    word = {SegmentClass.NONE: "-", SegmentClass.OK: "ok", SegmentClass.HALLU: "hallu"}[best]
    return f"{word} {probs[best]:.2f}"


def token_table(row: Row, texts: Sequence[str] = ()) -> Table:
    """Every token's numbers, after its text where ``texts`` (T,) are known; rewards land on the
    last token of each segment."""
    table = Table(box=None, padding=(0, 1))
    ends = {max(segment.token_end, 1) - 1: segment.index for segment in row.segments}
    for column in ("t", "id", "text", "ends", *row.tokens):
        justify: Literal["left", "right"] = "left" if column == "text" else "right"
        table.add_column(column.replace("_", " "), justify=justify)
    for t, token in enumerate(row.response.token_ids.tolist()):
        numbers = [f"{array[t]:+.3f}" for array in row.tokens.values()]
        text = escape(repr(texts[t])[1:-1]) if texts else ""
        table.add_row(str(t), str(token), text, str(ends.get(t, "")), *numbers)
    return table


def _token_texts(
    row: Row, config: Path | None, file: Path, overrides: Sequence[str]
) -> tuple[str, ...]:
    """The text of each token (T,), by the policy's tokenizer; none, which is said, without it."""
    from fgaif.feedback.spans import token_spans
    from fgaif.lvlm.model import load_processor, resolve_checkpoint  # torch: not for --help

    try:
        policy = _settings(config, file, list(overrides)).policy.model
        tokenizer = load_processor(resolve_checkpoint(policy)).tokenizer
    except FgaifError as error:
        Console(stderr=True).print(f"token ids without their texts: {error}", markup=False)
        return ()
    text, spans = token_spans(
        tokenizer, row.response.token_ids.tolist(), expected=row.response.text
    )
    return tuple(text[start:end] for start, end in spans)


def differences(dump: Dump, config: Config) -> Group:
    """What the configuration makes of the dumped scores, against what training made of them."""
    fresh = recompute(dump, config.ppo)
    table = Table("array", "tokens that differ", "largest difference", "mean before", "mean now")
    worst: tuple[float, str] = (0.0, "")
    for name in (name for name in COMPUTED if name in fresh and name in dump.rows[0].tokens):
        old = np.concatenate([row.tokens[name] for row in dump.rows])
        new = np.concatenate(fresh[name])
        gap = np.abs(new - old)
        count = int((~(gap <= _SAME)).sum())
        table.add_row(
            name, f"{count} of {len(old)}", f"{gap.max():.3g}", f"{old.mean():.4f}",
            f"{new.mean():.4f}",
        )  # fmt: skip
        for index, row in enumerate(dump.rows):
            largest = float(np.abs(fresh[name][index] - row.tokens[name]).max())
            worst = max(worst, (largest, f"row {index}, {name}"))
    said = f"largest: {worst[1]}" if worst[0] > _SAME else "the same as in training"
    changed = [
        f"{key}: {before!r} in training, {now!r} now"
        for key, before, now in _settings_of(dump, config)
        if before != now
    ]
    return Group(*(Text(line) for line in changed), table, Text(said))


def _settings_of(dump: Dump, config: Config) -> list[tuple[str, object, object]]:
    head, ppo = dump.header, config.ppo
    then, now = (
        shape.resolved(head.centers.kinds).model_dump() for shape in (head.shape, ppo.shape)
    )
    shape = [(f"ppo.shape.{key}", then[key], now[key]) for key in then]
    of_ppo = [(f"ppo.{key}", getattr(head, key), getattr(ppo, key)) for key in _SETTINGS]
    return [*of_ppo, *shape]


def _settings(config: Path | None, file: Path, overrides: list[str]) -> Config:
    run = file.resolve().parents[2]  # RUN/policy/rollouts/step_*.jsonl
    if config is not None:
        return load_config(config, overrides)
    from cluster.pipeline.stage_status import StageStatus  # not for --help

    if trained_with := StageStatus(run).entry("train").get("config"):
        return with_overrides(parse_config(trained_with), overrides)
    own = run / "config.yaml"  # of the last command
    if not own.is_file():
        raise DataError(f"{own}: not there; give the configuration with --config")
    return load_config(own, overrides)
