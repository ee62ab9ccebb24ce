"""The arguments of one call: validated against the catalog before anything is sent."""

from __future__ import annotations

import difflib
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict

from langchain_core.messages import BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
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
from langchain_cogview.errors import CogViewConfigurationError, CogViewInvalidRequestError, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from decimal import Decimal
    from pathlib import Path

    import httpx
    from langchain_core.caches import BaseCache
    from langchain_core.rate_limiters import BaseRateLimiter

MAX_PICTURES: Final = 100
REQUEST_DEFAULTS: Final = ("model", "size", "quality", "n", "user_id", "watermark_enabled")
"""The arguments of a request that a generator has defaults for."""
_DAY = 86_400

NOT_TAKEN: Final[dict[str, str]] = {
    "seed": "The endpoint takes no seed: the same prompt gives another picture each time. Keep what you like with output_dir.",
    "negative_prompt": "The endpoint takes no negative prompt: say in the prompt what the picture should show.",
    "response_format": "The endpoint always answers with a URL; the bytes are fetched for you: result.images[0].read().",
    "image": "The endpoint takes no reference image: describe the picture in the prompt.",
    "style": "The endpoint takes no style: describe it in the prompt.",
    "user": "The end user goes into user_id (6 to 128 characters).",
    "num_images": "The number of pictures is n.",
    "width": "Width and height go into size, such as '1344x768'.",
    "height": "Width and height go into size, such as '1344x768'.",
    "aspect_ratio": "The aspect ratio goes into size, such as '16:9' or 'portrait'.",
    "model_name": "The model goes into model.",
    "watermark": "The watermark is watermark_enabled; false only for accounts that signed the provider's waiver.",
    "request_timeout": "The total time limit is timeout, in seconds.",
    "temperature": "The endpoint takes no temperature.",
    "stream": "The endpoint does not stream: a picture comes whole.",
}
"""What people try, and what to say to it."""


def unknown_argument(name: str, known: Iterable[str]) -> str:
    """What to tell somebody who passed an argument that does not exist. Never shows the argument's value."""
    shown = printable(str(name), 60)
    if name in NOT_TAKEN:
        return f"There is no argument {shown!r}. {NOT_TAKEN[name]}"
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(sorted(known))}."
    return f"There is no argument {shown!r}. {hint}"


def check_names(values: Iterable[str], known: Collection[str]) -> None:
    """Refuse an argument that does not exist.

    Raises:
        CogViewConfigurationError: Names the first one, and what was perhaps meant.
    """
    for name in values:
        if name not in known:
            raise CogViewConfigurationError(unknown_argument(name, known))


def describe_validation(error: ValidationError) -> str:
    """A pydantic error as one short line: field and message, without the values and pydantic's links."""
    lines = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            name = printable(str(item["loc"][-1]), 60)
            lines.append(f"There is no argument {name!r}." + (f" {NOT_TAKEN[name]}" if name in NOT_TAKEN else ""))
            continue
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(lines)


