"""The page: what is where, and which click does what. What a run is stands in `work.py`, its traces in `runs.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from studio import copies, runs
from studio.client import Prediction, StudioError
from studio.controls import canvas, control, inputs_of, sections, shown
from studio.form import Field, parsed
from studio.runs import Run
from studio.work import Desk, View, sweep, work

SHOWN_RUNS = 60
READABLE = {
    "body_text_color_subdued": "#52525b",
    "body_text_color_subdued_dark": "#b4b4bd",
    "block_info_text_color": "#52525b",
    "block_info_text_color_dark": "#b4b4bd",
    "block_label_text_color": "#3f3f46",
    "block_label_text_color_dark": "#d4d4d8",
    "block_title_text_color": "#27272a",
    "block_title_text_color_dark": "#e4e4e7",
    "button_primary_background_fill": "#b93e04",
    "button_primary_background_fill_dark": "#b93e04",
    "button_primary_background_fill_hover": "#9a3203",
    "button_primary_background_fill_hover_dark": "#9a3203",
}
"""Colours of Gradio's theme with a contrast of 4.5 to 1, as WCAG AA asks."""
CSS = """
body:not(.dark) button[role="tab"].selected { color: #b93e04 !important; }
.plain .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); }
.plain .form > * { background: var(--block-background-fill); }
#images .grid-wrap, #history .grid-wrap { padding-top: 2rem; }
#images .grid-container { grid-auto-rows: minmax(0, 380px); }
#images .grid-container:has(> :nth-child(3)) { grid-auto-rows: 190px; }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); grid-auto-rows: 96px; }
.message { white-space: pre-wrap; overflow-wrap: anywhere; }
.message progress { width: 100%; height: 1rem; }
.message.error { border-left: 4px solid #b91c1c; padding-left: .6rem; }
.message.warning { border-left: 4px solid #b45309; padding-left: .6rem; }
.refused { outline: 2px solid #b91c1c !important; outline-offset: -2px; }
table.inputs { border-collapse: collapse; width: 100%; }
table.inputs td, table.inputs th { text-align: left; padding: .2rem .6rem; overflow-wrap: anywhere; }
"""
HEAD = """<script>
new MutationObserver(() => {
  for (const empty of document.querySelectorAll('div[aria-label="Empty value"]:not([role])'))
    empty.setAttribute("role", "img");
}).observe(document, { childList: true, subtree: true });
</script>"""
"""Gradio 6.31 gives its empty galleries an aria-label and no role; to be deleted when axe finds nothing without it."""


