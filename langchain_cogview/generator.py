"""`CogViewImageGenerator`, the Runnable."""

from __future__ import annotations

import logging
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Self

from langchain_core.runnables import RunnableConfig, ensure_config

from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.batches import ManyRequestsGenerator, without_key
from langchain_cogview.catalog import model_info
from langchain_cogview.configuration import REQUEST_DEFAULTS, ConfiguredGenerator
from langchain_cogview.errors import (
    CogViewContentFilterError,
    CogViewError,
    CogViewInvalidRequestError,
    CogViewNotFoundError,
    Outcome,
)
from langchain_cogview.many import in_tasks, in_threads
from langchain_cogview.request import ImageRequest, checked_request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun

    from langchain_cogview.content_filter import ContentFilter
    from langchain_cogview.drawing import ImageCall, ImageOutcome
    from langchain_cogview.events import Teller
    from langchain_cogview.inputs import ImageInput
    from langchain_cogview.result import ImageResult
    from langchain_cogview.tasks import ImageTask

logger = logging.getLogger(__name__)


class CogViewImageGenerator(ManyRequestsGenerator, ConfiguredGenerator):
    """Pictures from Zhipu's CogView endpoint, as a Runnable.

    Setup:
        Install `langchain-cogview`, and set `ZHIPUAI_API_KEY` (a key from open.bigmodel.cn, mainland China) or
        `ZAI_API_KEY` (a key from z.ai, international). A key is good on its own platform only.

    Instantiation:
        >>> from langchain_cogview import CogViewImageGenerator
        >>> generator = CogViewImageGenerator(base_url="sandbox:", size="16:9")  # offline; leave base_url out for the service

    Invocation:
        >>> result = generator.invoke("a cute little kitten")
        >>> result.images[0].width, result.images[0].height
        (1344, 768)

        Per call: `generator.invoke({"prompt": "a kitten", "size": "square"})`, `generator.bind(quality="hd")`.

    Async, many, in a chain:
        `await generator.ainvoke(...)`, `generator.batch([...])`, `generator.stream_many(prompts)`, `prompt_template | generator`.

    Args:
        model: One of the catalog's models, or any other, with a warning.
        api_key: None: from the platform's environment variable.
        region: `china` or `international`. None: as the base URL or the key that is set tells, else China.
        base_url: The API's, or `"sandbox:"` for the offline service. None: `COGVIEW_BASE_URL`, else the region's.
        size: As in `ImageRequest`. None: the model's default.
        quality: `standard` or `hd`. None: the model's default.
        n: Pictures for each call; each is one request, and one price.
        user_id: The end user, for the provider's abuse reports; 6 to 128 characters.
        watermark_enabled: False only for accounts that signed the provider's waiver.
        timeout: Seconds for one picture in all: look-up, connect, answer, waits between attempts, download and save. The queue
            for a place in flight, and for the `rate_limiter`, comes before it, and with a `cache` an equal request that is under
            way. None: no limit.
        max_retries: Further attempts of a request that provably did not run, while a tenth of `timeout` (at most 30 s) is left
            for the answer.
        retry_unknown: Also send again what may have been made and charged. Can pay twice.
        max_concurrency: Requests in flight, of all generators, threads and event loops of this process with the same key, model
            and service together. None: the catalog's figure for the model. It is lowered by itself while the service
            refuses (code 1302), and raised again. A task holds its place until it ends, one that was submitted does not.
        rate_limiter: A LangChain rate limiter, asked before every attempt.
        http_client: Used for sync API requests as it is, and never closed; `timeout` is then looked at between its socket
            operations. Pictures are fetched by connections of our own.
        http_async_client: The same for async ones.
        fallback_models: Asked in this order when the model before is busy, over its limit or unavailable after all attempts,
            that is, did not run. Never after a block or an unknown outcome.
        use_tasks: The task endpoint: a paid POST of milliseconds, then free polls. `auto`: where the model allows it.
        poll_interval: Seconds between two polls of a task.
        prices: Of one picture by model, in the platform's currency, in place of the catalog's list prices.
        download: Fetch the bytes. False: the result has the URL alone, which ends after a day to a week.
        output_dir: A folder, made when missing, or a URL that fsspec knows, such as `s3://bucket/pictures` (extra `storage`):
            each picture is saved there under a name made of time, id and hash. None: the bytes stay in memory on the result.
        storage_options: fsspec's, for such a URL. They are in no repr, trace or artifact.
        cache: A LangChain cache, or a directory: the same request gives the same picture without paying. None: each call pays.
        allowed_image_hosts: Fetch images from these hosts only, such as `"*.ufileos.com"`. None: any public host. An entry
            without a wildcard, such as `"gateway.lan"` or `"10.0.0.5:8080"`, allows that host's private addresses and plain http.
        include_prompt_in_events: Put the prompt into `cogview.content_filter` events.

    Raises:
        CogViewConfigurationError: Key or base URL missing or malformed, unknown argument; before any request.
        CogViewInvalidRequestError: An argument of a call is illegal; before any request.
        CogViewError: As the class says, when no picture was made; see `langchain_cogview.errors`.
    """

    def invoke(self, input: ImageInput, config: RunnableConfig | None = None, **kwargs: Any) -> ImageResult:  # noqa: A002
        """Make the pictures of one request.

        Args:
            input: A prompt, the arguments of `ImageRequest` as a dict or object, a prompt value, or messages.
            config: LangChain's.
            **kwargs: Arguments of `ImageRequest`; what `input` says goes before them.
        """
        config = self._traced(input, config, kwargs)
        return self._run(partial(self._draw, overrides=kwargs), input, config)

    async def ainvoke(self, input: ImageInput, config: RunnableConfig | None = None, **kwargs: Any) -> ImageResult:  # noqa: A002
        """Make the pictures of one request. The twin of `invoke`."""
        config = self._traced(input, config, kwargs)
        return await self._arun(partial(self._adraw, overrides=kwargs), input, config)

    # --- tasks

    def submit(self, input: ImageInput, **kwargs: Any) -> ImageTask:  # noqa: A002
        """Give a request to the task endpoint and come back at once: the paid POST takes milliseconds.

        Args:
            input: As for `invoke`; with a model of the task endpoint, such as `glm-image`.
            **kwargs: As for `invoke`.

        Returns:
            The task; its `id` finds the picture again, in another process too.
        """
        from langchain_cogview.tasks import ImageTask  # noqa: PLC0415

        request, notes = self._request(input, kwargs)
        task_id, request_id = self._task_call(request).submit()
        return ImageTask(task_id, generator=self, request=request, request_id=request_id, warnings=notes)

    async def asubmit(self, input: ImageInput, **kwargs: Any) -> ImageTask:  # noqa: A002
        """Give a request to the task endpoint and come back at once. The twin of `submit`."""
        from langchain_cogview.tasks import ImageTask  # noqa: PLC0415

        request, notes = self._request(input, kwargs)
        task_id, request_id = await self._task_call(request).asubmit()
        return ImageTask(task_id, generator=self, request=request, request_id=request_id, warnings=notes)

    def collect(self, task: ImageTask, config: RunnableConfig | None = None, *, seconds: float | None) -> ImageResult:
        """Wait for a task's picture, fetch and save it, all in so many seconds; see `ImageTask.result`."""
        config = self._traced(task.request, config, {})
        return self._run(partial(self._collect, task=task, seconds=seconds), task.request, config)

    async def acollect(
        self, task: ImageTask, config: RunnableConfig | None = None, *, seconds: float | None
    ) -> ImageResult:
        """Wait for a task's picture. The twin of `collect`."""
        config = self._traced(task.request, config, {})
        return await self._arun(partial(self._acollect, task=task, seconds=seconds), task.request, config)

    # --- connections

    def close(self) -> None:
        """Close idle sync connections. They belong to the process; later calls open new ones."""
        from langchain_cogview.api.transport import SHARED  # noqa: PLC0415

        SHARED.close()

    async def aclose(self) -> None:
        """Close idle async connections of the running event loop."""
        from langchain_cogview.api.transport import ASHARED  # noqa: PLC0415

        await ASHARED.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    # --- one run. One that no handler hears is not made into a LangChain run, which costs as much as a third of the request.
    # What a call needs is imported here and below, with the first call: a tool is made in milliseconds without it.

    def _run(self, work: Callable[..., ImageResult], given: ImageInput, config: RunnableConfig) -> ImageResult:
        from langchain_cogview import live  # noqa: PLC0415
        from langchain_cogview.events import heard, is_heard  # noqa: PLC0415
        from langchain_cogview.images.previews import remember  # noqa: PLC0415

        made: list[ImageResult] = []
        with live.call(config) as told:
            try:
                if not is_heard(config):
                    result = work(given, None, config, made=made)
                else:
                    result = self._call_with_config(heard(work, made), given, config, run_type="llm")
            except Exception as error:
                if not made:
                    raise
                logger.warning("A callback handler failed after the pictures were made", exc_info=error)
                result = made[0]
            remember(result.images)
            return told(result)

    async def _arun(self, work: Callable[..., Any], given: ImageInput, config: RunnableConfig) -> ImageResult:
        from langchain_cogview import live  # noqa: PLC0415
        from langchain_cogview.events import heard, is_heard  # noqa: PLC0415
        from langchain_cogview.images.previews import aremember  # noqa: PLC0415

        made: list[ImageResult] = []
        with live.call(config) as told:
            try:
                if not is_heard(config):
                    result = await work(given, None, config, made=made)
                else:
                    result = await self._acall_with_config(heard(work, made), given, config, run_type="llm")
            except Exception as error:
                if not made:
                    raise
                logger.warning("A callback handler failed after the pictures were made", exc_info=error)
                result = made[0]
            await aremember(result.images)
            return told(result)

    def _draw(
        self,
        given: ImageInput,
        run_manager: CallbackManagerForChainRun | None,
        config: RunnableConfig,
        *,
        overrides: dict[str, Any],
        made: list[ImageResult],
    ) -> ImageResult:
        request, notes = self._request(given, overrides)
        call = self._call(((request, ()), *self._fallbacks(request)), self._teller(run_manager, config))
        outcomes = in_threads([partial(call.draw, index) for index in range(request.n)], self.places(request.model))
        return self._result(request, outcomes, notes + call.notes, run_manager, made)

    async def _adraw(
        self,
        given: ImageInput,
        run_manager: AsyncCallbackManagerForChainRun | None,
        config: RunnableConfig,
        *,
        overrides: dict[str, Any],
        made: list[ImageResult],
    ) -> ImageResult:
        request, notes = self._request(given, overrides)
        call = self._call(((request, ()), *self._fallbacks(request)), self._teller(run_manager, config))
        outcomes = await in_tasks(
            [partial(call.adraw, index) for index in range(request.n)], self.places(request.model)
        )
        return self._result(request, outcomes, notes + call.notes, run_manager, made)

    def _collect(
        self,
        given: ImageInput,
        run_manager: CallbackManagerForChainRun | None,
        config: RunnableConfig,
        *,
        task: ImageTask,
        seconds: float | None,
        made: list[ImageResult],
    ) -> ImageResult:
        outcome = self._task_call(task.request, run_manager, config).collect(task.id, task.request_id, seconds)
        return self._result(task.request, [outcome], task.warnings, run_manager, made)

    async def _acollect(
        self,
        given: ImageInput,
        run_manager: AsyncCallbackManagerForChainRun | None,
        config: RunnableConfig,
        *,
        task: ImageTask,
        seconds: float | None,
        made: list[ImageResult],
    ) -> ImageResult:
        outcome = await self._task_call(task.request, run_manager, config).acollect(task.id, task.request_id, seconds)
        return self._result(task.request, [outcome], task.warnings, run_manager, made)

    # --- pure steps

    def _request(self, given: ImageInput, overrides: dict[str, Any]) -> tuple[ImageRequest, tuple[str, ...]]:
        from langchain_cogview.inputs import arguments_of  # noqa: PLC0415

        said, notes = arguments_of(given)
        values = {name: getattr(self, name) for name in REQUEST_DEFAULTS} | overrides | said
        if "prompt" not in values:
            raise CogViewInvalidRequestError(
                "Nothing was sent: there is no prompt.", hint="Pass a string, or a dict with the key 'prompt'."
            )
        request = checked_request(values)
        return request, request.warnings + notes

    def _fallbacks(self, request: ImageRequest) -> list[tuple[ImageRequest, tuple[str, ...]]]:
        others = (request.for_model(model) for model in self.fallback_models if model != request.model)
        return [other for other in others if other]

    def _task_call(
        self,
        request: ImageRequest,
        run_manager: AsyncCallbackManagerForChainRun | CallbackManagerForChainRun | None = None,
        config: RunnableConfig | None = None,
    ) -> ImageCall:
        if not model_info(request.model).tasks:
            raise CogViewInvalidRequestError(
                f"Nothing was sent: {request.model} is no model of the task endpoint.", hint="Use model='glm-image'."
            )
        if request.n > 1:
            raise CogViewInvalidRequestError("Nothing was sent: a task makes one picture.", hint="Submit it n times.")
        return self._call(((request, ()),), self._teller(run_manager, config))

    def _teller(
        self,
        run_manager: AsyncCallbackManagerForChainRun | CallbackManagerForChainRun | None,
        config: RunnableConfig | None,
    ) -> Teller:
        from langchain_cogview.events import NOBODY, Teller  # noqa: PLC0415

        if run_manager is None or config is None:
            return NOBODY
        return Teller(
            config=config,
            tool_call_id=(run_manager.metadata or {}).get("tool_call_id"),
            sandbox=is_sandbox(self._base_url),
            listening=bool(run_manager.handlers),
        )

    def _traced(self, given: ImageInput, config: RunnableConfig | None, overrides: dict[str, Any]) -> RunnableConfig:
        config = ensure_config(config)
        said = overrides.get("model")
        if isinstance(given, dict):
            said = given.get("model", said)
        elif isinstance(given, ImageRequest) and "model" in given.model_fields_set:
            said = given.model
        metadata = {"ls_provider": "zhipuai", "ls_model_name": str(said or self.model), "ls_model_type": "image"}
        traced: RunnableConfig = without_key({**config, "metadata": {**(config.get("metadata") or {}), **metadata}})
        return traced

    def _result(
        self,
        request: ImageRequest,
        outcomes: Sequence[ImageOutcome],
        notes: tuple[str, ...],
        run_manager: AsyncCallbackManagerForChainRun | CallbackManagerForChainRun | None,
        made: list[ImageResult],
    ) -> ImageResult:
        """The result of a run, or the error where there is no picture."""
        from langchain_cogview.result import ImageFailure, ImageResult, total_cost  # noqa: PLC0415

        images = [image for outcome in outcomes if not isinstance(outcome, Exception) for image in outcome]
        errors = [(index, outcome) for index, outcome in enumerate(outcomes) if isinstance(outcome, Exception)]
        cost = total_cost(images)
        if run_manager and run_manager.metadata is not None:  # traces hold it with the run
            filtered = [entry for outcome in outcomes for entry in _entries(outcome)]
            run_manager.metadata.update(
                cogview_images=len(images),
                cogview_cost=None if cost is None else str(cost),
                cogview_currency=self._price(request.model)[1],
                cogview_content_filter=[str(entry) for entry in filtered],
            )
        if not images:
            # Who may have paid must hear that first: the others can be sent again.
            errors.sort(key=lambda error: getattr(error[1], "outcome", None) is not Outcome.UNKNOWN)
            _, first = errors[0]
            if isinstance(first, CogViewNotFoundError) and request.warnings:
                first.hint = " ".join((first.hint, *request.warnings))
            if isinstance(first, CogViewError):
                by_number = sorted(errors, key=itemgetter(0))
                first.prompt = request.prompt
                first.failures = tuple(ImageFailure.of(error, index) for index, error in by_number)
            for index, other in errors[1:]:
                first.add_note(f"Picture {index + 1} of {request.n} failed too: {other}")
            # The frames below say nothing that the error does not say.
            raise first.with_traceback(None) if isinstance(first, CogViewError) else first
        result = ImageResult(
            images=tuple(images),
            failures=tuple(ImageFailure.of(error, index) for index, error in errors),
            prompt=request.prompt,
            model=images[0].model,
            size=images[0].size,
            quality=images[0].quality,
            cost=cost,
            currency=images[0].currency,
            sandbox=any(image.sandbox for image in images),
            warnings=tuple(dict.fromkeys([*notes, *(note for image in images for note in image.warnings)])),
        )
        made.append(result)
        return result


def _entries(outcome: ImageOutcome) -> Sequence[ContentFilter]:
    if isinstance(outcome, CogViewContentFilterError):
        return outcome.content_filter
    return () if isinstance(outcome, Exception) else [entry for image in outcome for entry in image.content_filter]
