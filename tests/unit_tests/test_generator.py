"""What the author of a chain relies on."""

import asyncio
import copy
import io
import json
import pickle
import signal
import threading
import time

import httpx
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.rate_limiters import BaseRateLimiter, InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from PIL import Image

from langchain_cogview import (
    CogViewAuthenticationError,
    CogViewBalanceError,
    CogViewConfigurationError,
    CogViewContentFilterError,
    CogViewDownloadError,
    CogViewError,
    CogViewImageGenerator,
    CogViewImageTool,
    CogViewInvalidRequestError,
    CogViewNotFoundError,
    CogViewOutcomeUnknownError,
    CogViewRateLimitError,
    ImageRequest,
    ImageResult,
    Sandbox,
)
from langchain_cogview.api import client as client_module
from tests.conftest import FAKE_KEY
from tests.host import Host, http


def prompts(sandbox: Sandbox) -> list[str]:
    return [request.prompt for request in sandbox.requests]


def test_a_prompt_gives_an_image_with_its_facts(generator, sandbox):
    result = generator.invoke("a kitten")
    image = result.images[0]
    decoded = Image.open(io.BytesIO(image.read()))
    assert decoded.size == (image.width, image.height) == (1024, 1024)
    assert (image.mime_type, image.size_bytes) == ("image/png", len(image.read()))
    assert image.url.startswith("https://sandbox.invalid/")
    assert image.expires_at.timestamp() > time.time()
    assert image.created == pytest.approx(time.time(), abs=60)
    assert (result.model, result.size, result.quality) == ("cogview-4-250304", "1024x1024", "standard")
    assert result.request_id == sandbox.requests[0].request_id
    assert result.sandbox
    assert result.warnings == ()


CHAT = ChatPromptTemplate.from_messages([("human", "draw {what}")])


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("draw a cat", "draw a cat"),
        ({"prompt": "draw a cat"}, "draw a cat"),
        (ImageRequest(prompt="draw a cat"), "draw a cat"),
        (PromptTemplate.from_template("draw {what}").invoke({"what": "a cat"}), "draw a cat"),
        (CHAT.invoke({"what": "a cat"}), "draw a cat"),
        (HumanMessage("draw a cat"), "draw a cat"),
        (AIMessage([{"type": "text", "text": "draw a cat"}]), "draw a cat"),
        ([SystemMessage("be kind"), HumanMessage("draw a cat")], "draw a cat"),
        ({"prompt": CHAT.invoke({"what": "a cat"})}, "draw a cat"),
    ],
)
def test_every_kind_of_input_sends_its_text_and_nothing_else(generator, sandbox, value, prompt):
    generator.invoke(value)
    asyncio.run(generator.ainvoke(value))
    assert prompts(sandbox) == [prompt, prompt]


def test_messages_that_are_left_out_are_reported(generator):
    result = generator.invoke([SystemMessage("be kind"), HumanMessage("a cat")])
    assert "1 before it were ignored" in result.warnings[0]


@pytest.mark.parametrize("value", [42, None, [], ["a"], {"size": "square"}, {"prompt": 3}, {1: 2, "prompt": "x"}, b"x"])
def test_an_input_that_says_no_prompt_is_refused_before_any_request(generator, sandbox, value):
    with pytest.raises(CogViewInvalidRequestError, match="Nothing was sent"):
        generator.invoke(value)
    with pytest.raises(CogViewInvalidRequestError, match="Nothing was sent"):
        asyncio.run(generator.ainvoke(value))
    assert sandbox.requests == []


def test_it_stands_in_a_chain(generator, sandbox):
    chain = {"what": RunnablePassthrough()} | CHAT | generator | (lambda result: result.images[0].width)
    assert chain.invoke("a cat") == 1024
    assert list(chain.stream("a cat")) == [1024]
    assert asyncio.run(chain.ainvoke("a cat")) == 1024
    assert prompts(sandbox) == ["draw a cat"] * 3


