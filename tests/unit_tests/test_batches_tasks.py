"""The task endpoint: a short paid POST, free polls, and an image that outlives the process that asked for it."""

import asyncio
import subprocess
import sys

import httpx
import pytest

from langchain_cogview import (
    CogViewConfigurationError,
    CogViewContentFilterError,
    CogViewError,
    CogViewImageGenerator,
    CogViewInvalidRequestError,
    CogViewNotFoundError,
    CogViewTaskFailedError,
    CogViewTaskUnfinishedError,
    CogViewTimeoutError,
    ImageRequest,
    ImageTask,
    Sandbox,
)
from langchain_cogview.api.tasks import _Polls
from langchain_cogview.concurrency import Deadline
from langchain_cogview.sandbox import SandboxServer

TASK_ROUTE, PLAIN_ROUTE = "/api/paas/v4/async/images/generations", "/api/paas/v4/images/generations"
both = pytest.mark.parametrize("how", ["sync", "async"])


@pytest.fixture
def generator(sandbox):
    return CogViewImageGenerator(base_url=sandbox.base_url, model="glm-image", poll_interval=0.01)


def invoked(generator, how, value="a kitten", config=None):
    return generator.invoke(value, config) if how == "sync" else asyncio.run(generator.ainvoke(value, config))


def result_of(task, how, **options):
    return task.result(**options) if how == "sync" else asyncio.run(task.aresult(**options))


@both
def test_a_model_that_allows_it_is_asked_by_task_and_the_result_is_as_ever(generator, sandbox, how):
    result = invoked(generator, how, "[[task-polls:2]] a kitten")
    assert [request.path for request in sandbox.requests] == [TASK_ROUTE]
    assert len(sandbox.polls) == 3
    assert (result.width, result.height, result.model) == (1280, 1280, "glm-image")
    assert result.image.task_id
    assert result.read().startswith(b"\x89PNG")


@both
def test_other_models_and_use_tasks_false_take_the_plain_route(sandbox, how):
    for settings in ({}, {"model": "glm-image", "use_tasks": False}):
        invoked(CogViewImageGenerator(base_url=sandbox.base_url, **settings), how)
    assert [request.path for request in sandbox.requests] == [PLAIN_ROUTE] * 2


def test_use_tasks_needs_a_model_that_allows_it():
    with pytest.raises(ValueError, match="glm-image"):
        CogViewImageGenerator(base_url="sandbox:", use_tasks=True)


@both
def test_a_task_that_fails_is_an_error_of_its_own_and_no_image_is_charged(generator, sandbox, how):
    with pytest.raises(CogViewTaskFailedError) as caught:
        invoked(generator, how, "[[task-fail]]")
    assert caught.value.task_id
    assert caught.value.request_id == sandbox.requests[0].request_id
    assert sandbox.images_made == 0


@both
def test_a_blocked_prompt_is_blocked_here_too(generator, sandbox, how):
    with pytest.raises(CogViewContentFilterError):
        invoked(generator, how, "[[content-filter]]")
    assert len(sandbox.requests) == 1


@both
def test_a_task_that_takes_too_long_can_be_resumed_without_paying_again(generator, sandbox, how):
    hasty = generator.model_copy(update={"timeout": 0.05})
    with pytest.raises(CogViewTaskUnfinishedError) as caught:
        invoked(hasty, how, "[[task-polls:20]] a kitten")
    error = caught.value
    assert error.may_have_been_charged
    assert error.task_id in str(error)
    result = result_of(ImageTask.resume(error.task_id, generator=generator, prompt="a kitten"), how)
    assert result.prompt == "a kitten"
    assert sandbox.images_made == 1
    assert len(sandbox.requests) == 1


@both
def test_a_poll_that_fails_is_repeated(sandbox, how):
    broken = iter([httpx.ReadTimeout("slow"), httpx.ConnectError("gone"), 500, 503, 429, "html"])

    def answer(request):
        if request.method == "POST":
            return httpx.Response(200, json={"id": "task-1", "task_status": "PROCESSING"})
        fault = next(broken, None)
        if isinstance(fault, Exception):
            raise fault
        if fault == "html":
            return httpx.Response(200, text="<html>")
        if fault:
            return httpx.Response(fault)
        return httpx.Response(
            200, json={"task_status": "SUCCESS", "image_result": [{"url": "https://example.com/x.png"}]}
        )

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        aclient = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        generator = CogViewImageGenerator(
            api_key="a.b", model="glm-image", http_client=client, http_async_client=aclient, download=False,
            poll_interval=0.001,
        )  # fmt: skip
        assert invoked(generator, how).url == "https://example.com/x.png"


