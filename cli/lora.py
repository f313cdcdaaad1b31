"""What a LoRA is, and whether it loads, without a model: behind `script/lora`."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from cli.lora_report import (
    ADAPTER_CONFIG,
    Cell,
    Report,
    as_json,
    chart,
    compare,
    layer_counts,
    report_on,
    total_norm,
    trainer_of,
)
from errors import InputError, LoraFormatError, PredictionError
from lora_loading.reading.metadata import base_model, trigger_words

BARS = "▁▂▃▄▅▆▇█"
BLOCKS = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "lora.safetensors")
"""Which file of a folder is meant, if it has several."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the files are; 0 if they load on a model of this predictor, 1 if not, 2 for a wrong call."""
    options = _parser().parse_args(arguments)
    try:
        with ExitStack() as held:
            files = [held.enter_context(opened(name)) for name in options.lora]
            named = zip(options.lora, files, strict=True)
            reports = [_report(name, *file, with_sizes=not options.quick) for name, file in named]
            _print_json(options.lora, reports) if options.json else _print_text(options.lora, reports)
    except PredictionError as error:
        print(f"script/lora: {error}", file=sys.stderr)
        return 1
    return 0 if all(report.loads_on for report in reports) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="script/lora",
        description="Say what a LoRA is and whether it loads, without a model. Two LoRAs are compared.",
        epilog="A LoRA is a file, a folder with one, or a reference as in replicate_weights. Tokens come from "
        "HF_TOKEN, CIVITAI_API_TOKEN and REPLICATE_API_TOKEN. Exit status: 0 if it loads, 1 if not.",
    )
    parser.add_argument("lora", nargs="+", metavar="FILE|REFERENCE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="read the header alone: no sizes of the change")
    return parser


@contextmanager
def opened(name: str) -> Iterator[tuple[Path, str]]:
    """The safetensors file that is named, fetched if it is a reference, and PEFT's configuration that came with it.

    Raises:
        InputError: the folder holds no such file, or several.
        LoraError: the reference cannot be read, or its service refuses it.
        DownloadError: it cannot be fetched.
    """
    path = Path(name)
    if path.is_dir():
        yield _file_in(path), ""
    elif path.suffix == ".tar" and path.is_file():
        from fetching.containers import copy_only_safetensors

        with tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
            copy_only_safetensors(path, copy)  # type: ignore[arg-type] # it has a file number, as the other one
            yield Path(copy.name), ""
    elif path.is_file():
        yield path, ""
    else:
        yield from _fetched(name)


def _file_in(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not named and len(files) != 1:
        raise InputError(f'The folder "{folder}" has {len(files)} safetensors files. Name one of them.')
    return (named or files)[0]


def _fetched(name: str) -> Iterator[tuple[Path, str]]:
    # imported here: the clients of the services take longer than everything else
    from lora_loading.finding.reference import parse
    from lora_loading.finding.store import open_store
    from lora_loading.finding.tokens import Tokens
    from settings import Settings

    settings = Settings.from_env(os.environ)
    tokens = Tokens(settings.hugging_face_token, settings.civitai_token, settings.replicate_token)
    with open_store(settings).open(parse(name, settings.trusted_hosts), tokens) as file:
        yield file.path, file.fact(ADAPTER_CONFIG)


def _report(name: str, path: Path, config: str, *, with_sizes: bool) -> Report:
    try:
        return report_on(path, with_sizes=with_sizes, config=config)
    except LoraFormatError as error:
        raise LoraFormatError(f'Cannot read "{name}": {error}') from error


# Text


def _print_json(names: Sequence[str], reports: Sequence[Report]) -> None:
    content = [{"lora": name, **as_json(report)} for name, report in zip(names, reports, strict=True)]
    if len(reports) == 2 and all(report.loads_on for report in reports):
        comparison = asdict(compare(*reports))
        print(json.dumps({"loras": content, "comparison": comparison}, indent=2))
    else:
        print(json.dumps(content[0] if len(content) == 1 else {"loras": content}, indent=2))


def _print_text(names: Sequence[str], reports: Sequence[Report]) -> None:
    for name, report in zip(names, reports, strict=True):
        print("\n".join(_described(name, report)), end="\n\n" if len(reports) > 1 else "\n")
    if len(reports) == 2 and all(report.loads_on for report in reports):
        print("\n".join(_compared(*reports)))


def _described(name: str, report: Report) -> Iterator[str]:
    yield f"{name}: {report.size_bytes / 1e6:.1f} MB, {len(report.header.tensors)} tensors"
    yield _line("loads", f"on {', '.join(report.loads_on)}" if report.loads_on else f"no: {report.verdicts[0].problem}")
    if report.loads_on and report.verdicts[0].problem:
        yield _line("not", f"on {report.verdicts[0].model}: {report.verdicts[0].problem}")
    if report.file is not None:
        yield _line("format", report.file.format + _ranks(report.ranks))
        counts = layer_counts(report)
        yield _line("layers", ", ".join(f"{n} of {of} in the {part}" for part, (n, of) in counts.items()))
    yield from _said(report)
    norm = total_norm(report)
    if norm is not None:
        yield _line("size", f"norm {norm:.4g} at scale 1")
    yield from _chart(report)
    if report.file is not None and report.file.left_out:
        keys = report.file.left_out
        yield _line("left out", f"{len(keys)} tensors: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")
    for note in report.notes:
        yield _line("note", note)


def _said(report: Report) -> Iterator[str]:
    """What the file's metadata say."""
    metadata = report.header.metadata
    said = {
        "made by": trainer_of(report.header),
        "base model": base_model(metadata),
        "training": ", ".join(f"{key} {value}" for key, value in report.training.items()),
        "trigger words": ", ".join(trigger_words(metadata)) or "none named in the file",
    }
    yield from (_line(label, text) for label, text in said.items() if text)


def _line(label: str, text: str) -> str:
    return f"  {label:<14} {text}"


def _ranks(ranks: list[int]) -> str:
    if not ranks:
        return ""
    return f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {', '.join(map(str, ranks[:6]))}"


def _chart(report: Report) -> Iterator[str]:
    """A line for each group of layers, a character for each block: how large its change is beside the largest."""
    rows = chart(report)
    most = max((cell.norm for row in rows.values() for cell in row if math.isfinite(cell.norm)), default=0.0)
    for (kind, group), row in rows.items():
        yield _line(f"{BLOCKS[kind]} 0-{len(row) - 1}", "".join(_bar(cell, most) for cell in row) + f"  {group}")
    if rows:
        yield _line("", f"· none, {BARS[0]} least to {BARS[-1]} most of {most:.3g}" if most else "· none, + changed")


def _bar(cell: Cell, most: float) -> str:
    if not cell.layers:
        return "·"
    if not math.isfinite(cell.norm) or not most:
        return "+"
    return BARS[min(int(cell.norm / most * len(BARS)), len(BARS) - 1)]


def _compared(first: Report, second: Report) -> Iterator[str]:
    found = compare(first, second)
    yield "compared"
    yield _line(
        "layers", f"{found.both} in both, {found.only_first} in the first alone, {found.only_second} in the second"
    )
    if found.cosine is not None and found.ratio is not None:
        yield _line("direction", f"cosine {found.cosine:.4f} (1 is the same change, 0 nothing in common)")
        yield _line("size", f"the second's change is {found.ratio:.3g} times the first's, in the layers of both")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `script/lora ... | head` ends without a traceback
    sys.exit(main())