def test_arguments_can_be_passed_for_one_call(generator, sandbox):
    generator.invoke({"prompt": "x", "size": "16:9", "quality": "hd", "user_id": "user-1"})
    generator.bind(size="square").invoke("x")
    generator.bind(size="square").invoke({"prompt": "x", "size": "720x1440"})
    generator.configurable_fields(size=ConfigurableField(id="size")).with_config(configurable={"size": "9:16"}).invoke(
        "x"
    )
    assert [request.body.get("size") for request in sandbox.requests] == [
        "1344x768",
        "1024x1024",
        "720x1440",
        "768x1344",
    ]
    assert sandbox.requests[0].body["quality"] == "hd"
    assert sandbox.requests[0].body["user_id"] == "user-1"


def test_a_configured_model_brings_its_own_sizes(generator):
    chain = generator.configurable_fields(model=ConfigurableField(id="model"))
    result = chain.with_config(configurable={"model": "glm-image"}).invoke("x")
    assert (result.model, result.size, result.quality) == ("glm-image", "1280x1280", "hd")


def test_a_configured_base_url_finds_its_own_key(monkeypatch, sandbox):
    monkeypatch.setenv("ZHIPUAI_API_KEY", FAKE_KEY)
    chain = CogViewImageGenerator().configurable_fields(base_url=ConfigurableField(id="base_url"))
    assert chain.with_config(configurable={"base_url": sandbox.base_url}).invoke("x").sandbox


def test_several_images_are_one_call_each(generator, sandbox):
    result = generator.bind(n=3).invoke("a kitten")
    assert len(result.images) == 3
    assert len(sandbox.requests) == 3
    assert len({request.request_id for request in sandbox.requests}) == 3
    assert {image.request_id for image in result.images} == {request.request_id for request in sandbox.requests}


@pytest.mark.parametrize("run", ["invoke", "ainvoke"])
def test_images_that_were_made_are_kept_beside_those_that_failed(generator, sandbox, run):
    sandbox.fail_next("content-filter", level=1)
    sandbox.fail_next("balance")
    value = {"prompt": "a kitten", "n": 4}
    result = generator.invoke(value) if run == "invoke" else asyncio.run(generator.ainvoke(value))
    assert len(result.images) == 2
    assert {failure.error for failure in result.failures} == {"CogViewContentFilterError", "CogViewBalanceError"}
    blocked = next(failure for failure in result.failures if failure.content_filter)
    assert (blocked.content_filter[0].level, blocked.code) == (1, "1301")
    assert ImageResult.from_artifact(json.loads(json.dumps(result.to_artifact()))) == result


def test_when_all_fail_the_first_error_is_raised_and_the_others_are_noted(generator, sandbox):
    sandbox.fail_next("balance", times=3)
    with pytest.raises(CogViewBalanceError) as caught:
        generator.invoke({"prompt": "x", "n": 3})
    assert len(caught.value.__notes__) == 2


@pytest.mark.parametrize("run", ["batch", "abatch"])
def test_a_blocked_prompt_in_a_batch_costs_no_other_image(generator, sandbox, run):
    inputs = ["a", "[[content-filter]] b", "c", "[[balance]] d", "e"]

    def go(**options):
        return (
            generator.batch(inputs, **options) if run == "batch" else asyncio.run(generator.abatch(inputs, **options))
        )

    results = go(return_exceptions=True)
    assert [type(result).__name__ for result in results] == [
        "ImageResult", "CogViewContentFilterError", "ImageResult", "CogViewBalanceError", "ImageResult",
    ]  # fmt: skip
    with pytest.raises(CogViewContentFilterError) as caught:
        go()
    assert [type(result) for result in caught.value.batch_results] == [type(result) for result in results]
    assert [result.prompt for result in caught.value.batch_results if isinstance(result, ImageResult)] == [
        "a",
        "c",
        "e",
    ]
    assert caught.value.__notes__ == [
        "3 of the 5 inputs were made. error.batch_results has the result or the exception of each input, in order."
    ]
    assert len(sandbox.requests) == 10


