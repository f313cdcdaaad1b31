"""One run as a program: curl, Python and JavaScript that make the same bytes. Tokens are named, not written."""

from __future__ import annotations

import json
import shlex
from typing import Any

from studio.client import mime_of
from studio.form import Attachment
from studio.runs import Run


def curl(run: Run, url: str) -> str:
    """Return a shell command; needs curl, jq and base64."""
    filled = [(name, _in_shell(value)) for name, value in run.inputs.items()]
    filled += [(name, f'"${name.upper()}"') for name in run.secrets]
    body = ", ".join(f"{json.dumps(name)}: {value}" for name, value in filled)
    return (
        f"curl -sS {shlex.quote(url + '/predictions')} -H 'Content-Type: application/json' -d @- <<END |\n"
        f'{{"input": {{{body}}}}}\nEND\n'
        "  jq -er '.output[]' | sed 's/^[^,]*,//' |\n"
        f'  {{ i=0; while read -r x; do printf %s "$x" | base64 -d > "output.$i{_suffix(run)}"; i=$((i+1)); done; }}\n'
    )


def _in_shell(value: Any) -> str:
    """JSON inside a here-document, where the shell reads backslashes, dollars and back-quotes."""
    if isinstance(value, Attachment):
        content = f"$(base64 < {shlex.quote(str(value.path))} | tr -d '\\n')"
        return f'"data:{mime_of(value)};base64,{content}"'
    return json.dumps(value).replace("\\", "\\\\").replace("$", "\\$").replace("`", "\\`")


def python(run: Run, url: str) -> str:
    """Return a Python program; needs the standard library alone."""
    lines = [f"    {name!r}: {_in_python(value)}," for name, value in run.inputs.items()]
    lines += [f"    {name!r}: os.environ[{name.upper()!r}]," for name in run.secrets]
    return "\n".join(
        (
            "import base64, json, os, pathlib, urllib.request",
            "",
            "def file(path, mime):",
            '    return f"data:{mime};base64," + base64.b64encode(pathlib.Path(path).read_bytes()).decode()',
            "",
            "inputs = {",
            *lines,
            "}",
            'body = json.dumps({"input": inputs}).encode()',
            f"request = urllib.request.Request({url + '/predictions'!r}, body, "
            + '{"Content-Type": "application/json"})',
            "prediction = json.load(urllib.request.urlopen(request))",
            'if prediction["status"] != "succeeded":',
            '    raise SystemExit(prediction["error"])',
            'for i, uri in enumerate(prediction["output"]):',
            f'    pathlib.Path(f"output.{{i}}{_suffix(run)}").write_bytes(base64.b64decode(uri.partition(",")[2]))',
            "",
        )
    )


def _in_python(value: Any) -> str:
    return f"file({str(value.path)!r}, {mime_of(value)!r})" if isinstance(value, Attachment) else repr(value)


def javascript(run: Run, url: str) -> str:
    """Return a module for Node.js 18 or newer."""
    lines = [f"  {name}: {_in_javascript(value)}," for name, value in run.inputs.items()]
    lines += [f"  {name}: process.env.{name.upper()}," for name in run.secrets]
    return "\n".join(
        (
            'import { readFileSync, writeFileSync } from "node:fs";',
            "",
            'const file = (path, mime) => `data:${mime};base64,${readFileSync(path).toString("base64")}`;',
            "const input = {",
            *lines,
            "};",
            f"const answer = await fetch({json.dumps(url + '/predictions')}, {{",
            '  method: "POST",',
            '  headers: { "Content-Type": "application/json" },',
            "  body: JSON.stringify({ input }),",
            "});",
            "const prediction = await answer.json();",
            'if (prediction.status !== "succeeded") throw new Error(JSON.stringify(prediction));',
            "prediction.output.forEach((uri, i) =>",
            f'  writeFileSync(`output.${{i}}{_suffix(run)}`, Buffer.from(uri.split(",")[1], "base64")));',
            "",
        )
    )


def _in_javascript(value: Any) -> str:
    if isinstance(value, Attachment):
        return f"file({json.dumps(str(value.path))}, {json.dumps(mime_of(value))})"
    return json.dumps(value)


def _suffix(run: Run) -> str:
    return run.images[0].suffix if run.images else ".webp"