class Page:
    """One page; its methods are what the clicks do."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.running: dict[str, Prediction | None] = {}
        """By browser tab: the prediction that runs there; None while it is being made."""
        self.marked: dict[str, set[str]] = {}
        """By browser tab: the fields that are marked as refused."""

    def build(self) -> Any:
        """Return the Gradio application."""
        with gr.Blocks(title="FLUX studio", delete_cache=(600, 3600), analytics_enabled=False) as blocks:
            gr.Markdown(
                f"# FLUX studio\nPredictions by `{self.desk.server.url}`. Runs are kept in `{self.desk.root.name}`."
            )
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self._form()
                with gr.Column(scale=6, min_width=320):
                    self._results()
                    self._history()
            self._connect(blocks)
        return blocks

    # What is where

    def _form(self) -> None:
        self.controls: dict[str, Any] = {}
        required = [field for field in self.desk.fields if field.required]
        for field in required:
            self.controls[field.name] = control(field)
        with gr.Row():
            self.run = gr.Button("Run", variant="primary", elem_id="run")
            self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel")
        for title, fields in sections([field for field in self.desk.fields if not field.required]):
            if title is None:
                with gr.Group(elem_classes="plain"):
                    self._add(fields)
                continue
            with gr.Accordion(title, open=False, elem_id=f"section-{title.split()[0].lower()}"):
                self._add(fields)
        self.controls = {field.name: self.controls[field.name] for field in self.desk.fields}

    def _add(self, fields: Sequence[Field]) -> None:
        for field in fields:
            self.controls[field.name] = control(field)
            if field.kind == "image":
                gr.Markdown(field.description)
            if field.kind == "mask":
                with gr.Row():
                    self.clear_mask = gr.Button("Clear the mask", size="sm", elem_id="clear-mask")
                    self.upload_mask = gr.UploadButton(
                        "Upload a mask", size="sm", file_types=["image"], elem_id="upload-mask"
                    )
                gr.Markdown(field.description)

    def _results(self) -> None:
        self.message = gr.HTML(_message(View("Type a prompt and press Run.", "done")), elem_id="message")
        self.images = gr.Gallery(label="Images", elem_id="images", columns=2, height=460, object_fit="contain")
        with gr.Accordion("Log", open=False):
            self.log = gr.Textbox(label="Log", lines=8, max_lines=20, interactive=False, elem_id="log")
        with gr.Accordion("Sweep one input", open=False, elem_id="section-sweep"):
            names = [f.name for f in self.desk.fields if f.kind in ("integer", "number", "choice", "boolean")]
            first = next((name for name in names if name == "seed"), names[0] if names else None)
            self.swept = gr.Dropdown(names, value=first, label="input", elem_id="sweep-input")
            self.values = gr.Textbox("1, 2, 3, 4", label="values, separated by commas", elem_id="sweep-values")
            self.sweep = gr.Button("Run the sweep", elem_id="sweep")

    def _history(self) -> None:
        self.selected = gr.State(None)
        self.listed = gr.State([])
        gr.Markdown("## Runs")
        self.history = gr.Gallery(
            label="Runs, the newest first",
            elem_id="history",
            columns=6,
            height=260,
            object_fit="cover",
            preview=False,
            allow_preview=False,
        )
        self.facts = gr.HTML("Choose an image to see how it was made.", elem_id="facts")
        with gr.Row():
            self.again = gr.Button("Same settings", size="sm", elem_id="again")
            self.use = gr.Button("Use as image", size="sm", elem_id="use")
            self.left = gr.Button("Compare: left", size="sm", elem_id="left")
            self.right = gr.Button("Compare: right", size="sm", elem_id="right")
            self.read = gr.UploadButton("Settings of a file", size="sm", file_types=["image"], elem_id="read")
        with gr.Tabs():
            with gr.Tab("Compare"):
                self.pair = [gr.State(None), gr.State(None)]
                with gr.Row():
                    self.sides = [
                        gr.Image(label=side, interactive=False, height=360, buttons=[], elem_id=f"compare-{side}")
                        for side in ("left", "right")
                    ]
                self.table = gr.HTML("Choose two images.", elem_id="differences")
            with gr.Tab("Copy as a program"):
                gr.Markdown("Each gives the same bytes. Tokens are read from the environment.")
                self.code = [
                    gr.Code(label=label, language=language, interactive=False, elem_id=f"copy-{label.lower()}")
                    for label, language in (("curl", "shell"), ("Python", "python"), ("JavaScript", "javascript"))
                ]

    # Which click does what

    def _connect(self, blocks: Any) -> None:
        values = list(self.controls.values())
        outputs = [self.message, self.images, self.log, self.run, self.sweep, self.cancel, *values]
        outputs += [self.history, self.listed, self.selected, self.facts, *self.code]
        free = {"concurrency_limit": None, "show_progress": "hidden"}
        gr.on(
            [self.run.click, *(c.submit for f, c in zip(self.desk.fields, values, strict=True) if f.required)],
            self.on_run,
            values,
            outputs,
            trigger_mode="once",
            **free,
        )
        self.sweep.click(self.on_sweep, [self.swept, self.values, *values], outputs, trigger_mode="once", **free)
        self.cancel.click(self.on_cancel, None, None, queue=False)
        blocks.unload(self.on_cancel)
        blocks.load(self.on_load, None, [self.history, self.listed], **free)
        picked = [self.selected, self.facts, *self.code]
        self.history.select(self.on_select, self.listed, picked, **free)
        self.again.click(self.on_again, self.selected, values, **free)
        self.read.upload(self.on_read, self.read, values, **free)
        for position, button in enumerate((self.left, self.right)):
            side = [self.pair[position], self.sides[position]]
            button.click(self.on_side, self.selected, side, **free).then(self.on_pair, self.pair, self.table, **free)
        image, mask = self.controls.get("image"), self.controls.get("mask")
        if image is not None and mask is not None:
            gr.on([image.upload, image.clear, mask.clear], self.on_image, image, mask, **free)
            self.use.click(self.on_use, self.selected, [image, mask], **free)
            self.clear_mask.click(self.on_image, image, mask, **free)
            self.upload_mask.upload(self.on_mask, [image, self.upload_mask], mask, **free)

    def on_run(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Run the form once."""
        yield from self._work(request, lambda folder: [inputs_of(self.desk.fields, values, folder)])

    def on_sweep(self, request: gr.Request, name: str, given: str, *values: Any) -> Iterator[dict[Any, Any]]:
        """Run the form with each value of one input."""
        field = next(field for field in self.desk.fields if field.name == name)
        swept = [parsed(field, _typed(field, text.strip())) for text in given.split(",") if text.strip()]
        swept = [field.default if value is None else value for value in swept]
        yield from self._work(request, lambda folder: sweep(inputs_of(self.desk.fields, values, folder), field, swept))

    def _work(self, request: Any, jobs: Any) -> Iterator[dict[Any, Any]]:
        tab = request.session_hash
        if tab in self.running:  # a second click that came before the button was locked
            return
        self.running[tab] = None
        try:
            yield self._show(View("Sent."), first=True) | self._mark(tab, {})
            with tempfile.TemporaryDirectory(prefix="mask-") as folder:
                for view in work(self.desk, jobs(Path(folder)), lambda prediction: self._started(tab, prediction)):
                    yield self._show(view) | self._mark(tab, view.refused)
        except (StudioError, OSError) as error:
            yield self._show(View(str(error), "error"))
        finally:
            self.running.pop(tab, None)

    def _started(self, tab: str, prediction: Prediction) -> bool:
        """Remember the prediction that a cancel is for; False after one."""
        before = self.running.get(tab)
        if tab not in self.running or (before is not None and before.cancelled.is_set()):
            return False
        self.running[tab] = prediction
        return True

    def on_cancel(self, request: gr.Request) -> None:
        """Cancel what runs in this tab; also when it is closed."""
        prediction = self.running.get(request.session_hash)
        if prediction is not None:
            prediction.cancel()

    def on_load(self) -> list[Any]:
        """Show the runs on the disk."""
        return list(self._listing())

    def on_select(self, listed: list[tuple[str, int]], event: gr.SelectData) -> list[Any]:
        """Show how the chosen image was made."""
        return self._picked(tuple(listed[event.index]))

    def on_again(self, selected: tuple[str, int] | None) -> list[Any]:
        """Fill the form as for the chosen run; tokens stay as they are."""
        run = self._run(selected)
        if run is None:
            return [gr.skip() for _ in self.desk.fields]
        return self._filled(run.inputs)

    def on_read(self, file: str) -> list[Any]:
        """Fill the form from what an image file carries."""
        settings = runs.settings_inside(Path(file))
        if settings is None:
            gr.Warning("This file carries no settings of the predictor.")
            return [gr.skip() for _ in self.desk.fields]
        return self._filled(settings)

    def _filled(self, inputs: dict[str, Any]) -> list[Any]:
        pairs = zip(self.desk.fields, shown(self.desk.fields, inputs), strict=True)
        return [gr.skip() if field.kind == "secret" else value for field, value in pairs]

    def on_use(self, selected: tuple[str, int] | None) -> list[Any]:
        """Take the chosen image as the form's image."""
        run = self._run(selected)
        if run is None or selected is None:
            return [gr.skip(), gr.skip()]
        path = run.images[selected[1]]
        return [str(path), canvas(path)]

    def on_side(self, selected: tuple[str, int] | None) -> list[Any]:
        """Put the chosen image on one side of the comparison."""
        run = self._run(selected)
        return [selected, str(run.images[selected[1]]) if run is not None and selected is not None else None]

    def on_pair(self, left: tuple[str, int] | None, right: tuple[str, int] | None) -> str:
        """Return the table of the inputs that differ."""
        first, second = self._run(left), self._run(right)
        if first is None or second is None:
            return "Choose two images."
        found = runs.differences(first.inputs, second.inputs, self.desk.fields)
        if not found:
            return "All inputs are equal."
        return _table(("input", "left", "right"), [(name, _said(one), _said(two)) for name, one, two in found])

    def on_image(self, image: str | None) -> Any:
        """Lay a new image under the brush, without strokes."""
        return canvas(Path(image) if image else None)

    def on_mask(self, image: str | None, mask: str) -> Any:
        """Lay an uploaded mask over the image as strokes."""
        if image is None:
            gr.Warning("Choose the image first.")
        return canvas(Path(image) if image else None, Path(mask))

    # What is shown

    def _show(self, view: View, first: bool = False) -> dict[Any, Any]:
        running = view.state == "running"
        shown: dict[Any, Any] = {
            self.message: _message(view),
            self.log: view.log,
            self.run: gr.update(interactive=not running),
            self.sweep: gr.update(interactive=not running),
            self.cancel: gr.update(interactive=running),
        }
        if view.runs or first:
            shown[self.images] = self._results_of(view.runs)
        if view.runs:
            shown |= dict(zip((self.history, self.listed), self._listing(), strict=True))
            picked = self._picked((view.runs[-1].name, 0))
            shown |= dict(zip((self.selected, self.facts, *self.code), picked, strict=True))
        return shown

    def _results_of(self, ended: Sequence[Run]) -> list[tuple[str, str]]:
        """The images of a run, or of a sweep's runs with the input that differs."""
        changed = {
            name for run in ended for name, _, _ in runs.differences(ended[0].inputs, run.inputs, self.desk.fields)
        }
        swept = [field for field in self.desk.fields if field.name in changed]
        return [
            (file, ", ".join(f"{f.label} {run.inputs.get(f.name, f.default)}" for f in swept) or caption)
            for run in ended
            for file, caption in _captioned(run)
        ]

    def _mark(self, tab: str, refused: Mapping[str, str]) -> dict[Any, Any]:
        """Mark the controls of refused inputs, and unmark the others."""
        before, now = self.marked.pop(tab, set()), set(refused) & set(self.controls)
        if now:
            self.marked[tab] = now
        return {self.controls[name]: gr.update(elem_classes=["refused"] * (name in now)) for name in before ^ now}

    def _listing(self) -> tuple[list[tuple[str, str]], list[tuple[str, int]]]:
        all_kept = runs.kept(self.desk.root)[:SHOWN_RUNS]
        images = [image for run in all_kept for image in _captioned(run)]
        return images, [(run.name, i) for run in all_kept for i in range(len(run.images))]

    def _picked(self, selected: tuple[str, int]) -> list[Any]:
        run = self._run(selected)
        if run is None:
            return [None, "This run has been removed.", "", "", ""]
        url = self.desk.server.url
        rows = [(name, _said(value)) for name, value in run.inputs.items()]
        facts = _table(("input", f"of {run.name}"), rows)
        return [selected, facts, copies.curl(run, url), copies.python(run, url), copies.javascript(run, url)]

    def _run(self, selected: tuple[str, int] | None) -> Run | None:
        return next((run for run in runs.kept(self.desk.root) if selected and run.name == selected[0]), None)


def _typed(field: Field, text: str) -> Any:
    return text.lower() in ("true", "yes", "1") if field.kind == "boolean" else text


def _captioned(run: Run) -> list[tuple[str, str]]:
    seed = run.inputs.get("seed")
    return [(str(file), "" if seed is None else f"seed {int(seed) + i}") for i, file in enumerate(run.images)]


def _said(value: Any) -> str:
    return str(getattr(value, "path", value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="inputs"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _message(view: View) -> str:
    bar = ""
    if view.state == "running":
        value = "" if view.fraction is None else f' value="{view.fraction:.3f}"'
        bar = f'<progress aria-label="progress of the run" max="1"{value}></progress>'
    return f'<div class="message {view.state}" role="status">{escape(view.message)}{bar}</div>'
