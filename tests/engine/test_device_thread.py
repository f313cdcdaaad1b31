"""All work on one thread, whoever asks; errors and context come through; a cancellation ends that work alone."""

from __future__ import annotations

import contextvars
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from engine.device_thread import DeviceThread, Job, Unwanted
from engine.engine import Engine
from request import Mode
from tests.cancelling import cancelled_after
from tests.conftest import QUICK, request_of
from tests.paths import PROJECT

PREDICTION: contextvars.ContextVar[str] = contextvars.ContextVar("prediction")


@pytest.fixture
def thread() -> DeviceThread:
    return DeviceThread()


def in_a_new_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_the_same_thread_works_for_all(thread: DeviceThread) -> None:
    seen: list[int] = []
    for _ in range(3):
        in_a_new_thread(lambda: seen.append(thread.run(threading.get_ident)))
    assert len(set(seen)) == 1
    assert seen[0] != threading.get_ident()


def test_every_prediction_is_computed_on_one_thread(engine: Engine) -> None:
    """Encoding, denoising and decoding, in both precisions, whichever thread asks."""
    seen: set[int] = set()
    pipeline = engine.exact.models["dev"].pipelines[Mode.TXT2IMG]
    assert engine.fast is not None
    parts = (pipeline.text_encoder, pipeline.transformer, pipeline.vae.decoder, engine.fast.models["dev"].pipelines[Mode.TXT2IMG].transformer)  # noqa: E501 # fmt: skip
    hooks = [part.register_forward_pre_hook(lambda *_: seen.add(threading.get_ident())) for part in parts]
    try:
        for number, go_fast in enumerate((False, True, False)):
            request = request_of(**{**QUICK, "prompt": f"circle {number}"}, go_fast=go_fast)
            in_a_new_thread(lambda request=request: list(engine.generate(request)))  # type: ignore[misc]
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == 1


def test_a_cancelled_request_ends_half_way_and_the_next_is_as_before(engine: Engine) -> None:
    steps: list[int] = []
    transformer = engine.exact.models["dev"].pipelines[Mode.TXT2IMG].transformer
    before = [image.tobytes() for image in engine.generate(request_of(**QUICK))]
    hook = transformer.register_forward_hook(lambda *_: steps.append(threading.get_ident()))
    try:
        long = request_of(**{**QUICK, "num_outputs": 4, "num_inference_steps": 50})
        cancelled_after(0.2, lambda: list(engine.generate(long)))
        taken = len(steps)
        time.sleep(0.2)
    finally:
        hook.remove()
    assert taken == len(steps), "the work went on"
    assert [image.tobytes() for image in engine.generate(request_of(**QUICK))] == before


def test_an_error_comes_through_as_it_is(thread: DeviceThread) -> None:
    raised = [ValueError("a text"), KeyboardInterrupt(), SystemExit(3), StopIteration(4)]

    def fail(error: BaseException) -> None:
        raise error

    for error in raised:
        with pytest.raises(type(error)) as caught:
            thread.run(lambda error=error: fail(error))  # type: ignore[misc]
        assert caught.value is error
    assert thread.run(lambda: 5) == 5


def test_an_error_that_is_done_with_keeps_nothing_alive(thread: DeviceThread) -> None:
    class Large:
        pass

    kept: list[weakref.ref[Large]] = []

    def fail() -> None:
        large = Large()
        kept.append(weakref.ref(large))
        raise ValueError

    gc.disable()
    try:
        with pytest.raises(ValueError) as caught:
            thread.run(fail)
        del caught
        thread.run(int)  # the thread's own last reference
        assert kept[0]() is None
    finally:
        gc.enable()


def test_context_variables_are_the_callers(thread: DeviceThread) -> None:
    PREDICTION.set("of the caller")
    assert thread.run(PREDICTION.get) == "of the caller"
    thread.run(lambda: PREDICTION.set("of the work"))
    assert PREDICTION.get() == "of the caller"


def endless() -> None:
    while True:
        time.sleep(0.001)


def test_a_cancellation_ends_the_work_before_it_goes_on(thread: DeviceThread) -> None:
    order: list[str] = []

    def work() -> None:
        try:
            endless()
        finally:
            time.sleep(0.1)
            order.append("the work has ended")

    def predict() -> None:
        try:
            thread.run(work)
        finally:
            order.append("the cancellation goes on")

    assert cancelled_after(0.1, predict) < 1
    assert order == ["the work has ended", "the cancellation goes on"]
    assert thread.run(lambda: 5) == 5


def test_a_cancellation_at_any_moment_leaves_a_thread_that_works(thread: DeviceThread) -> None:
    """Around the work's own end above all, where the exception meant for one work may not hit the next."""
    chance = random.Random(0)

    def predict() -> None:
        while True:
            assert thread.run(lambda: sum(range(1000))) == 499500

    for _ in range(60):
        cancelled_after(chance.random() / 1000, predict)
    assert thread.run(lambda: 5) == 5


def test_work_that_is_unwanted_before_its_turn_does_not_begin() -> None:
    begun: list[str] = []
    job = Job(lambda: begun.append("begun"))
    job.end()
    job.perform()
    job.wait()
    with pytest.raises(Unwanted):
        job.result()
    assert begun == []


def test_an_iterator_is_advanced_and_closed_in_the_thread(thread: DeviceThread) -> None:
    seen: list[tuple[str, int]] = []

    def items() -> Iterator[str]:
        try:
            for name in ("one", "two", "three"):
                seen.append((name, threading.get_ident()))
                yield name
        finally:
            seen.append(("closed", threading.get_ident()))

    assert list(thread.iterate(items)) == ["one", "two", "three"]
    seen.clear()
    with closing(thread.iterate(items)) as some:
        assert next(some) == "one"
        assert [name for name, _ in seen] == ["one"], "nothing is worked out ahead"
    assert [name for name, _ in seen] == ["one", "closed"]
    assert {number for _, number in seen} == {thread.run(threading.get_ident)}


def test_a_cancelled_iterator_is_closed(thread: DeviceThread) -> None:
    closed: list[bool] = []

    def items() -> Iterator[Any]:
        try:
            endless()
            yield None
        finally:
            closed.append(True)

    assert cancelled_after(0.1, lambda: list(thread.iterate(items))) < 1
    assert closed == [True]


def test_the_thread_ends_when_nothing_refers_to_it() -> None:
    thread = DeviceThread()
    (worker,) = [thread.run(threading.current_thread)]
    del thread
    worker.join(10)
    assert not worker.is_alive()


def test_a_generator_that_is_left_over_does_not_keep_the_process_from_ending() -> None:
    code = """
from engine.device_thread import DeviceThread, Job, Unwanted
thread = DeviceThread()
left = thread.iterate(lambda: (number for number in range(3)))
assert next(left) == 0
"""
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=60)


def test_the_thread_of_the_caller_can_stand_for_it() -> None:
    thread = DeviceThread(adopt=True)
    assert thread.run(threading.get_ident) == threading.get_ident()