def specified(value: Any, *, quality: bool) -> Any:
    """A size or a quality as it was meant, before it is validated.

    Args:
        value: What somebody gave.
        quality: Whether it is a quality, whose words in other image APIs are known.

    Returns:
        None for `""`, `"auto"` and their like; `standard` or `hd` for a word for one; else the value.
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
        info: The model that is asked; None: any.

    Returns:
        The prompt.

    Raises:
        ValueError: When it is blank, is not valid Unicode, or is longer than the model allows.
    """
    if not prompt.strip():
        raise ValueError("The prompt is blank. Describe the picture.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("The prompt holds half a character (a lone surrogate). Send valid Unicode text.") from None
    limit = info and info.max_prompt_characters
    if info and limit is not None and len(prompt) > limit:
        raise ValueError(f"The prompt has {len(prompt):,} characters; {info.name} takes at most {limit:,}. Shorten it.")
    return prompt


class ImageRequest(BaseModel):
    """One request for pictures.

    Args:
        prompt: What the picture shows; not blank, at most 1,000 characters for `glm-image`.
        model: The model's name; case is ignored. An unknown one passes, with a warning.
        size: `WIDTHxHEIGHT` in pixels (`×` works too), a ratio (`16:9`) or a word (`square`, `portrait`, `landscape`);
            becomes the nearest legal size. None, `auto` or an empty text: the model's default.
        quality: `standard` or `hd`, as the model allows; the words of other image APIs work too (`high`, `medium`, `low`).
            None, `auto` or an empty text: the model's default.
        n: How many pictures; each is one call, and one price.
        user_id: The end user, for the provider's abuse reports; 6 to 128 characters.
        watermark_enabled: False only for accounts that signed the provider's waiver. None: the service's default (true).

    Raises:
        pydantic.ValidationError: With the rule, and the nearest legal size where it is the size.

    Example:
        >>> ImageRequest(prompt="a kitten", size="16:9").size
        '1344x768'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())

    prompt: str
    model: str = Field(default=DEFAULT_MODEL, min_length=1, max_length=128)
    size: str | None = None
    quality: Quality | None = None
    n: int = Field(default=1, ge=1, le=MAX_PICTURES)
    user_id: str | None = Field(default=None, min_length=6, max_length=128)
    watermark_enabled: bool | None = None

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
    def _prompt_says_something(cls, prompt: str) -> str:
        return checked_prompt(prompt)

    @field_validator("model")
    @classmethod
    def _model_as_documented(cls, model: str) -> str:
        if not model.strip() or not model.isprintable():
            raise ValueError("The model's name is blank or not printable.")
        return model_info(model.strip()).name

    @field_validator("size")
    @classmethod
    def _size_is_legal(cls, size: str | None, info: ValidationInfo) -> str | None:
        model = info.data.get("model")
        return size if size is None or model is None else legal_size(model_info(model), size)

    @field_validator("quality")
    @classmethod
    def _quality_is_legal(cls, quality: Quality | None, info: ValidationInfo) -> Quality | None:
        model = info.data.get("model")
        if quality and model and quality not in model_info(model).qualities:
            raise ValueError(f"{model} knows only quality {' and '.join(map(repr, model_info(model).qualities))}.")
        return quality

    @model_validator(mode="after")
    def _prompt_fits(self) -> Self:
        checked_prompt(self.prompt, model_info(self.model))
        return self

    @property
    def resolved_size(self) -> str | None:
        """The size that will be drawn: the one asked for, else the model's default; None where unknown."""
        return self.size or model_info(self.model).default_size

    @property
    def resolved_quality(self) -> Quality:
        """The quality that will be drawn: the one asked for, else the model's default."""
        return self.quality or model_info(self.model).qualities[0]

    def for_model(self, model: str) -> tuple[Self, tuple[str, ...]] | None:
        """The same request for another model, and what had to change: a size becomes the nearest legal one.

        Returns:
            None where the prompt is too long for that model.
        """
        info = model_info(model)
        values = {name: getattr(self, name) for name in self.model_fields_set} | {"model": model}
        notes = []
        pixels = parse_size(self.size or "")
        if pixels and info.rule and self.size not in info.sizes and not info.rule.allows(*pixels):
            values["size"] = "{}x{}".format(*info.rule.nearest(*pixels))
            notes.append(f"{info.name} does not draw {self.size}; {values['size']} was asked for.")
        if self.quality and self.quality not in info.qualities:
            del values["quality"]
            notes.append(f"{info.name} does not know quality {self.quality!r}; {info.qualities[0]!r} was asked for.")
        if info.max_prompt_characters is not None and len(self.prompt) > info.max_prompt_characters:
            return None
        return type(self)(**values), tuple(notes)

    def for_models(self, models: Iterable[str]) -> list[tuple[Self, tuple[str, ...]]]:
        """The same request for each of some other models that can take it.

        Args:
            models: Their names; this request's own is passed over.

        Returns:
            The requests, each with what had to change.
        """
        others = (self.for_model(model) for model in models if model != self.model)
        return [other for other in others if other]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the sender should know, such as an unknown model."""
        warning = model_warning(self.model)
        return (warning,) if warning else ()


def checked_request(values: dict[str, Any]) -> ImageRequest:
    """Validate the arguments of a call.

    Raises:
        CogViewInvalidRequestError: With field and rule; nothing has been sent.
    """
    problem = None
    try:
        return ImageRequest.model_validate(values)
    except ValidationError as error:
        problem = describe_validation(error)
    raise CogViewInvalidRequestError(f"Nothing was sent: {problem}", hint="")


ImageInput = str | dict[str, Any] | ImageRequest | PromptValue | BaseMessage | list[BaseMessage]
"""A prompt, the arguments of `ImageRequest`, or messages, whose text is the prompt."""


def arguments_of(given: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments that an input says, and what was left out of it."""
    if isinstance(given, ImageRequest):
        return {name: getattr(given, name) for name in given.model_fields_set}, ()
    if isinstance(given, dict):
        if "prompt" not in given or isinstance(given["prompt"], str):
            return dict(given), ()
        text, notes = _text(given["prompt"])
        return {**given, "prompt": text}, notes
    text, notes = _text(given)
    return {"prompt": text}, notes


def _text(given: Any) -> tuple[str, tuple[str, ...]]:
    if isinstance(given, str):
        return given, ()
    if isinstance(given, PromptValue) and not isinstance(given, ChatPromptValue):
        return given.to_string(), ()
    messages = given.to_messages() if isinstance(given, PromptValue) else given
    if isinstance(messages, BaseMessage):
        return str(messages.text), ()
    if isinstance(messages, list | tuple) and messages and all(isinstance(each, BaseMessage) for each in messages):
        left_out = len(messages) - 1
        note = (
            f"Only the text of the last message is the prompt; {left_out} before it were left out." if left_out else ""
        )
        return str(messages[-1].text), (note,) if note else ()
    raise CogViewInvalidRequestError(
        f"Nothing was sent: a prompt cannot be made of {type(given).__name__}.",
        hint="Pass a string, a dict with the key 'prompt', an ImageRequest, a prompt value, or messages.",
    )


def request_of(given: Any, defaults: dict[str, Any]) -> tuple[ImageRequest, tuple[str, ...]]:
    """The request that an input makes.

    Args:
        given: An `ImageInput`.
        defaults: Arguments that hold where the input names none.

    Returns:
        The request, and warnings about it.

    Raises:
        CogViewInvalidRequestError: An argument is illegal; nothing has been sent.
    """
    arguments, notes = arguments_of(given)
    values = defaults | arguments
    if "prompt" not in values:
        raise CogViewInvalidRequestError(
            "Nothing was sent: there is no prompt.", hint="Pass a string, or a dict with the key 'prompt'."
        )
    request = checked_request(values)
    return request, request.warnings + notes


class GeneratorSettings(TypedDict, total=False):
    """The arguments of `CogViewImageGenerator`; its docstring says what each of them does."""

    model: str
    api_key: SecretStr | str | None
    region: Region | None
    base_url: str | None
    size: str | None
    quality: Quality | None
    n: int
    user_id: str | None
    watermark_enabled: bool | None
    timeout: float | timedelta | None
    max_retries: int
    retry_unknown: bool
    max_concurrency: int | None
    rate_limiter: BaseRateLimiter | None
    http_client: httpx.Client | Any
    http_async_client: httpx.AsyncClient | Any
    fallback_models: str | Sequence[str]
    use_tasks: Literal["auto"] | bool
    poll_interval: float
    prices: Mapping[str, Decimal | float | str] | None
    download: bool
    output_dir: Path | str | None
    storage_options: Mapping[str, Any] | None
    cache: BaseCache | Path | str | None
    allowed_image_hosts: str | Sequence[str] | None
    include_prompt_in_events: bool


def checked_seconds(value: float | timedelta | None) -> float | None:
    """A time limit in seconds.

    Returns:
        Seconds; None for no limit.

    Raises:
        ValueError: Not more than 0, or more than a day.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if seconds is not None and not 0 < seconds <= _DAY:
        raise ValueError("The time limit is in seconds: more than 0, at most 86,400 (a day), or None for none.")
    return seconds


def checked_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Check the settings of a generator that depend on each other or on tables.

    Args:
        settings: By the name of the field, each of the right type.

    Returns:
        Warnings about its models.

    Raises:
        ValueError: A setting is illegal, or does not go with another.
    """
    problem = None
    try:
        request = ImageRequest(prompt="-", **{name: settings[name] for name in REQUEST_DEFAULTS})
    except ValidationError as error:
        problem = describe_validation(error)
    if problem:
        raise ValueError(problem)
    if not settings["download"] and settings["output_dir"] is not None:
        raise ValueError("output_dir needs the bytes: leave download=False out.")
    models = (settings["model"], *settings["fallback_models"])
    if settings["use_tasks"] is True and not all(model_info(name).tasks for name in models):
        raise ValueError("use_tasks=True needs a model of the task endpoint, such as 'glm-image'.")
    return filter(None, (*request.warnings, *map(model_warning, settings["fallback_models"])))
