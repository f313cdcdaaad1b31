"""One prediction without Docker or a server, with the habits of `cog predict`: behind `script/predict`."""

from __future__ import annotations

import argparse
import base64
import inspect
import logging
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cog

from cli.schema import predictor_schemas
from errors import InputError, PredictionError, SettingsError
from fetching.network import Client
from image_metadata import VERSION, needs_image, read_settings
from images import xmp_of
from lora_loading.finding.store import base_lora, default_lora
from request import LEAST_LORA_SCALE, MOST_LORA_SCALE, build_request
from settings import Settings
from uploads import Upload, Uploads

EXAMPLE = 'script/predict -i prompt="a large red circle on a white background"'
OUTPUT_NAME = re.compile(r"output\.(\d+)\.\w+")
MAX_PATH = 1024
"""No longer text is asked about as a path: the system raises for a data URI."""
INDENTED: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "      "}


def name_value(text: str) -> tuple[str, str]:
    """Split `name=value`; the value may hold further equals signs.

    Raises:
        argparse.ArgumentTypeError: there is no equals sign, or the text is not UTF-8.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f'"{text}" has no value: write -i name=value')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"the value of {name} is not UTF-8") from error
    return name, value


def parse_inputs(
    pairs: Sequence[tuple[str, str]], schemas: Mapping[str, Any], folder: Path, stored: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Turn names and texts into typed inputs, with every default filled in; files are copied into `folder`.

    Args:
        pairs: what the command line gives; `@FILE` stands for a file.
        schemas: the predictor's, which hold the names, types, bounds and defaults.
        folder: for the files.
        stored: further inputs, from an image's settings, with less weight; none of them stands for a file.

    Raises:
        InputError: an unknown or missing input, or a value that the schema does not allow.
    """
    properties = schemas["Input"]["properties"]
    given: dict[str, Any] = {}
    for name, text in (stored or {}).items():
        if name in properties and "format" not in properties[name]:
            given[name] = checked_value(name, text, _resolved(properties[name], schemas))
    for name, text in pairs:
        if name not in properties:
            raise InputError(f'There is no input "{name}". The inputs are: {", ".join(properties)}.')
        given[name] = parse_value(name, text, _resolved(properties[name], schemas), folder)
    missing = [name for name in schemas["Input"]["required"] if name not in given]
    if missing:
        raise InputError(f"{', '.join(missing)} is required. For example: {EXAMPLE}")
    return {name: given.get(name, schema.get("default")) for name, schema in properties.items()}


