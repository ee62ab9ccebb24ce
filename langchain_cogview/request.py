"""The arguments of a call and the settings of a generator: types, and checks before anything is sent."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from langchain_cogview.catalog import (
    DEFAULT_MODEL,
    ModelInfo,
    Quality,
    Region,
    is_unspecified,
    legal_size,
    model_info,
    model_warning,
    parse_quality,
    parse_size,
)
from langchain_cogview.concurrency import in_thread
from langchain_cogview.errors import CogViewConfigurationError, CogViewInvalidRequestError, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from decimal import Decimal

    import httpx
    from langchain_core.caches import BaseCache
    from langchain_core.rate_limiters import BaseRateLimiter

    from langchain_cogview.concurrency import Priority
    from langchain_cogview.images.backend import BackendFolder
    from langchain_cogview.images.folders import Backend
    from langchain_cogview.limits import SharedLimit

MAX_IMAGES: Final = 100
"""The largest number of images of one request."""
REQUEST_DEFAULTS: Final = ("model", "size", "quality", "n", "user_id", "watermark_enabled")
"""The arguments of a request for which a generator has defaults."""
_DAY = 86_400

UNSUPPORTED_ARGUMENTS: Final[dict[str, str]] = {
    "seed": "The endpoint takes no seed: the same prompt makes a different image each time. Set output_dir to keep an image.",
    "negative_prompt": "The endpoint takes no negative prompt: describe in the prompt what the image should show.",
    "response_format": "The endpoint always answers with a URL; the bytes are fetched for you: result.images[0].read().",
    "image": "The endpoint takes no reference image: describe the image in the prompt.",
    "style": "The endpoint takes no style: describe it in the prompt.",
    "user": "Pass the end user as user_id (6 to 128 characters).",
    "num_images": "Pass the number of images as n.",
    "width": "Pass width and height as size, such as '1344x768'.",
    "height": "Pass width and height as size, such as '1344x768'.",
    "aspect_ratio": "Pass the aspect ratio as size, such as '16:9' or 'portrait'.",
    "model_name": "Pass the model as model.",
    "watermark": "Pass watermark_enabled; false is only for accounts that signed the provider's waiver.",
    "request_timeout": "Pass the total time limit in seconds as timeout.",
    "temperature": "The endpoint takes no temperature.",
    "stream": "The endpoint does not stream an image in parts.",
}
"""Advice for each argument of other image APIs that this endpoint does not take."""
_PREDICATES: Final[dict[str, str]] = {
    "Field required": "is missing",
    "Input should be greater than or equal to ": "must be at least ",
    "Input should be less than or equal to ": "must be at most ",
    "Input should be ": "must be ",
    "String should have ": "must have ",
}
"""Beginnings of texts of pydantic, and what the error says of the argument instead."""


def unknown_argument(name: str, known: Iterable[str]) -> str:
    """The message about an argument that does not exist.

    Args:
        name: Name of the argument.
        known: Names of the arguments that exist.

    Returns:
        The message, which never has the argument's value.
    """
    shown = printable(str(name), 60)
    if name in UNSUPPORTED_ARGUMENTS:
        return f"There is no argument {shown!r}. {UNSUPPORTED_ARGUMENTS[name]}"
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known arguments: {', '.join(sorted(known))}."
    return f"There is no argument {shown!r}. {hint}"


def check_names(values: Iterable[str], known: Collection[str]) -> None:
    """Check that all arguments exist.

    Args:
        values: Names of the arguments.
        known: Names of the arguments that exist.

    Raises:
        CogViewConfigurationError: An argument does not exist. The message suggests a similar name.
    """
    for name in values:
        if name not in known:
            raise CogViewConfigurationError(unknown_argument(name, known))


def describe_validation(error: ValidationError) -> str:
    """Describe a pydantic error in one short line.

    Args:
        error: The error.

    Returns:
        Fields and messages, without the values and without pydantic's links.
    """
    lines = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            name = printable(str(item["loc"][-1]), 60)
            close = difflib.get_close_matches(name, ("prompt", "size", "quality"), n=1, cutoff=0.6)
            hint = UNSUPPORTED_ARGUMENTS.get(name) or (f"Did you mean {close[0]!r}?" if close else "")
            lines.append(f"There is no argument {name!r}. {hint}".rstrip())
            continue
        start = next((start for start in _PREDICATES if text.startswith(start)), None)
        if start and where:
            lines.append(f"{where} {_PREDICATES[start]}{text.removeprefix(start)}")
            continue
        lines.append(f"{where}: {text}" if where else text)
    text = "; ".join(lines)
    return text if text.endswith((".", "?")) else f"{text}."


def specified(value: Any, *, quality: bool) -> Any:
    """Interpret a size or a quality before it is validated.

    Args:
        value: The size or the quality.
        quality: Whether it is a quality, for which the words of other image APIs are accepted.

    Returns:
        None for `""`, `"auto"` and similar; `standard` or `hd` for a word that means one of them; else the value.
    """
    if not isinstance(value, str):
        return value
    if is_unspecified(value):
        return None
    return parse_quality(value) or value if quality else value


def checked_prompt(prompt: str, info: ModelInfo | None = None) -> str:
    """Check that a prompt can be sent.

    Args:
        prompt: What the image shows.
        info: The model that is called. None: the length is not checked.

    Returns:
        The prompt.

    Raises:
        ValueError: The prompt is blank, is not valid Unicode, or is longer than the model allows.
    """
    if not prompt.strip():
        raise ValueError("The prompt is blank. Describe the image.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("The prompt has half a character (a lone surrogate). Send valid Unicode text.") from None
    limit = info and info.max_prompt_characters
    if info and limit is not None and len(prompt) > limit:
        raise ValueError(f"The prompt has {len(prompt):,} characters; {info.name} takes at most {limit:,}. Shorten it.")
    return prompt


class ImageRequest(BaseModel):
    """The arguments of one call, validated against the catalog.

    Args:
        prompt: What the image shows; not blank, at most 1,000 characters for `glm-image`.
        model: Name of the model; case does not matter. An unknown model is accepted with a warning.
        size: `WIDTHxHEIGHT` in pixels (`×` works too), a ratio (`16:9`) or a word (`square`, `portrait`, `landscape`), which
            becomes the nearest legal size. None, `auto` or an empty text: the model's default.
        quality: `standard` or `hd`, as the model allows; the words of other image APIs (`high`, `medium`, `low`) are accepted.
            None, `auto` or an empty text: the model's default.
        n: The number of images, 1 to 100; each is one paid request. Default: 1.
        user_id: The end user, for the provider's abuse reports; 6 to 128 characters.
        watermark_enabled: False is only for accounts that signed the provider's waiver. None: the service's default (true).

    Raises:
        pydantic.ValidationError: An argument is illegal. The text has the rule, and the nearest legal size.

    Example:
        >>> ImageRequest(prompt="a kitten", size="16:9").size
        '1344x768'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())

    prompt: str
    """What the image shows."""
    model: str = Field(default=DEFAULT_MODEL, min_length=1, max_length=128)
    """Name of the model."""
    size: str | None = None
    """Size of the image, `WIDTHxHEIGHT` in pixels; None for the model's default."""
    quality: Quality | None = None
    """Quality of the image; None for the model's default."""
    n: int = Field(default=1, ge=1, le=MAX_IMAGES)
    """The number of images; each is one paid request."""
    user_id: str | None = Field(default=None, min_length=6, max_length=128)
    """The end user, for the provider's abuse reports."""
    watermark_enabled: bool | None = None
    """Whether the image has the provider's watermark; None for the service's default (true)."""

    _original_prompt: str | None = PrivateAttr(default=None)

    @property
    def original_prompt(self) -> str | None:
        """The prompt before a chat model rewrote it; None if it was not rewritten."""
        return self._original_prompt

    def rewritten(self, prompt: str) -> ImageRequest:
        """Copy the request with another prompt, and keep the original one.

        Args:
            prompt: The new prompt, which fits the model.

        Returns:
            The copy.
        """
        copied = self.model_copy(update={"prompt": prompt})
        copied._original_prompt = self._original_prompt or self.prompt  # noqa: SLF001  of the same class
        return copied

    @model_validator(mode="before")
    @classmethod
    def _name_unknown(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if name not in cls.model_fields:
                    raise ValueError(unknown_argument(name, cls.model_fields))
        return values

    @field_validator("size", "quality", mode="before")
    @classmethod
    def _unspecified_is_none(cls, value: Any, info: ValidationInfo) -> Any:
        return specified(value, quality=info.field_name == "quality")

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        return checked_prompt(prompt)

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: str) -> str:
        if not model.strip() or not model.isprintable():
            raise ValueError("The model's name is blank or not printable.")
        return model_info(model.strip()).name

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str | None, info: ValidationInfo) -> str | None:
        model = info.data.get("model")
        return size if size is None or model is None else legal_size(model_info(model), size)

    @field_validator("quality")
    @classmethod
    def _check_quality(cls, quality: Quality | None, info: ValidationInfo) -> Quality | None:
        model = info.data.get("model")
        if quality and model and quality not in model_info(model).qualities:
            raise ValueError(f"{model} accepts only quality {' and '.join(map(repr, model_info(model).qualities))}.")
        return quality

    @model_validator(mode="after")
    def _check_prompt_length(self) -> Self:
        checked_prompt(self.prompt, model_info(self.model))
        return self

    @property
    def resolved_size(self) -> str | None:
        """The size of the image: the requested size or the model's default; None where it is unknown."""
        return self.size or model_info(self.model).default_size

    @property
    def resolved_quality(self) -> Quality:
        """The quality of the image: the requested quality or the model's default."""
        return self.quality or model_info(self.model).qualities[0]

    def for_model(self, model: str) -> tuple[Self, tuple[str, ...]] | None:
        """Adapt the request to another model: an illegal size becomes the nearest legal one.

        Args:
            model: Name of the other model.

        Returns:
            The new request, and a note about each change; None if the prompt is too long for that model.
        """
        info = model_info(model)
        values = {name: getattr(self, name) for name in self.model_fields_set} | {"model": model}
        notes = []
        pixels = parse_size(self.size or "")
        if pixels and info.rule and self.size not in info.sizes and not info.rule.allows(*pixels):
            values["size"] = "{}x{}".format(*info.rule.nearest(*pixels))
            notes.append(f"{info.name} does not support {self.size}; the size {values['size']} was requested.")
        if self.quality and self.quality not in info.qualities:
            del values["quality"]
            notes.append(f"{info.name} does not support quality {self.quality!r}; {info.qualities[0]!r} was requested.")
        if info.max_prompt_characters is not None and len(self.prompt) > info.max_prompt_characters:
            return None
        return type(self)(**values), tuple(notes)

    def for_models(self, models: Iterable[str]) -> list[tuple[Self, tuple[str, ...]]]:
        """Adapt the request to several other models.

        Args:
            models: Names of the models; the model of this request is skipped.

        Returns:
            A request for each model that accepts the prompt, with a note about each change.
        """
        others = (self.for_model(model) for model in models if model != self.model)
        return [other for other in others if other]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the request, such as an unknown model."""
        warning = model_warning(self.model)
        return (warning,) if warning else ()


def checked_request(values: dict[str, Any]) -> ImageRequest:
    """Validate the arguments of a call.

    Args:
        values: The arguments by name.

    Returns:
        The request.

    Raises:
        CogViewInvalidRequestError: An argument is illegal. Nothing was sent.
    """
    problem = None
    try:
        return ImageRequest.model_validate(values)
    except ValidationError as error:
        problem = describe_validation(error)
    raise CogViewInvalidRequestError(f"Nothing was sent: {problem}", hint="")


ImageInput = str | dict[str, Any] | ImageRequest | PromptValue | BaseMessage | list[BaseMessage]
"""A prompt, the arguments of `ImageRequest`, or messages, whose text is the prompt."""


def _arguments(value: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    if isinstance(value, ImageRequest):
        return {name: getattr(value, name) for name in value.model_fields_set}, ()
    if isinstance(value, dict):
        if "prompt" not in value or isinstance(value["prompt"], str):
            return dict(value), ()
        text, notes = _text(value["prompt"])
        return {**value, "prompt": text}, notes
    text, notes = _text(value)
    return {"prompt": text}, notes


def _text(value: Any) -> tuple[str, tuple[str, ...]]:
    if isinstance(value, str):
        return value, ()
    if isinstance(value, PromptValue) and not isinstance(value, ChatPromptValue):
        return value.to_string(), ()
    messages = value.to_messages() if isinstance(value, PromptValue) else value
    if isinstance(messages, BaseMessage):
        return str(messages.text), ()
    if isinstance(messages, list | tuple) and messages and all(isinstance(item, BaseMessage) for item in messages):
        ignored = len(messages) - 1
        note = f"Only the text of the last message is the prompt; {ignored} before it were ignored." if ignored else ""
        return str(messages[-1].text), (note,) if note else ()
    raise CogViewInvalidRequestError(
        f"Nothing was sent: an input of type {type(value).__name__} has no prompt.",
        hint="Pass a string, a dict with the key 'prompt', an ImageRequest, a prompt value, or messages.",
    )


def request_of(value: Any, defaults: dict[str, Any]) -> tuple[ImageRequest, tuple[str, ...]]:
    """Make the request of an input.

    Args:
        value: An `ImageInput`.
        defaults: Arguments that apply where the input has none.

    Returns:
        The request, and warnings about it.

    Raises:
        CogViewInvalidRequestError: An argument is illegal. Nothing was sent.
    """
    arguments, notes = _arguments(value)
    values = defaults | arguments
    if "prompt" not in values:
        raise CogViewInvalidRequestError(
            "Nothing was sent: there is no prompt.", hint="Pass a string, or a dict with the key 'prompt'."
        )
    request = checked_request(values)
    return request, request.warnings + notes


class GeneratorSettings(TypedDict, total=False):
    """The arguments of `CogViewImageGenerator`, whose docstring describes each of them."""

    model: str
    api_key: SecretStr | str | None
    region: Region | None
    base_url: str | None
    size: str | None
    quality: str | None
    n: int
    user_id: str | None
    watermark_enabled: bool | None
    timeout: float | timedelta | None
    max_retries: int
    retry_unknown: bool
    max_concurrency: int | None
    max_concurrency_per_user: int | None
    priority: Priority | None
    shared_limit: SharedLimit | str | None
    rate_limiter: BaseRateLimiter | None
    http_client: httpx.Client | Any
    http_async_client: httpx.AsyncClient | Any
    fallback_models: str | Sequence[str]
    use_tasks: Literal["auto"] | bool
    poll_interval: float
    prices: Mapping[str, Decimal | float | str] | None
    usd_per_cny: Decimal | float | str | None
    download: bool
    output_dir: Path | str | Backend | BackendFolder | None
    storage_options: Mapping[str, Any] | None
    cache: BaseCache | Path | str | None
    allowed_image_hosts: str | Sequence[str] | None
    enhance: Any
    include_prompt_in_events: bool


def checked_seconds(value: float | timedelta | None) -> float | None:
    """Check a time limit.

    Args:
        value: The time limit, in seconds if it is a number; None for no limit.

    Returns:
        Seconds; None for no limit.

    Raises:
        ValueError: The time limit is not more than 0, or more than a day.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if seconds is not None and not 0 < seconds <= _DAY:
        raise ValueError(
            "A time limit is a number of seconds, more than 0 and at most 86,400 (a day), or None for none."
        )
    return seconds