@both
@pytest.mark.parametrize("status", [401, 404, 400])
def test_a_paid_task_that_can_no_longer_be_asked_for_is_unfinished_and_never_lost(monkeypatch, how, status):
    monkeypatch.setattr("langchain_cogview.api.tasks.KNOWN_AFTER_SECONDS", 0.05)

    def answer(request):
        if request.method == "POST":
            return httpx.Response(200, json={"id": "task-1", "task_status": "PROCESSING"})
        return httpx.Response(status, json={"error": {"code": str(status), "message": "no"}})

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        aclient = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        generator = CogViewImageGenerator(
            api_key="a.b", model="glm-image", http_client=client, http_async_client=aclient, poll_interval=0.001
        )
        with pytest.raises(CogViewTaskUnfinishedError) as caught:
            invoked(generator, how)
    assert caught.value.task_id == "task-1"
    assert caught.value.may_have_been_charged


@both
def test_where_the_service_does_not_know_the_task_endpoint_the_plain_one_is_used(sandbox, how):
    def without_tasks(request):
        if "/async" in request.url.path:
            return httpx.Response(200, json={"code": 500, "msg": "404 NOT_FOUND", "success": False})
        return httpx.Response(200, json={"data": [{"url": "https://example.com/x.png"}]})

    with httpx.Client(transport=httpx.MockTransport(without_tasks)) as client:
        aclient = httpx.AsyncClient(transport=httpx.MockTransport(without_tasks))
        settings = {
            "api_key": "a.b",
            "model": "glm-image",
            "http_client": client,
            "http_async_client": aclient,
            "download": False,
        }
        result = invoked(CogViewImageGenerator(**settings), how)
        assert "task endpoint" in result.warnings[0]
        with pytest.raises(CogViewNotFoundError):
            invoked(CogViewImageGenerator(**settings, use_tasks=True), how)


@both
def test_submit_gives_a_task_at_once_whose_status_and_result_can_be_asked_for(generator, sandbox, how):
    value = {"prompt": "[[task-polls:1]] a kitten", "size": "1728x960"}
    task = generator.submit(value) if how == "sync" else asyncio.run(generator.asubmit(value))
    ask = task.status if how == "sync" else lambda: asyncio.run(task.astatus())
    assert ask() == "processing"
    assert ask() == "succeeded"
    result = result_of(task, how)
    assert (result.width, result.height, result.prompt) == (1728, 960, value["prompt"])
    assert result.image.request_id == sandbox.requests[0].request_id
    assert result_of(task, how).sha256 == result.sha256
    assert sandbox.images_made == 1


def test_a_failed_task_says_so_when_asked(generator):
    assert generator.submit("[[task-fail]]").status() == "failed"


def test_an_unknown_or_blank_id_is_reported_as_such(generator):
    with pytest.raises(CogViewNotFoundError) as caught:
        ImageTask.resume("nothing", generator=generator).result()
    assert caught.value.task_id == "nothing"
    with pytest.raises(CogViewInvalidRequestError):
        ImageTask.resume(" ")
    with pytest.raises(CogViewInvalidRequestError, match="glm-image"):
        CogViewImageGenerator(base_url="sandbox:").submit("x")
    with pytest.raises(CogViewInvalidRequestError, match="one image"):
        generator.submit("x", n=2)


@pytest.mark.parametrize(
    "evil",
    [
        "..",
        ".",
        "...",
        "../users",
        "a/b",
        "a\\b",
        "%2e%2e",
        "a?b",
        "a#b",
        "a b",
        "\ud800",
        "a\0",
        "\n.",
        "é",
        "x" * 600,
        None,
        5,
    ],
)
def test_an_id_that_leads_to_another_route_is_refused_before_anything_is_sent(generator, sandbox, evil):
    with pytest.raises(CogViewInvalidRequestError, match="A task's id is"):
        ImageTask.resume(evil, generator=generator)
    if isinstance(evil, str):
        task = ImageTask(
            "known", generator=generator, request=ImageRequest(prompt="x", model="glm-image"), request_id="r"
        )
        task.id = evil
        for use in (task.status, task.result, lambda: asyncio.run(task.astatus()), lambda: asyncio.run(task.aresult())):
            with pytest.raises(CogViewInvalidRequestError, match="A task's id is"):
                use()
        repr(task).encode()
    assert sandbox.requests == []