def _resolved(schema: dict[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    references = [part["$ref"].rsplit("/", 1)[1] for part in schema.get("allOf", [])]
    return {**schema, **{key: value for name in references for key, value in schemas[name].items()}}


def parse_value(name: str, text: str, schema: Mapping[str, Any], folder: Path) -> Any:
    """One value of the command line, of the schema's type and within its bounds.

    Raises:
        InputError: it is not.
    """
    if schema.get("format") == "uri":
        return _file(name, text, folder)
    if schema.get("format") == "password":
        return cog.Secret(text)
    if schema["type"] == "string" and text.startswith("@"):
        return _data_uri(_existing(name, text))
    return checked_value(name, text, schema)


def checked_value(name: str, text: str, schema: Mapping[str, Any]) -> Any:
    """One value of the schema's type and within its bounds.

    Raises:
        InputError: it is not.
    """
    value = _typed(name, text, schema["type"])
    if "enum" in schema and value not in schema["enum"]:
        raise InputError(f'{name} is "{value}". Choose one of {", ".join(schema["enum"])}.')
    low, high = schema.get("minimum", value), schema.get("maximum", value)
    if not low <= value <= high:
        raise InputError(f"{name} is {value}. Give a number from {low} to {high}.")
    return value


def _typed(name: str, text: str, kind: str) -> Any:
    try:
        if kind == "integer":
            return int(text)
        if kind == "number":
            return float(text)
        if kind == "boolean":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except (ValueError, KeyError) as error:
        wanted = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}[kind]
        raise InputError(f'{name} is "{text}". Give {wanted}.') from error
    return text


def _file(name: str, text: str, folder: Path) -> cog.Path | Upload:
    if text.startswith(("http://", "https://", "data:")):
        return Upload(text)
    if not text or "://" in text:
        raise InputError(f'{name} is "{text}". Give @FILE, an http(s) address or a data URI.')
    if not text.startswith("@"):
        raise InputError(f'{name} is "{text}". For a file, write -i {name}=@{text}.')
    source = _existing(name, text)
    return cog.Path(shutil.copy(source, folder / f"{name}{source.suffix}"))


def _existing(name: str, text: str) -> Path:
    source = Path(text.removeprefix("@"))
    if source.is_dir():
        raise InputError(f'"{source}" is a folder. Give a file for {name}.')
    if not source.is_file():
        raise InputError(f'There is no file "{source}" for {name}.')
    return source


def _data_uri(source: Path) -> str:
    """What a file becomes as a text input, such as a LoRA; `cog predict` does the same."""
    return f"data:application/octet-stream;base64,{base64.b64encode(source.read_bytes()).decode()}"


LORA_INPUTS = (("replicate_weights", "lora_scale"), ("extra_lora", "extra_lora_scale"))


def inputs_again(file: Path, given: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The inputs that make an image again, read from its file, beside those that the command line gives.

    Raises:
        InputError: the file has no settings, or lacks an input that is not given.
    """
    if not file.is_file():
        raise InputError(f'There is no file "{file}" for --again.')
    packet = xmp_of(file)
    settings = None if packet is None else read_settings(packet)
    if settings is None:
        raise InputError(
            f'"{file}" holds no settings of this predictor. Files carry them unless FLUX_METADATA is off or mark.'
        )
    inputs = stored_inputs(settings)
    needed = ("prompt", *needs_image(settings), *_hidden_loras(settings))
    missing = [name for name in needed if name not in {**inputs, **dict(given)}]
    if missing:
        wanted = ", ".join(f"-i {name}=..." for name in missing)
        raise InputError(f'"{file}" does not hold the {" and the ".join(missing)}. Give {wanted}.')
    if settings.get("version") != VERSION:
        made_by = settings.get("version")
        print(f"{file} was made by version {made_by}, this is {VERSION}: the image may differ", file=sys.stderr)
    if "base_lora" in settings:
        print(
            f"{file} was made with a base LoRA: set FLUX_BASE_LORA to {_base_lora(settings)} for the same image",
            file=sys.stderr,
        )
    return inputs


def stored_inputs(settings: Mapping[str, Any]) -> dict[str, str]:
    """The inputs in a file's settings, as they are written on the command line."""
    inputs = {name: value for name, value in settings.items() if name not in ("version", "mode", "loras", "base_lora")}
    loras: list[Mapping[str, Any]] = settings.get("loras", [])
    extra = loras[1:]
    for main in loras[:1]:
        inputs["lora_scale"] = main["scale"]
        if not _is_hidden(main["reference"]):
            inputs["replicate_weights"] = main["reference"]
    if extra:
        scales = [lora["scale"] for lora in extra]
        # one that is the product of a line's scale and of extra_lora_scale may be beyond the bounds of both
        factor = scales[0] if len(extra) == 1 else 1
        if not all(LEAST_LORA_SCALE <= scale <= MOST_LORA_SCALE for scale in scales):
            factor = MOST_LORA_SCALE
        inputs["extra_lora_scale"] = factor
        if not any(_is_hidden(lora["reference"]) for lora in extra):
            lines = (f"{lora['reference']} {scale / factor:.9g}" for lora, scale in zip(extra, scales, strict=True))
            inputs["extra_lora"] = "\n".join(line.removesuffix(" 1") for line in lines)
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in inputs.items()}


def _hidden_loras(settings: Mapping[str, Any]) -> list[str]:
    """The inputs of LoRAs whose references are not whole in the file."""
    hidden = [_is_hidden(lora["reference"]) for lora in settings.get("loras", ())]
    return [name for name, found in (("replicate_weights", hidden[:1]), ("extra_lora", hidden[1:])) if any(found)]


def _base_lora(settings: Mapping[str, Any]) -> str:
    """The operator's base LoRA in the form of the setting."""
    base: Mapping[str, Any] = settings["base_lora"]
    return f'"{base["reference"]} {base["scale"]}"'


def _is_hidden(reference: str) -> bool:
    """Whether a label stands for an address whose path is left out, or for data."""
    return "/.../" in reference or reference.startswith("data:")


# One prediction


def run(
    pairs: Sequence[tuple[str, str]],
    schemas: Mapping[str, Any],
    output: Path,
    settings: Settings,
    stored: Mapping[str, str] | None = None,
) -> list[Path]:
    """Make one prediction and return the files written into `output`; all that can be is checked before loading.

    `pairs` and `stored` are those of `parse_inputs`.

    Raises:
        PredictionError: an input is wrong, or the prediction fails.
        SettingsError: the settings do not allow a start.
    """
    from predict import Predictor, refuse_unchecked

    uploads = Uploads(Client(settings.trusted_hosts, plain_http=True))
    with tempfile.TemporaryDirectory(prefix="flux-inputs-") as folder:
        inputs = parse_inputs(pairs, schemas, Path(folder), stored)
        refuse_unchecked(inputs["disable_safety_checker"], settings.safety_required)
        require_folder(output)
        with uploads.fetched(inputs["image"], inputs["mask"]) as (image, mask):
            inputs |= {"image": image, "mask": mask}
            check_request(inputs, settings)
            predictor = Predictor()
            with warnings_only("engine", "safety", "lora_loading", "fetching"):
                predictor.setup()
            files = predictor.predict(**inputs)
    output.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(file, target)) for file, target in zip(files, free_names(output, files), strict=True)]