def as_tuple(value: Any) -> Any:
    """Return a single text as a tuple of it, and every other value as it is."""
    return (value,) if isinstance(value, str) else value


def checked_hosts(hosts: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Check the entries of `allowed_image_hosts`; a ValueError says which one is not a host.

    Returns:
        The entries as they were passed.
    """
    if hosts:
        from langchain_cogview.addresses import allowed_host  # noqa: PLC0415  the HTTP stack

        for entry in hosts:
            allowed_host(entry)
    return hosts


def checked_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Check the settings of a generator that depend on each other or on the catalog.

    Args:
        settings: The settings by name, each of the right type.

    Returns:
        Warnings about the models.

    Raises:
        ValueError: A setting is illegal, or excludes another one.
    """
    problem = None
    try:
        request = ImageRequest(prompt="-", **{name: settings[name] for name in REQUEST_DEFAULTS})
    except ValidationError as error:
        problem = describe_validation(error)
    if problem:
        raise ValueError(problem)
    if not settings["download"] and settings["output_dir"] is not None:
        raise ValueError("output_dir needs the bytes of the image: remove download=False.")
    if settings["storage_options"] and not isinstance(settings["output_dir"], str):
        raise ValueError(
            "storage_options are for an output_dir that is a URL, such as 's3://bucket/images': leave them out."
        )
    models = (settings["model"], *settings["fallback_models"])
    if settings["use_tasks"] is True and not all(model_info(name).tasks for name in models):
        raise ValueError("use_tasks=True needs a model that can make images as tasks, such as 'glm-image'.")
    return filter(None, (*request.warnings, *map(model_warning, settings["fallback_models"])))


def check_picklable(settings: Mapping[str, Any], excluded: Collection[str]) -> None:
    """Check that a generator can be made again in another process.

    Args:
        settings: Its settings by name.
        excluded: Names of the settings that are objects of this process, or secrets, unless they are text or a path.

    Raises:
        TypeError: It cannot. The message names these settings.
    """
    fields = (name for name in settings if name in excluded or name == "output_dir")  # which can be a backend
    held = [name for name in fields if not isinstance(settings[name], str | Path | None)]
    if "shared_limit" not in held and "@" in (settings["shared_limit"] or ""):  # it may hold a password
        held.append("shared_limit")
    if held:
        raise TypeError(f"A generator with {' and '.join(held)} cannot be pickled: make it in the other process.")


@dataclass
class FolderCheck:
    """Checks at the first call of a generator, before anything is paid, that `output_dir` is not a file.

    Whether the folder can be written to is found out when an image is saved.

    Attributes:
        output_dir: The folder, which need not exist. A URL and None are not checked.
        is_done: Whether nothing is left to check.
    """

    output_dir: Path | str | BackendFolder | None
    is_done: bool = field(default=False, compare=False)

    def run(self) -> None:
        """Check the folder, unless that is done.

        Raises:
            CogViewConfigurationError: It exists and is not a folder. Nothing was sent.
        """
        if not self.is_done and isinstance(self.output_dir, Path):
            try:
                is_file = not S_ISDIR(self.output_dir.stat().st_mode)
            except OSError:
                is_file = False
            if is_file:
                raise CogViewConfigurationError(
                    f"output_dir ({printable(str(self.output_dir), 120)}) is a file, not a folder. Nothing was sent.",
                    hint="Pass the path of a folder, which is made when it is missing.",
                )
            self.is_done = True

    async def arun(self) -> None:
        """Async version of `run`."""
        if not self.is_done and isinstance(self.output_dir, Path):
            await in_thread(self.run)