def test_another_process_finishes_what_this_one_asked_for(tmp_path):
    with SandboxServer(Sandbox()) as server:
        generator = CogViewImageGenerator(base_url=server.base_url, api_key="any", model="glm-image")
        task = generator.submit("[[task-polls:1]] a kitten")
        code = (
            "import sys; from langchain_cogview import ImageTask;"
            "task = ImageTask.resume(sys.argv[1], base_url=sys.argv[2], api_key='any', poll_interval=0.01, output_dir='.');"
            "print(task.result().path.name)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, task.id, server.base_url],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / done.stdout.strip()).stat().st_size > 1000
        assert server.sandbox.images_made == 1


async def test_a_cancelled_wait_for_a_task_logs_its_id(generator, sandbox, caplog):
    call = asyncio.create_task(generator.ainvoke("[[task-polls:1000]]"))
    while not sandbox.polls:
        await asyncio.sleep(0.001)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert sandbox.requests[0].request_id in caplog.text
    assert "was submitted" in caplog.text


@both
def test_polls_are_reported_as_progress(generator, how):
    from langchain_core.callbacks import BaseCallbackHandler

    class Recorder(BaseCallbackHandler):
        def __init__(self):
            self.stages = []

        def on_custom_event(self, name, data, **kwargs):
            self.stages.append((name, data.get("stage"), bool(data.get("task_id"))))

    recorder = Recorder()
    invoked(generator, how, "[[task-polls:2]]", {"callbacks": [recorder]})
    assert recorder.stages == [
        ("cogview.progress", "sent", False),
        ("cogview.progress", "processing", True),
        ("cogview.progress", "processing", True),
        ("cogview.generated", None, True),
    ]


def answering(*replies, **settings):
    """A generator whose service gives these replies, and then the last one again."""
    left = list(replies)

    def answer(request):
        reply = left.pop(0) if len(left) > 1 else left[0]
        return reply if isinstance(reply, httpx.Response) else httpx.Response(200, json=reply)

    return CogViewImageGenerator(
        api_key="a.b", model="glm-image", http_client=httpx.Client(transport=httpx.MockTransport(answer)), download=False,
        poll_interval=0.001, **settings,
    )  # fmt: skip


DONE = {"task_status": "SUCCESS", "image_result": [{"url": "https://example.com/x.png"}]}


@pytest.mark.parametrize(
    "accepted",
    [
        {"id": "task-1"},
        {"id": "task-1", "task_status": None},
        {"id": "task-1", "task_status": "SUCCESS"},
        {"id": "task-1", "task_status": "QUEUED"},
        {"id": 12345678901234567890, "task_status": "PROCESSING"},
        {"id": "t" * 300, "task_status": "PROCESSING"},
    ],
)
def test_a_task_that_was_accepted_is_followed_whatever_else_its_reply_leaves_out(accepted):
    result = answering(accepted, DONE).invoke("a kitten")
    assert result.url == "https://example.com/x.png"
    assert result.image.task_id == str(accepted["id"])


def test_an_error_in_the_reply_to_the_post_keeps_the_tasks_id():
    with pytest.raises(CogViewTaskFailedError) as caught:
        answering({"id": "task-1", "task_status": "FAIL"}).invoke("a kitten")
    assert caught.value.task_id == "task-1"


def test_a_task_that_is_not_known_yet_is_asked_for_again():
    unknown = httpx.Response(404, json={"error": {"code": "1222", "message": "no such task"}})
    assert answering({"id": "task-1", "task_status": "PROCESSING"}, unknown, unknown, DONE).invoke("a kitten").url


def test_a_task_is_resumed_with_the_generator_that_submitted_it_whatever_its_own_model(sandbox):
    generator = CogViewImageGenerator(base_url=sandbox.base_url, poll_interval=0.01)
    task = generator.submit({"prompt": "a kitten", "model": "glm-image"})
    assert ImageTask.resume(task.id, generator=generator).result().model == "glm-image"


def test_a_task_is_finished_by_the_service_and_key_that_it_was_submitted_with(sandbox, monkeypatch):
    monkeypatch.setenv("COGVIEW_BASE_URL", sandbox.base_url)
    task = CogViewImageGenerator(model="glm-image", poll_interval=0.01).submit("a kitten")
    monkeypatch.delenv("COGVIEW_BASE_URL")
    assert task.result(timeout=60).images
    assert task.generator.model_copy(update={"size": "square"}).invoke("a kitten").images
    with pytest.raises(CogViewConfigurationError, match="no API key"):
        task.generator.model_copy(update={"region": "china"})


def test_a_resumed_task_is_no_longer_uncertain(generator):
    from langchain_cogview import collect_image_costs

    now = 0.0
    with Sandbox(latency=3600, clock=lambda: now) as sandbox, collect_image_costs() as costs:
        generator = generator.model_copy(update={"base_url": sandbox.base_url})
        for timeout in (0.2, 5, 50):
            with pytest.raises(CogViewError) as caught:
                generator.model_copy(update={"timeout": timeout}).invoke("a kitten")
            if not isinstance(caught.value, CogViewTimeoutError):  # else the time was over before it was submitted
                break
        assert isinstance(caught.value, CogViewTaskUnfinishedError)
        assert costs.uncertain.count == 1
        now = 3600.0
        ImageTask.resume(caught.value.task_id, generator=generator).result()
    assert (costs.images, costs.uncertain.count) == (1, 0)


def test_a_short_time_limit_is_spent_waiting_for_the_task():
    pause = _Polls("task", Deadline(1.0), 3.0).pause()
    assert 0 < pause < 1