def test_a_batch_keeps_to_the_models_limit_in_flight():
    with Sandbox(in_flight_limit=5, latency=0.02) as limited:
        generator = CogViewImageGenerator(base_url=limited.base_url, max_retries=0)
        assert len(generator.batch([f"p{i}" for i in range(30)])) == 30
        assert len(asyncio.run(generator.abatch([f"p{i}" for i in range(30)]))) == 30
        assert len(generator.batch(["a"] * 3, {"max_concurrency": 1})) == 3


def test_an_empty_batch_is_an_empty_list(generator):
    assert generator.batch([]) == []
    assert asyncio.run(generator.abatch([])) == []


def test_a_limit_is_waited_for_and_sent_again_under_the_same_id(generator, sandbox):
    sandbox.fail_next("rate-limit", times=2, retry_after=0)
    generator.invoke("x")
    assert len(sandbox.requests) == 3
    assert len({request.request_id for request in sandbox.requests}) == 1
    sandbox.fail_next("busy", times=3, retry_after=0)
    with pytest.raises(CogViewRateLimitError) as caught:
        generator.invoke("y")
    assert caught.value.attempts == 3
    assert caught.value.request_id == sandbox.requests[-1].request_id


@pytest.mark.parametrize("timeout", [120, None])
@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_full_account_uses_up_no_retry_and_a_warning_names_other_processes(
    sandbox, how, timeout, monkeypatch, caplog
):
    monkeypatch.setattr(client_module, "_MAX_REFUSED_WAIT", 0.01)
    patient = CogViewImageGenerator(
        base_url=sandbox.base_url, api_key=f"{how}.{timeout}", max_retries=0, timeout=timeout
    )
    sandbox.fail_next("rate-limit", times=12)
    assert (patient.invoke("x") if how == "sync" else asyncio.run(patient.ainvoke("x"))).images
    assert (len(sandbox.requests), sandbox.images_made) == (13, 1)
    (record,) = [record for record in caplog.records if record.name == "langchain_cogview.api.client"]
    assert "Other processes may use the same key: set shared_limit in each" in record.getMessage()


@pytest.mark.parametrize("how", ["sync", "async"])
def test_without_a_time_limit_a_full_account_is_not_waited_for_for_ever(sandbox, how, monkeypatch):
    monkeypatch.setattr(client_module, "_MAX_REFUSED_WAIT", 0.01)
    monkeypatch.setattr(client_module, "MAX_REFUSED_SECONDS", 0.02)
    patient = CogViewImageGenerator(base_url=sandbox.base_url, timeout=None)
    sandbox.fail_next("rate-limit", times=100_000)
    with pytest.raises(CogViewRateLimitError, match="Other processes may use the same key"):
        patient.invoke("x") if how == "sync" else asyncio.run(patient.ainvoke("x"))
    assert sandbox.images_made == 0


def test_a_fallback_model_is_asked_instead_of_waiting_for_a_full_account(sandbox):
    sandbox.fail_next("rate-limit")
    generator = CogViewImageGenerator(
        base_url=sandbox.base_url, model="cogview-4", fallback_models=["cogview-3-flash"], max_retries=0
    )
    assert generator.invoke("x").model == "cogview-3-flash"
    assert len(sandbox.requests) == 2


def test_a_balance_error_is_not_sent_again(generator, sandbox):
    with pytest.raises(CogViewBalanceError, match="balance.*coding-plan"):
        generator.invoke("[[balance]]")
    assert len(sandbox.requests) == 1


def test_an_unknown_outcome_is_not_sent_again_unless_asked(generator, sandbox):
    with pytest.raises(CogViewOutcomeUnknownError):
        generator.invoke("[[server-error]]")
    assert len(sandbox.requests) == 1
    sandbox.fail_next("server-error")
    again = CogViewImageGenerator(base_url=sandbox.base_url, retry_unknown=True)
    assert again.invoke("x").images
    assert len(sandbox.requests) == 3


