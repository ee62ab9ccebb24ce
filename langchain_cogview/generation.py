"""Generate one image: cache, paid call, download, record. Nothing that fails after the payment loses the image."""

from __future__ import annotations

import logging
import uuid
import weakref
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import SecretStr

from langchain_cogview.addresses import LinkRules
from langchain_cogview.api.client import client_of
from langchain_cogview.api.protocol import ImagesReply, images_body
from langchain_cogview.api.sending import asender, sender
from langchain_cogview.api.tasks import TasksClient
from langchain_cogview.cache import CachedRequest
from langchain_cogview.catalog import model_info, price_of
from langchain_cogview.concurrency import (
    SINGLE_FLIGHT,
    Deadline,
    as_outcome,
    in_thread,
    raised_by_signal,
    running_task,
    runs_in,
)
from langchain_cogview.cost import Charges, Money
from langchain_cogview.errors import (
    CogViewContentFilterError,
    CogViewError,
    CogViewNotFoundError,
    CogViewRateLimitError,
    CogViewServerError,
    CogViewTimeoutError,
    Outcome,
    printable,
)
from langchain_cogview.events import EventDispatcher, ImageEvents
from langchain_cogview.images.download import DownloadedImage, afetch, expires_at, fetch, save_content
from langchain_cogview.images.remote import ImageAccess
from langchain_cogview.result import GeneratedImage, ImageFailure, ImageResult, with_content
from langchain_cogview.text import noting_lost_image, unsaved_note

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from langchain_cogview.api.client import ImagesClient
    from langchain_cogview.api.settings import Service
    from langchain_cogview.budget import Charge, Reservation
    from langchain_cogview.cache import Entries
    from langchain_cogview.errors import ContentFilter
    from langchain_cogview.images.folders import Folder
    from langchain_cogview.request import ImageRequest

ImageOutcome = list[GeneratedImage] | Exception
"""The outcome of one paid call: its images (one in practice), or the error."""
Download = DownloadedImage | CogViewError | None
"""The outcome of one download; None where the caller does not want the bytes."""

_FLIGHT_SECONDS = 600.0
_REFETCH_SECONDS = 10.0
_REFETCH_RETRIES = 1  # the URL of a cached image is usually old: what is not there any more will not appear
_CACHE_SECONDS = 60.0

logger = logging.getLogger(__name__)


class PaidReply(NamedTuple):
    """The reply to a paid call.

    Attributes:
        request: The request, with the model that made the image.
        reply: The reply of the service.
        notes: Warnings about the call.
    """

    request: ImageRequest
    reply: ImagesReply
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CallSettings:
    """How images are generated: the same for all calls of a generator.

    Attributes:
        client: Makes the paid call.
        base_url: The base URL of the service; links to the same host and port belong to the service.
        timeout: Seconds for call, download and saving together, once the call has its slot; None: no limit.
        download: Whether the image bytes are downloaded.
        folder: Where files are saved, on this machine or in remote storage; None: the bytes stay in memory.
        allowed_hosts: The only hosts whose links are opened; None: any public host.
        use_tasks: Whether the task endpoint is used; `auto`: as the catalog says for the model.
        poll_interval: Seconds between two polls of a task.
        price: Returns the price of an image of a model: amount (None: unknown) and currency.
        include_prompt: Whether content filter events hold the prompt.
        usd_per_cny: The exchange rate for the cost in traces; None: amounts in CNY have none there.
        cache: Where images are looked up before they are paid for; None: nowhere.
    """

    client: ImagesClient
    base_url: str
    timeout: float | None
    download: bool
    folder: Path | Folder | None
    allowed_hosts: tuple[str, ...] | None
    use_tasks: Literal["auto"] | bool
    poll_interval: float
    # Not compared: functions are never equal, and equal generators must stay equal after a call.
    price: Callable[[str], tuple[Decimal | None, str]] = field(compare=False)
    include_prompt: bool
    usd_per_cny: Decimal | None = None
    cache: Entries | None = None

    def cached(self, request: ImageRequest) -> CachedRequest | None:
        """Prepare the cache for a request.

        Args:
            request: The request.

        Returns:
            Where the images of the request are looked up and stored; None without a cache.
        """
        if self.cache is None:
            return None
        return CachedRequest(
            self.cache,
            request,
            self.base_url,
            download=self.download,
            folder=self.folder,
            allowed_hosts=self.allowed_hosts,
            timeout=min(self.timeout or _CACHE_SECONDS, _CACHE_SECONDS),
        )

    @classmethod
    def of(
        cls,
        service: Service,
        folder: Path | Folder | None,
        cache: Entries | None,
        settings: Mapping[str, Any],
    ) -> CallSettings:
        """Take the settings from a generator.

        Args:
            service: The service, with its key.
            folder: The folder that `output_dir` names.
            cache: The cache that `cache` names.
            settings: The fields of the generator.

        Returns:
            The settings, with a client for the service.
        """
        for_client = (
            "max_concurrency",
            "max_concurrency_per_user",
            "priority",
            "max_retries",
            "retry_unknown",
            "rate_limiter",
            "shared_limit",
            "http_client",
            "http_async_client",
        )
        key = service.key or SecretStr("")
        return cls(
            client=client_of(service.base_url, key, **{name: settings[name] for name in for_client}),
            base_url=service.base_url,
            folder=folder,
            cache=cache,
            allowed_hosts=settings["allowed_image_hosts"],
            price=partial(price_of, region=service.region, prices=settings["prices"]),
            include_prompt=settings["include_prompt_in_events"],
            **{name: settings[name] for name in ("timeout", "download", "use_tasks", "poll_interval", "usd_per_cny")},
        )