def check_request(inputs: Mapping[str, Any], settings: Settings) -> None:
    """Raise what `setup()` and `predict()` would raise for these inputs and settings before anything is generated."""
    base_lora(settings)
    for name, _ in LORA_INPUTS:
        refuse_local_path(name, inputs[name])
    names = [name for name in inspect.signature(build_request).parameters if name in inputs]
    build_request(
        **{name: inputs[name] for name in names},
        default_lora=default_lora(settings),
        plain_http_hosts=settings.trusted_hosts,
    )


def refuse_local_path(name: str, text: str | None) -> None:
    """Refuse a LoRA that is named by its path on this machine, and say how a file is given.

    Raises:
        InputError: it is a path.
    """
    if text and (text.startswith(("/", "./", "../", "~")) or (len(text) < MAX_PATH and Path(text).is_file())):
        raise InputError(f'{name} is "{text}", a path on this machine. For a file, write -i {name}=@{text}.')


def require_folder(output: Path) -> None:
    """Raise where images cannot be written into `output`, which need not exist yet.

    Raises:
        InputError: it, or a folder above it, is a file or may not be written to.
    """
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f'-o is "{output}", and {existing} is a file. Give a folder; it is made where there is none.')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f'-o is "{output}", and {existing} may not be written to. Give another folder.')


def free_names(output: Path, files: Sequence[Path]) -> list[Path]:
    """A path in `output` for each file, numbered on from the images that lie there."""
    numbers = [int(found[1]) for path in output.iterdir() if (found := OUTPUT_NAME.fullmatch(path.name))]
    first = max(numbers, default=-1) + 1
    return [output / f"output.{number}{file.suffix}" for number, file in enumerate(files, first)]


@contextmanager
def warnings_only(*names: str) -> Iterator[None]:
    """Show only warnings of these loggers: what an operator wants to know of a start does not concern one image."""
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)


# The command line


def described_inputs(schemas: Mapping[str, Any]) -> str:
    """A line for each input: its name, what it takes, its default, and the first sentence of its description."""
    properties = schemas["Input"]["properties"]
    lines = []
    for name, unresolved in properties.items():
        schema = _resolved(unresolved, schemas)
        first_sentence = unresolved["description"].partition(". ")[0].rstrip(".")
        lines.append(textwrap.fill(f"{name}: {_allowed(schema)}. {first_sentence}.", 110, **INDENTED))
    return "\n".join(lines)


def _allowed(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        allowed = ", ".join(schema["enum"])
    elif schema.get("format") == "uri":
        allowed = "@FILE or an address"
    else:
        allowed = {"integer": "whole number", "number": "number", "boolean": "true or false"}.get(
            schema["type"], "text"
        )
    if "minimum" in schema:
        allowed += f" from {schema['minimum']} to {schema['maximum']}"
    default = str(schema.get("default")).lower()
    return f"{allowed}; {default} if not given" if "default" in schema else allowed


def parser_of(description: str) -> argparse.ArgumentParser:
    """The command line's parser; `description` lists the inputs."""
    parser = argparse.ArgumentParser(
        prog="script/predict",
        description="Make images.",
        epilog=f"Inputs:\n{description}\n\nExample: {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        type=name_value,
        default=[],
        metavar="NAME=VALUE",
        help="an input, one of those below; @FILE for a file",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="where the images go, numbered on from those that lie there; by default here",
    )
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="make the image of this file again, from its settings"
    )
    return parser


def main() -> None:
    """The command line. Exit status: 0 images written, 1 a wrong input or a failed prediction, 2 wrong usage."""
    from predict import Predictor

    schemas = predictor_schemas(Predictor.predict)
    arguments = parser_of(described_inputs(schemas)).parse_args()
    started = time.monotonic()
    logging.getLogger("predict").addFilter(lambda record: record.levelno < logging.ERROR)  # errors are printed below
    try:
        stored = inputs_again(arguments.again, arguments.input) if arguments.again else {}
        files = run(arguments.input, schemas, arguments.output, Settings.from_env(os.environ), stored)
    except (PredictionError, SettingsError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
    for file in files:
        print(f"wrote {file}")
    print(f"{time.monotonic() - started:.1f} s in all")


if __name__ == "__main__":
    main()