def test_a_wait_that_does_not_fit_the_time_gives_up_at_once(sandbox):
    sandbox.fail_next("rate-limit", retry_after=3000)
    with pytest.raises(CogViewRateLimitError) as caught:
        CogViewImageGenerator(base_url=sandbox.base_url, timeout=2000).invoke("x")
    assert caught.value.retry_after == 3000
    assert len(sandbox.requests) == 1


class SlowLimiter(BaseRateLimiter):
    """Gives its permission at once, the second time after nearly all of a time limit."""

    def __init__(self, timeout):
        self.asked, self.timeout = 0, timeout

    def _wait(self):
        self.asked += 1
        return 0.95 * self.timeout if self.asked > 1 else 0.0

    def acquire(self, *, blocking=True):
        time.sleep(self._wait())
        return True

    async def aacquire(self, *, blocking=True):
        await asyncio.sleep(self._wait())
        return True


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("late", ["by the wait", "by the rate limiter"])
def test_what_did_not_run_is_not_sent_again_when_the_answer_would_come_too_late(sandbox, how, late):
    def call(**settings):
        generator = CogViewImageGenerator(base_url=sandbox.base_url, **settings)
        with pytest.raises(CogViewError) as caught:
            generator.invoke("x") if how == "sync" else asyncio.run(generator.ainvoke("x"))
        return caught.value

    if late == "by the wait":
        sandbox.fail_next("rate-limit", retry_after=990)
        error = call(timeout=1000)
    else:
        for timeout in (1, 10, 100):
            sandbox.reset()
            sandbox.fail_next("rate-limit", retry_after=0)
            limiter = SlowLimiter(timeout)
            error = call(timeout=timeout, rate_limiter=limiter)
            if limiter.asked > 1:  # else a busy machine used the time up in the first attempt
                break
    assert type(error) is CogViewRateLimitError
    assert len(sandbox.requests) == 1
    assert sandbox.images_made == 0


def test_an_image_that_is_not_there_yet_is_waited_for(generator, sandbox):
    assert generator.invoke("[[not-yet]]").images[0].width == 1024
    assert len(sandbox.requests) == 1


def test_a_failed_download_keeps_the_result_with_its_url_and_a_warning(generator, sandbox):
    result = generator.invoke("[[expired-url]]")
    assert result.url
    assert result.path is None
    assert "expired" in result.warnings[0]
    assert len(sandbox.requests) == 1


def test_images_are_saved_under_our_names(sandbox, tmp_path):
    folder = tmp_path / "new" / "folder"
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=folder)
    result = generator.invoke("../../etc/passwd \n kitten")
    again = asyncio.run(generator.ainvoke("../../etc/passwd \n kitten"))
    assert {result.path, again.path} == set(folder.iterdir())
    assert result.path.read_bytes() == again.path.read_bytes() == result.read()
    assert "passwd" not in result.path.name
    assert result.images[0]._content is None


def test_an_output_dir_that_cannot_be_written_keeps_the_image_with_a_warning(sandbox, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    blocked /= "below"
    result = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=blocked).invoke("x")
    assert result.path is None
    assert f"could not be saved in output_dir ({blocked})" in result.warnings[0]
    assert Image.open(io.BytesIO(result.read())).size == (1024, 1024)


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "submit", "asubmit", "tool"])
def test_an_output_dir_that_is_a_file_is_refused_before_anything_is_paid(sandbox, tmp_path, how):
    file = tmp_path / "a_file.py"
    file.write_text("x")
    generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=file, model="glm-image")
    if how == "tool":
        text = CogViewImageTool(generator=generator, on_failure="continue").invoke({"prompt": "x"})
        assert "is a file, not a folder. Nothing was sent. Tell the user: Pass the path of a folder" in text
    else:
        for _ in range(2):
            with pytest.raises(CogViewConfigurationError, match="is a file, not a folder. Nothing was sent"):
                asyncio.run(getattr(generator, how)("x")) if how[0] == "a" else getattr(generator, how)("x")
    assert sandbox.requests == []
    file.unlink()
    if how == "invoke":
        assert generator.invoke("x").path.parent == file