@dataclass(frozen=True, slots=True)
class ImageCall:
    """Generates the images of one request. Every `generate` is one paid call with a new request id.

    Attributes:
        settings: The settings of the generator.
        requests: The request, then the same request for the fallback models, with the warnings about each.
        dispatcher: Sends the events.
        cache: Where images are looked up first; None: every image is paid for.
        reservation: Where every POST that may be charged is counted; None: nowhere.
    """

    settings: CallSettings
    requests: tuple[tuple[ImageRequest, tuple[str, ...]], ...]
    dispatcher: EventDispatcher
    cache: CachedRequest | None = None
    reservation: Reservation | None = None

    @property
    def request(self) -> ImageRequest:
        """The request for the first model."""
        return self.requests[0][0]

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the call as a whole, once it has ended."""
        return tuple(self.cache.notes) if self.cache else ()

    def generate(self, index: int = 0) -> ImageOutcome:
        """Make one image, or take it from the cache.

        Args:
            index: The position of the image among the `n` of the request.

        Returns:
            The image, or the error: the caller raises or records it with those of the other images.
        """
        if self.cache is None:
            return self._generate_new()
        # A call that waits here for an equal request holds no slot of the limiter.
        with SINGLE_FLIGHT.flight(self.cache.flight_key(index), self.settings.timeout or _FLIGHT_SECONDS):
            hit = self.cache.lookup(index, self._refetched)
            if hit is None:
                outcome = self._generate_new()
                if not isinstance(outcome, Exception):
                    with noting_lost_image(outcome[0].request_id, outcome[0].url):
                        self.cache.store(index, outcome[0])
                return outcome
        self.dispatcher.dispatch(*self._events(Deadline(None), hit.request_id).made([hit]))
        return [hit]

    async def agenerate(self, index: int = 0) -> ImageOutcome:
        """Async version of `generate`.

        Returns:
            As `generate`.
        """
        if self.cache is None:
            return await self._agenerate_new()
        async with SINGLE_FLIGHT.aflight(self.cache.flight_key(index), self.settings.timeout or _FLIGHT_SECONDS):
            hit = await self.cache.alookup(index, self._arefetched)
            if hit is None:
                outcome = await self._agenerate_new()
                if not isinstance(outcome, Exception):
                    with noting_lost_image(outcome[0].request_id, outcome[0].url):
                        await self.cache.astore(index, outcome[0])
                return outcome
        await self.dispatcher.adispatch(*self._events(Deadline(None), hit.request_id).made([hit]))
        return [hit]

    def _generate_new(self) -> ImageOutcome:
        events = self._events(Deadline(self.settings.timeout, started=False))
        try:
            paid = self._paid(events)
        except BaseException as error:  # noqa: BLE001
            events.failed(error)
            self.dispatcher.dispatch(*events.ended_with(error))
            return as_outcome(error)
        return self._finish(paid, events)

    async def _agenerate_new(self) -> ImageOutcome:
        events = self._events(Deadline(self.settings.timeout, started=False))
        try:
            paid = await self._apaid(events)
        except BaseException as error:  # noqa: BLE001
            await events.afailed(error)
            await self.dispatcher.adispatch(*events.ended_with(error))
            return as_outcome(error)
        return await self._afinish(paid, events)

    def submit(self) -> tuple[str, str, Charge | None]:
        """Submit a task.

        Returns:
            The id of the task, the request id, and what it was counted as; None without a budget.
        """
        events = self._events(Deadline(self.settings.timeout, started=False))
        body = images_body(self.request, events.request_id)
        return self.tasks().submit(body, events.deadline, events), events.request_id, events.charge

    async def asubmit(self) -> tuple[str, str, Charge | None]:
        """Async version of `submit`.

        Returns:
            As `submit`.
        """
        events = self._events(Deadline(self.settings.timeout, started=False))
        body = images_body(self.request, events.request_id)
        return await self.tasks().asubmit(body, events.deadline, events), events.request_id, events.charge

    def collect(self, task_id: str, request_id: str, seconds: float | None) -> ImageOutcome:
        """Wait for the image of a task.

        Args:
            task_id: The id of the task.
            request_id: The request id of the task.
            seconds: The time limit; None: no limit.

        Returns:
            The image, or the error.
        """
        events = self._events(Deadline(seconds), request_id)
        try:
            reply = self.tasks().result(task_id, events.deadline, events)
        except BaseException as error:  # noqa: BLE001
            self.dispatcher.dispatch(*events.ended_with(error))
            return as_outcome(error)
        return self._finish(PaidReply(self.request, reply), events)

    async def acollect(self, task_id: str, request_id: str, seconds: float | None) -> ImageOutcome:
        """Async version of `collect`.

        Returns:
            As `collect`.
        """
        events = self._events(Deadline(seconds), request_id)
        try:
            reply = await self.tasks().aresult(task_id, events.deadline, events)
        except BaseException as error:  # noqa: BLE001
            await self.dispatcher.adispatch(*events.ended_with(error))
            return as_outcome(error)
        return await self._afinish(PaidReply(self.request, reply), events)

    def result(self, outcomes: Sequence[ImageOutcome], notes: tuple[str, ...]) -> ImageResult:
        """Make the result of a run, and write images, cost and content filter into the metadata of the run.

        Args:
            outcomes: The outcome for every image, in order.
            notes: Warnings about the request as a whole.

        Returns:
            The images, and the failures of others.

        Raises:
            CogViewError: No image was made; an error of unknown outcome comes first.
        """
        request = self.request
        images = [image for outcome in outcomes if not isinstance(outcome, Exception) for image in outcome]
        errors = [(index, outcome) for index, outcome in enumerate(outcomes) if isinstance(outcome, Exception)]
        charges, currency = Charges(), self.settings.price(request.model)[1]
        for image in images:
            charges.add(Money.of_image(image))
        cost = None if charges.unpriced else charges.amounts.get(currency, Decimal(0))
        self.dispatcher.metadata.update(
            cogview_images=len(images),
            cogview_cost=None if cost is None else str(cost),
            cogview_currency=currency,
            **_usage(cost, currency, self.settings.usd_per_cny),
            cogview_content_filter=[str(entry) for outcome in outcomes for entry in _entries(outcome)],
        )
        if not images:
            # An image that may have been charged matters most: the other requests can be sent again.
            errors.sort(key=lambda error: getattr(error[1], "outcome", None) is not Outcome.UNKNOWN)
            _, first = errors[0]
            if isinstance(first, CogViewNotFoundError) and request.warnings:
                first.hint = " ".join((first.hint, *request.warnings))
            if isinstance(first, CogViewError):
                by_number = sorted(errors, key=itemgetter(0))
                first.prompt = request.prompt
                first.failures = tuple(ImageFailure.of(error, index) for index, error in by_number)
            for index, other in errors[1:]:
                first.add_note(f"Image {index + 1} of {request.n} failed too: {other}")
            # The frames below hold the request, and say nothing that the error does not say.
            raise first.with_traceback(None) if isinstance(first, CogViewError) else first
        return ImageResult(
            images=tuple(images),
            failures=tuple(ImageFailure.of(error, index) for index, error in errors),
            prompt=request.prompt,
            original_prompt=request.original_prompt,
            model=images[0].model,
            size=images[0].size,
            quality=images[0].quality,
            cost=cost,
            currency=images[0].currency,
            sandbox=any(image.sandbox for image in images),
            warnings=tuple(dict.fromkeys([*notes, *(note for image in images for note in image.warnings)])),
        )

    # --- the paid call, by the first model that takes it

    def _paid(self, events: ImageEvents) -> PaidReply:
        refused: list[CogViewError] = []
        for request, notes in self.requests:
            events.model = request.model
            body = images_body(request, events.request_id)
            try:
                reply = self._client(request.model).generate(body, events.deadline, events)
            except CogViewError as error:
                self._next_model(error, refused)
            else:
                return PaidReply(request, reply, (*notes, *_fallen_back(request, refused)))
        raise AssertionError  # the error of the last model is raised

    async def _apaid(self, events: ImageEvents) -> PaidReply:
        refused: list[CogViewError] = []
        for request, notes in self.requests:
            events.model = request.model
            body = images_body(request, events.request_id)
            try:
                reply = await self._client(request.model).agenerate(body, events.deadline, events)
            except CogViewError as error:
                self._next_model(error, refused)
            else:
                return PaidReply(request, reply, (*notes, *_fallen_back(request, refused)))
        raise AssertionError  # the error of the last model is raised

    def _next_model(self, error: CogViewError, refused: list[CogViewError]) -> None:
        """Return when the next model may be asked after an error; raise the error otherwise."""
        did_not_run = error.outcome is Outcome.NOT_RUN
        if did_not_run and isinstance(error, CogViewTimeoutError) and refused:
            # The error of the model before says more than the time limit that passed before this model was asked.
            raise refused[-1] from None
        refused.append(error)
        may = did_not_run and isinstance(error, CogViewRateLimitError | CogViewServerError)
        if may and len(refused) < len(self.requests):
            return
        for earlier, (request, _) in zip(refused[:-1], self.requests, strict=False):
            error.add_note(f"Before, {request.model} did not run: {earlier}")
        raise error

    def _client(self, model: str) -> ImagesClient | TasksClient:
        wanted = model_info(model).tasks if self.settings.use_tasks == "auto" else self.settings.use_tasks
        client = self.settings.client
        if model != self.requests[-1][0].model:
            # The next model is asked instead of waiting until this one has a slot.
            client = replace(client, policy=replace(client.policy, waits_for_account=False))
        return replace(self.tasks(), images=client) if wanted else client

    def tasks(self) -> TasksClient:
        """Make the client of the task endpoint.

        Returns:
            The client, for the same service and the same limits.
        """
        return TasksClient(
            self.settings.client, self.settings.poll_interval, plain_route=self.settings.use_tasks == "auto"
        )

    def _events(self, deadline: Deadline, request_id: str | None = None) -> ImageEvents:
        return ImageEvents(
            self.dispatcher,
            lambda model: Money(*self.settings.price(model)),
            self.request.prompt if self.settings.include_prompt else None,
            deadline,
            request_id or str(uuid.uuid4()),
            self.request.model,
            self.reservation,
        )

    # --- the bytes and the record of the image

    def _finish(self, paid: PaidReply, events: ImageEvents) -> list[GeneratedImage]:
        reply = paid.reply
        events.answered(reply.unasked_urls)
        with noting_lost_image(events.request_id, *reply.urls):
            try:
                outcome = None if reply.content is None else self._saved(reply.content, events)
                if reply.urls and not isinstance(outcome, DownloadedImage):
                    outcome = self._fetched(reply.urls[0], events.deadline, events.label)
                image = self._image(paid, events, outcome)
            except BaseException as error:
                self.dispatcher.dispatch(*events.lost(error, reply.task_id))
                raise
            self.dispatcher.dispatch(*events.made([image]))
        return [image]

    async def _afinish(self, paid: PaidReply, events: ImageEvents) -> list[GeneratedImage]:
        reply = paid.reply
        events.answered(reply.unasked_urls)
        with noting_lost_image(events.request_id, *reply.urls):
            try:
                # The thread saves the bytes even when the caller is cancelled: they cannot be downloaded again.
                outcome = None if reply.content is None else await in_thread(self._saved, reply.content, events)
                if reply.urls and not isinstance(outcome, DownloadedImage):
                    outcome = await self._afetched(reply.urls[0], events.deadline, events.label)
                image = self._image(paid, events, outcome)
            except BaseException as error:
                await self.dispatcher.adispatch(*events.lost(error, reply.task_id))
                raise
            await self.dispatcher.adispatch(*events.made([image]))
        return [image]

    def _saved(self, content: bytes, events: ImageEvents) -> DownloadedImage | CogViewError:
        """Save image bytes that were part of the reply.

        Returns:
            The image with its file, or the error.
        """
        try:
            return save_content(content, deadline=events.deadline, folder=self.settings.folder, label=events.label)
        except CogViewError as error:
            return error

    def _fetched(self, url: str, deadline: Deadline, label: str, retries: int | None = None) -> Download:
        if not self.settings.download:
            return None
        try:
            return fetch(sender(self.settings.base_url), url, **self._download_options(deadline, label, retries))
        except CogViewError as error:
            return error

    async def _afetched(self, url: str, deadline: Deadline, label: str, retries: int | None = None) -> Download:
        if not self.settings.download:
            return None
        running = running_task()
        task = None if running is None else weakref.ref(running)  # a strong one would keep an abandoned loop alive
        del running
        try:
            return await afetch(
                asender(self.settings.base_url), url, **self._download_options(deadline, label, retries)
            )
        except CogViewError as error:
            return error
        except Exception as error:
            if raised_by_signal(error) or not runs_in(task):
                raise
            # For example a server that refuses blocking calls on its event loop: a thread may block, and downloads are free.
            reason = f"{type(error).__name__}: {printable(str(error), 100)}"
            logger.warning("An image could not be downloaded on the event loop (%s). A thread downloads it.", reason)
            return await in_thread(self._fetched, url, deadline, label, retries)

    def _refetched(self, url: str) -> Download:
        return self._fetched(url, Deadline(_REFETCH_SECONDS), "", _REFETCH_RETRIES)

    async def _arefetched(self, url: str) -> Download:
        return await self._afetched(url, Deadline(_REFETCH_SECONDS), "", _REFETCH_RETRIES)

    def _download_options(self, deadline: Deadline, label: str, retries: int | None) -> dict[str, Any]:
        rules = LinkRules(self.settings.base_url, self.settings.allowed_hosts)
        folder = self.settings.folder
        return {"deadline": deadline, "folder": folder, "label": label, "rules": rules, "retries": retries}

    def _image(
        self, paid: PaidReply, events: ImageEvents, downloaded: DownloadedImage | CogViewError | None
    ) -> GeneratedImage:
        settings, request, reply = self.settings, paid.request, paid.reply
        url = reply.urls[0] if reply.urls else None
        notes = [*paid.notes, *reply.warnings]
        made: dict[str, Any] = {}
        content = None
        if isinstance(downloaded, DownloadedImage):
            made, content = downloaded.fields, downloaded.content
            if downloaded.problem:
                notes.append(unsaved_note(settings.folder, downloaded.problem))
        elif downloaded is not None:
            notes.append(f"{downloaded.message} {downloaded.hint}".strip())
            if url is None:
                content = reply.content
                notes.append("The bytes of the reply are in memory: image.save(path) writes them as they are.")
        amount, currency = settings.price(request.model)
        return with_content(
            GeneratedImage(
                id=events.label,
                url=url,
                expires_at=expires_at(url) if url else None,
                content_filter=reply.content_filter,
                request_id=events.request_id,
                response_id=reply.response_id,
                task_id=reply.task_id,
                created=reply.created,
                model=request.model,
                size=request.resolved_size,
                quality=request.resolved_quality,
                prompt=request.prompt,
                list_price=amount,
                cost=Decimal(0) if reply.sandbox else amount,
                currency=currency,
                seconds=round(events.deadline.elapsed, 3),
                sandbox=reply.sandbox,
                warnings=tuple(notes),
                **made,
            ),
            content,
            ImageAccess.of_generator(settings.base_url, settings.allowed_hosts, settings.folder),
        )


def _fallen_back(request: ImageRequest, refused: list[CogViewError]) -> tuple[str, ...]:
    if not refused:
        return ()
    why = f"code {refused[-1].code}" if refused[-1].code else type(refused[-1]).__name__
    return (f"The model that was asked for did not run ({why}); {request.model} made the image.",)


def _usage(cost: Decimal | None, currency: str | None, usd_per_cny: Decimal | None) -> dict[str, Any]:
    """Return the cost in the form that LangSmith adds up, which is in USD."""
    if cost is not None and currency == "CNY" and usd_per_cny is not None:
        cost, currency = cost * usd_per_cny, "USD"
    return {"usage_metadata": {"total_cost": float(cost)}} if cost is not None and currency == "USD" else {}


def _entries(outcome: ImageOutcome) -> Sequence[ContentFilter]:
    if isinstance(outcome, CogViewContentFilterError):
        return outcome.content_filter
    return () if isinstance(outcome, Exception) else [entry for image in outcome for entry in image.content_filter]
