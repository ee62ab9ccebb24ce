"""Makes images for the MCP server: each paid request is recorded, goes on whatever becomes of the call, and is found again."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from langchain_cogview.answers import answer
from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.budget import JOURNAL, Budget
from langchain_cogview.concurrency import in_thread
from langchain_cogview.errors import (
    CogViewConfigurationError,
    CogViewContentFilterError,
    CogViewError,
    CogViewOutcomeUnknownError,
    CogViewTaskUnfinishedError,
    Outcome,
    error_class,
    printable,
    read_entries,
)
from langchain_cogview.images.remote import ImageAccess
from langchain_cogview.jobs.items import PromptItem
from langchain_cogview.jobs.manifest import failure_record, image_record, manifest_record, now
from langchain_cogview.jobs.plan import price_of
from langchain_cogview.mcp.records import Request, ServerFolder, ServerRecords
from langchain_cogview.pending import PendingImage, PendingImages, UnknownImageError
from langchain_cogview.request import ImageRequest, describe_validation
from langchain_cogview.result import GeneratedImage, ImageFailure, ImageResult
from langchain_cogview.tasks import ImageTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from decimal import Decimal

    from langchain_cogview.tool import CogViewImageTool

JOIN_SECONDS: Final = 5.0
"""Age in seconds from which an equal call belongs to an image that is being made: before, it is one of several parallel calls."""
REMEMBER_SECONDS: Final = 3600.0
"""How long an image that no call was answered with waits for an equal call, in seconds."""
OWNER: Final = "this folder"
logger = logging.getLogger(__name__)


def unknown_image(image_id: str) -> UnknownImageError:
    """Make the error of an id that no image has.

    Args:
        image_id: The id, which is not trusted.

    Returns:
        The error.
    """
    return UnknownImageError(
        f"No image with the id {printable(image_id, 40)!r} was paid for in this folder.",
        hint="list_images says which ids there are; it is free.",
    )


class ServerImage(PendingImage):
    """An image that a call of this server has started, or that an earlier server had paid for.

    Attributes:
        arguments: Prompt, model, size and quality; equal calls are recognised by them.
        waiting: The number of calls that wait for it.
        started: When it was started, by the monotonic clock.
    """

    def __init__(self, arguments: dict[str, Any], image_id: str | None = None) -> None:
        super().__init__(arguments["prompt"])
        self.arguments = arguments
        self.waiting = 0
        self.started = time.monotonic()
        if image_id:
            self.id = image_id
        self.key = self.id
        """The id of its records, which does not change."""


class _Call:
    """Records what one paid request sends: a journal of the generator."""

    def __init__(self, images: ServerImages, image: ServerImage) -> None:
        self._images = images
        self._request = Request(image.key, image.arguments)
        self.sent: tuple[str, ...] = ()

    def sending(self, request_id: str, model: str) -> None:
        self._images.records.claim(self._request, request_id, model, partial(self._images.check_spent, model=model))
        self.sent = (request_id,)

    async def asending(self, request_id: str, model: str) -> None:
        await in_thread(self.sending, request_id, model)

    def not_sent(self, request_id: str, model: str) -> None:
        self._note({"request_id": request_id, "settled": str(Outcome.NOT_RUN)})
        self.sent = ()

    async def anot_sent(self, request_id: str, model: str) -> None:
        await in_thread(self.not_sent, request_id, model)

    def submitted(self, request_id: str, task_id: str, model: str) -> None:
        self._note({"request_id": request_id, "task_id": task_id, "model": model})

    async def asubmitted(self, request_id: str, task_id: str, model: str) -> None:
        await in_thread(self.submitted, request_id, task_id, model)

    def _note(self, values: dict[str, Any]) -> None:
        self._images.records.locked[0].note({"key": self._request.image_id, **values})


class ServerImages(PendingImages):
    """The images of one server and its folder. Thread-safe. Methods block where they do not say otherwise.

    Args:
        tool: The tool whose generator and limits are used. Its generator saves in a folder of this machine.

    Raises:
        CogViewConfigurationError: The records in the folder are damaged, or too many servers use it.
        CogViewStorageError: The folder cannot be written.
    """

    def __init__(self, tool: CogViewImageTool) -> None:
        super().__init__(tool)
        self.tool = tool
        self.folder = Path(str(tool.generator.output_dir)).absolute()
        self.sandbox = is_sandbox(tool.generator.resolved_base_url)
        generator = tool.generator
        self._access = ImageAccess(generator.resolved_base_url, generator.allowed_image_hosts)
        self.records = ServerRecords(self.folder, sandbox=self.sandbox)
        self._counted: Counter[str] = Counter()
        self._unanswered: dict[tuple[Any, ...], list[ServerImage]] = {}
        self._starting = threading.Lock()
        try:
            for folder in self.records.locked:
                self._resume(folder)
            self.limits()
        except BaseException:
            self.records.close()
            raise

    @property
    def tasks_generator(self) -> None:
        """None: a task is collected by this process too, so that its image is saved whether or not a client asks for it."""
        return None

    # --- limits

    def limits(self) -> Budget:
        """The limits of the folder, with what all servers have spent.

        Returns:
            A budget.
        """
        budget = self.tool.limits()
        others = sum((item.spent() for item in self.records.others()), Counter())
        with self._starting:
            if not self._counted.get(""):  # what was spent before this process began
                self._counted[""] = 1
                for model, count in sum((item.spent() for item in self.records.locked), Counter()).items():
                    budget.commit(price_of(self.tool.generator, model), count)
            for model in {*others, *self._counted} - {""}:
                change = others[model] - self._counted[model]
                if change:
                    # A negative number is subtracted.
                    budget.commit(price_of(self.tool.generator, model), change)
            self._counted = Counter({"": 1, **others})
        budget.owner = OWNER
        return budget

    def check_spent(self, spent: Counter[str], *, model: str) -> None:
        """Refuse a paid request that the limits do not cover, by what the records of all servers have.

        Args:
            spent: What was paid for, or may have been, by model.
            model: The model that is asked now.

        Raises:
            CogViewBudgetError: It is not covered.
        """
        budget = Budget(self.tool.budget, max_images=self.tool.max_images, owner=OWNER)
        for paid, count in spent.items():
            budget.commit(price_of(self.tool.generator, paid), count)
        budget.reserve(price_of(self.tool.generator, model))

    # --- starting

    def identity(self, prompt: str, size: str | None, quality: str | None) -> dict[str, Any]:
        """Resolve the arguments of a call, by which equal calls are recognised.

        Args:
            prompt: The prompt.
            size: The size; None for the default.
            quality: The quality; None for the default.

        Returns:
            Prompt, model, size and quality as they are sent.

        Raises:
            CogViewInvalidRequestError: An argument is illegal.
        """
        estimate = self.tool.estimate(prompt, size, quality)
        return {"prompt": prompt, "model": estimate.model, "size": estimate.size, "quality": estimate.quality}

    def unanswered(self, arguments: Mapping[str, Any]) -> ServerImage | None:
        """Find an image with which no call was answered, for a call that asks for the same again.

        A client that ends a call, or loses its connection, often sends the call again: that must not be paid again. Several
        equal calls that come at the same time are meant, and get an image each.

        Args:
            arguments: What `identity` returns.

        Returns:
            The image; None if a new one is to be made.
        """
        with self._lock:
            images = self._unanswered.get(tuple(arguments.values()), [])
            images[:] = [item for item in images if not self._is_settled(item)]
            for image in images:
                if not image.waiting or time.monotonic() - image.started > JOIN_SECONDS:
                    image.waiting += 1
                    return image
        return None

    def _is_settled(self, image: ServerImage) -> bool:
        failed = image.result.done() and image.result.exception() is not None
        return image.is_collected or failed or time.monotonic() - image.started > REMEMBER_SECONDS

    def begin(self, arguments: dict[str, Any]) -> ServerImage:
        """Start an image in the background.

        Args:
            arguments: What `identity` returns.

        Returns:
            The image, with one call that waits for it.
        """
        image = ServerImage(arguments)
        image.waiting = 1
        with self._lock:
            self._unanswered.setdefault(tuple(arguments.values()), []).append(image)
            if len(self._unanswered) > _MAX_UNANSWERED:
                self._forget_unanswered()
        request = {name: value for name, value in arguments.items() if value is not None and name != "model"}
        make = self.work(image, request, {}, self.limits())
        self.run(image, partial(self._recorded, image, make))
        return image

    def _forget_unanswered(self) -> None:
        for key in list(self._unanswered):
            if all(map(self._is_settled, self._unanswered[key])):
                del self._unanswered[key]

    def _recorded(self, image: ServerImage, make: Callable[[], Any]) -> ImageResult:
        """Return the result of making an image, after recording how it ended."""
        call = _Call(self, image)
        token = JOURNAL.set(call)
        try:
            result: ImageResult = make()
        except Exception as error:
            self._record_failure(image, call.sent, error)
            raise
        finally:
            JOURNAL.reset(token)
        return self._record_result(self.records.locked[0], image, result, call.sent)

    def _record_result(
        self, folder: ServerFolder, image: ServerImage, result: ImageResult, sent: tuple[str, ...]
    ) -> ImageResult:
        try:
            _, artifact = answer(result, "text", shown_to_user=False)  # an image that is in memory only is saved
            result = ImageResult.read_artifact(artifact, self._access)  # which may be in a temporary folder
            records = [image_record(item, item.path.name if item.path else f"{item.id}.link") for item in result.images]
            values = self._record(image, records, [], [*sent, *(item.request_id for item in result.images)])
            folder.note_ended({**values, "artifact": artifact, "is_answered": image.waiting > 0})
        except (CogViewError, OSError, ValidationError) as error:  # the image is paid for, and its request is recorded
            logger.warning("The end of image %s could not be recorded: %s", image.key, error)
        return result

    def _record_failure(self, image: ServerImage, sent: tuple[str, ...], error: Exception) -> None:
        unknown = not isinstance(error, CogViewError) or error.outcome is Outcome.UNKNOWN
        if not sent or unknown:  # a request of unknown outcome stays open: it counts as spent
            return
        failure = failure_record(ImageFailure.of(error, 0), image.arguments["model"])
        with contextlib.suppress(CogViewError, OSError):
            self.records.locked[0].note_ended(self._record(image, [], [failure], list(sent)))

    def _record(
        self, image: ServerImage, images: list[dict[str, Any]], failures: list[dict[str, Any]], sent: list[str]
    ) -> dict[str, Any]:
        arguments = {name: value for name, value in image.arguments.items() if value is not None}
        request = ImageRequest.model_validate(arguments)
        item = PromptItem(0, image.key, arguments, None, request.model, 1)
        currency = price_of(self.tool.generator, request.model).currency
        values = manifest_record(item, request, images, failures, currency, unknown=False, sandbox=self.sandbox)
        return {
            **values,
            "given_up": [],
            "request_ids": list(dict.fromkeys(sent)),
            "seconds": round(time.monotonic() - image.started, 3),
            "finished": now(),
        }

    # --- what earlier servers have paid for

    def _resume(self, folder: ServerFolder) -> None:
        """Record the images that a server that has ended had saved, and go on with its tasks."""
        generator = self.tool.generator

        def price(model: str) -> Decimal | None:
            return price_of(generator, model).amount

        for sent, found, record in list(self.records.recover(folder, price, sandbox=self.sandbox)):
            image = self._image_of(sent)
            with self._refusing_damage(folder, sent):
                made = GeneratedImage.model_validate(
                    {**record, "id": sent["request_id"][:8], "prompt": sent["prompt"], "path": self.folder / found.file}
                    | {
                        "list_price": price(found.attempt.model),
                        "currency": price_of(generator, found.attempt.model).currency,
                    }
                    | {"size": sent.get("size"), "quality": sent.get("quality")}
                )
            result = ImageResult(
                images=(made,),
                failures=(),
                prompt=sent["prompt"],
                model=made.model,
                size=made.size,
                quality=made.quality,
                cost=made.cost,
                currency=made.currency,
                sandbox=self.sandbox,
                warnings=(),
            )
            image.result.set_result(self._record_result(folder, image, result, (sent["request_id"],)))
            image.announce()
            self._remember_unanswered(image)
        for key in list(folder.sent):
            request = folder.open_request(key)
            if request and request["task_id"]:
                self._collect_task(folder, request)
        for record in folder.latest(_LATEST):
            if record.get("is_answered") is False and "artifact" in record and _is_recent(record):
                image = self._image_of({**record["arguments"], "key": record["key"], "request_id": ""})
                with contextlib.suppress(CogViewError):
                    image.result.set_result(self.read(record))
                    image.announce()
                    self._remember_unanswered(image)

    @contextlib.contextmanager
    def _refusing_damage(self, folder: ServerFolder, sent: Mapping[str, Any]) -> Iterator[None]:
        # The records have the right types, but their values may be those of no request.
        try:
            yield
        except ValidationError as error:
            raise CogViewConfigurationError(
                f"The record of the image {printable(sent['key'], 40)} in {printable(str(folder.folder.path), 120)} is damaged: "
                f"{printable(describe_validation(error), 120)} Nothing was sent.",
                hint="Delete its lines, or restore them.",
            ) from None

    def _image_of(self, sent: Mapping[str, Any]) -> ServerImage:
        arguments = {name: sent.get(name) for name in ("prompt", "model", "size", "quality")}
        return ServerImage(arguments, sent["key"])

    def _remember_unanswered(self, image: ServerImage) -> None:
        self.remember(image, image.key)
        self._unanswered.setdefault(tuple(image.arguments.values()), []).append(image)

    def _collect_task(self, folder: ServerFolder, sent: Mapping[str, Any]) -> ServerImage:
        image = self._image_of(sent)
        arguments = {name: value for name, value in image.arguments.items() if value is not None}
        with self._refusing_damage(folder, sent):
            request = ImageRequest.model_validate(arguments)
        task = ImageTask(sent["task_id"], generator=self.tool.generator, request=request, request_id=sent["request_id"])
        image.announce()

        def collect() -> ImageResult:
            result = task.result(timeout=self.tool.generator.timeout)
            return self._record_result(folder, image, result, (sent["request_id"],))

        self._remember_unanswered(image)
        self.run(image, collect)
        self.remember(image, image.key, sent["request_id"][:8])
        return image

    def read(self, record: Mapping[str, Any]) -> ImageResult:
        """Read the result of an image from its record.

        Args:
            record: A record with an artifact.

        Returns:
            The result.

        Raises:
            CogViewInvalidRequestError: The record is damaged.
        """
        # Another program may have written it: no file outside the folder is read.
        return ImageResult.read_artifact(record["artifact"], replace(self._access, within=self.folder))

    # --- finding

    def look_up(self, image_id: str) -> ServerImage | ImageResult | None:
        """Find an image by its id.

        Args:
            image_id: The id, which is not trusted.

        Returns:
            An image of this process, or the result of one that was made before; None while another server makes it.

        Raises:
            CogViewError: No image was made, or none has this id.
        """
        with self._lock:
            image = self._images.get(image_id)
        if isinstance(image, ServerImage) and not (image.result.done() and _is_unfinished(image.result.exception())):
            return image
        for folder in self.records.all():
            record = folder.ended(image_id)
            if record is not None:
                if "artifact" in record:
                    return self.read(record)
                raise _error_of(record)
            sent = folder.open_request(image_id)
            if sent is not None:
                return self._open(folder, sent)
        raise unknown_image(image_id)

    def _open(self, folder: ServerFolder, sent: dict[str, Any]) -> ServerImage | None:
        """Return what becomes of a request that has no end in the records; None while another server works on it."""
        if not folder.is_own:
            for adopted in self.records.adopt():  # that server has ended in the meantime
                self._resume(adopted)
                if adopted.folder.path == folder.folder.path:
                    return self._after(adopted, sent)
            return None
        return self._after(folder, sent)

    def _after(self, folder: ServerFolder, sent: dict[str, Any]) -> ServerImage:
        with self._lock:
            image = self._images.get(sent["key"])
        if isinstance(image, ServerImage) and not (image.result.done() and _is_unfinished(image.result.exception())):
            return image
        if sent["task_id"]:
            return self._collect_task(folder, sent)
        raise CogViewOutcomeUnknownError(
            "The server that asked for this image ended before the answer arrived; the image may have been made and charged.",
            request_id=sent["request_id"],
        )

    def listed(self, limit: int) -> list[dict[str, Any]]:
        """List the newest images.

        Args:
            limit: The largest number.

        Returns:
            Records, the newest first: those of the manifests, and those of requests without an end.
        """
        records = [record for folder in self.records.all() for record in folder.latest(limit)]
        records.sort(key=lambda record: record.get("finished") or record.get("at") or "", reverse=True)
        return records[:limit]

    def busy(self) -> list[PendingImage]:
        """Return the images of this process that are being made."""
        with self._lock:
            return [image for image in dict.fromkeys(self._images.values()) if not image.result.done()]

    def joined(self, image: ServerImage) -> ServerImage:
        """Count a further call that waits for an image, until `leave`.

        Args:
            image: The image.

        Returns:
            The image.
        """
        with self._lock:
            image.waiting += 1
        return image

    def leave(self, image: ServerImage) -> None:
        """End the count of a call that waits for an image.

        Args:
            image: The image.
        """
        with self._lock:
            image.waiting -= 1

    @contextlib.contextmanager
    def waiting_for(self, image: ServerImage) -> Iterator[None]:
        """End the count of a call that waits for an image when the block ends.

        Yields:
            Nothing.
        """
        try:
            yield
        finally:
            self.leave(image)


_MAX_UNANSWERED: Final = 1000
_LATEST: Final = 100


def _is_unfinished(error: BaseException | None) -> bool:
    return isinstance(error, CogViewTaskUnfinishedError)


def _is_recent(record: Mapping[str, Any]) -> bool:
    limit = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - REMEMBER_SECONDS))
    return str(record["finished"]) > limit


def _error_of(record: Mapping[str, Any]) -> CogViewError:
    """Return the error of an image that was not made, from its record."""
    failure = record["failures"][0] if record["failures"] else {"error": "", "message": "No image was made."}
    kind = error_class(failure["error"]) or CogViewError
    facts: dict[str, Any] = {name: failure.get(name) for name in ("code", "status", "request_id")}
    if failure.get("content_filter") and issubclass(kind, CogViewContentFilterError):
        facts["content_filter"] = read_entries(failure["content_filter"])
    return kind(failure["message"], **facts)