def test_without_download_the_result_has_only_the_url(sandbox):
    result = CogViewImageGenerator(base_url=sandbox.base_url, download=False).invoke("x")
    assert result.url and result.sha256 is None and sandbox.downloads == []
    assert result.read().startswith(b"\x89PNG")


class Recorder(BaseCallbackHandler):
    def __init__(self):
        self.runs = []

    def on_chain_start(self, serialized, inputs, *, metadata=None, **kwargs):
        self.runs.append((kwargs.get("name"), metadata, kwargs.get("run_type")))


def test_traces_carry_provider_and_model(generator):
    recorder = Recorder()
    generator.invoke("x", {"callbacks": [recorder], "metadata": {"mine": 1}})
    asyncio.run(generator.ainvoke({"prompt": "x", "model": "glm-image"}, {"callbacks": [recorder]}))
    generator.bind(model="cogview-4").invoke("x", {"callbacks": [recorder]})
    names, metadata, _ = zip(*recorder.runs, strict=True)
    assert names == ("CogViewImageGenerator",) * 3
    assert metadata[0]["mine"] == 1
    assert [item["ls_model_name"] for item in metadata] == ["cogview-4-250304", "glm-image", "cogview-4"]
    assert {item["ls_provider"] for item in metadata} == {"zhipuai"}


async def test_events_of_the_run_are_streamed(generator):
    events = [event async for event in generator.astream_events("x", version="v2")]
    assert events[0]["event"].endswith("_start")
    assert isinstance(events[-1]["data"]["output"], ImageResult)


def test_the_rate_limiter_is_asked_before_every_attempt(sandbox):
    class Counting(InMemoryRateLimiter):
        asked = 0

        def acquire(self, *, blocking=True):
            self.asked += 1
            return True

    limiter = Counting(requests_per_second=1000)
    sandbox.fail_next("rate-limit", times=2, retry_after=0)
    CogViewImageGenerator(base_url=sandbox.base_url, rate_limiter=limiter).invoke("x")
    assert limiter.asked == 3


def reply_with(recorded):
    def answer(request: httpx.Request) -> httpx.Response:
        recorded.append(request)
        return httpx.Response(200, json={"data": [{"url": "https://host.invalid/x.png"}]})

    return httpx.MockTransport(answer)


def test_injected_clients_are_used_and_left_open():
    seen = []
    client, aclient = httpx.Client(transport=reply_with(seen)), httpx.AsyncClient(transport=reply_with(seen))
    generator = CogViewImageGenerator(api_key=FAKE_KEY, http_client=client, http_async_client=aclient, download=False)
    with generator:
        assert generator.invoke("x").url == "https://host.invalid/x.png"

    async def go():
        async with generator:
            await generator.ainvoke("x")
        assert not aclient.is_closed
        await aclient.aclose()

    asyncio.run(go())
    assert not client.is_closed
    client.close()
    assert [request.headers["authorization"] for request in seen] == [f"Bearer {FAKE_KEY}"] * 2
    assert [str(request.url) for request in seen] == ["https://open.bigmodel.cn/api/paas/v4/images/generations"] * 2


def test_the_sandbox_in_process_takes_no_http_client():
    with httpx.Client() as client, pytest.raises(CogViewConfigurationError, match="not reached by an HTTP client"):
        CogViewImageGenerator(base_url="sandbox:", http_client=client)


def test_an_unknown_model_is_explained_when_the_service_refuses_it(generator):
    with pytest.raises(CogViewNotFoundError, match="Did you mean 'cogview-4'"):
        generator.invoke({"prompt": "x", "model": "cogview4"})


def test_the_key_is_in_no_text_and_no_serialized_form():
    generator = CogViewImageGenerator(api_key=FAKE_KEY)
    shown = (
        repr(generator),
        str(generator),
        dumps(generator),
        str(dumpd(generator)),
        str(generator.model_dump()),
        generator.model_dump_json(),
    )
    assert all(FAKE_KEY not in text for text in shown)
    assert dumpd(generator)["kwargs"]["api_key"]["id"] == ["ZHIPUAI_API_KEY"]
    assert dumpd(CogViewImageGenerator(api_key=FAKE_KEY, region="international"))["kwargs"]["api_key"]["id"] == [
        "ZAI_API_KEY"
    ]
    assert FAKE_KEY.encode() not in pickle.dumps(generator)


def test_a_pickled_generator_finds_its_key_where_it_arrives(monkeypatch):
    with Host(http(401, b'{"error": {"code": "1000", "message": "no"}}')) as host:
        base_url = f"http://127.0.0.1:{host.port}"
        generator = pickle.loads(pickle.dumps(CogViewImageGenerator(api_key=FAKE_KEY, base_url=base_url)))
        with pytest.raises(CogViewConfigurationError, match="no API key"):
            generator.invoke("x")
        monkeypatch.setenv("ZHIPUAI_API_KEY", FAKE_KEY)
        with pytest.raises(CogViewAuthenticationError):
            generator.invoke("x")


def test_what_was_injected_refuses_to_be_pickled_and_is_shared_by_a_copy():
    with httpx.Client() as client:
        generator = CogViewImageGenerator(api_key=FAKE_KEY, http_client=client)
        with pytest.raises(TypeError, match="http_client cannot be pickled"):
            pickle.dumps(generator)
        assert copy.deepcopy(generator).http_client is client


def test_a_named_sandbox_that_is_gone_is_an_error():
    with pytest.raises(CogViewConfigurationError, match="no sandbox"):
        CogViewImageGenerator(base_url="sandbox:nowhere").invoke("x")


def test_a_possible_charge_is_reported_before_any_other_error(generator, sandbox):
    sandbox.fail_next("balance", times=2)
    sandbox.fail_next("malformed")
    with pytest.raises(CogViewOutcomeUnknownError):
        generator.invoke({"prompt": "x", "n": 3})


def test_an_injected_clients_own_headers_are_sent():
    seen = []
    with httpx.Client(transport=reply_with(seen), headers={"x-own": "yes"}) as client:
        CogViewImageGenerator(api_key=FAKE_KEY, http_client=client, download=False).invoke("x")
    assert seen[0].headers["x-own"] == "yes"


def test_a_model_that_is_not_known_is_warned_of_once():
    with pytest.warns(UserWarning, match="does not know") as warned:
        CogViewImageTool(base_url="sandbox:", model="cogview-9")
    assert len(warned) == 1


def test_an_empty_base_url_is_not_the_paid_service():
    with pytest.raises(CogViewConfigurationError, match="base URL"):
        CogViewImageGenerator(api_key=FAKE_KEY, base_url="")


@pytest.fixture
def interruptible():
    # A test run in the background of a shell inherits that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("way", ["n", "batch"])
def test_after_ctrl_c_nothing_more_is_sent(sandbox, interruptible, way):
    sandbox.fail_next("rate-limit", times=50, retry_after=1)
    generator = CogViewImageGenerator(base_url=sandbox.base_url, max_concurrency=2)
    threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        generator.invoke({"prompt": "x", "n": 4}) if way == "n" else generator.batch(["a", "b", "c", "d"])
    workers = [thread for thread in threading.enumerate() if thread.name == "cogview"]
    for thread in workers:
        thread.join(5)
    # Each was sent once and refused; nobody came back after the wait that the service asked for.
    assert len({request.request_id for request in sandbox.requests}) == len(sandbox.requests) <= 4


def test_a_later_refusal_does_not_hide_what_may_have_been_charged(sandbox):
    sandbox.fail_next("server-error")
    sandbox.fail_next("balance")
    with pytest.raises(CogViewOutcomeUnknownError) as caught:
        CogViewImageGenerator(base_url=sandbox.base_url, retry_unknown=True).invoke("x")
    assert caught.value.attempts == 2
    assert "CogViewBalanceError" in caught.value.__notes__[0] or "balance" in caught.value.__notes__[0]
    sandbox.fail_next("server-error")
    result = CogViewImageGenerator(base_url=sandbox.base_url, retry_unknown=True).invoke("x")
    assert "earlier attempt may have been charged" in result.warnings[0]


async def test_a_caller_who_leaves_after_the_payment_learns_where_the_image_is(generator, sandbox, caplog):
    task = asyncio.create_task(generator.ainvoke("[[not-yet:3]]"))
    while not sandbox.downloads:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sandbox.requests[0].request_id in caplog.text
    assert "https://sandbox.invalid/files/" in caplog.text


def test_a_setting_is_changed_by_a_copy_that_finds_its_own_service(sandbox):
    generator = CogViewImageGenerator(api_key=FAKE_KEY)
    with pytest.raises(ValueError, match="frozen"):
        generator.base_url = sandbox.base_url
    assert generator.model_copy(update={"base_url": sandbox.base_url}).invoke("x").sandbox


def test_an_unpickled_generator_keeps_its_service(monkeypatch):
    monkeypatch.setenv("COGVIEW_BASE_URL", "sandbox:")
    packed = pickle.dumps(CogViewImageGenerator())
    monkeypatch.delenv("COGVIEW_BASE_URL")
    monkeypatch.setenv("ZHIPUAI_API_KEY", FAKE_KEY)
    assert pickle.loads(packed).invoke("x").sandbox


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
def test_without_a_time_limit_an_absurd_wait_is_not_waited_for(sandbox, how):
    sandbox.fail_next("rate-limit", retry_after="9" * 400)
    generator = CogViewImageGenerator(base_url=sandbox.base_url, timeout=None)
    with pytest.raises(CogViewRateLimitError):
        generator.invoke("x") if how == "invoke" else asyncio.run(generator.ainvoke("x"))


class FaultyEnd(BaseCallbackHandler):
    raise_error = True

    def on_chain_end(self, outputs, **kwargs):
        raise RuntimeError("a faulty listener")


def test_a_handler_that_fails_at_the_end_costs_no_image(generator):
    config = {"callbacks": [FaultyEnd()]}
    assert generator.invoke("x", config).images
    assert asyncio.run(generator.ainvoke("x", config)).images
    assert len(generator.batch(["a", "b"], config)) == 2


def test_several_images_in_a_batch_keep_to_the_limit_too():
    with Sandbox(in_flight_limit=5, latency=0.01) as limited:
        generator = CogViewImageGenerator(base_url=limited.base_url, max_retries=0, n=3)
        assert sum(len(result.images) for result in generator.batch([f"p{i}" for i in range(6)])) == 18
        assert sum(len(result.images) for result in asyncio.run(generator.abatch([f"p{i}" for i in range(6)]))) == 18


def test_allowed_hosts_hold_for_later_reading_too(sandbox):
    result = CogViewImageGenerator(base_url=sandbox.base_url, allowed_image_hosts="mfile.z.ai").invoke("x")
    with pytest.raises(CogViewDownloadError, match="allowed_image_hosts"):
        result.read()
    assert sandbox.downloads == []


def test_what_langchain_serializes_is_plain(tmp_path):
    assert json.loads(dumps(CogViewImageGenerator(base_url="sandbox:", output_dir=tmp_path)))["kwargs"][
        "output_dir"
    ] == str(tmp_path)
