"""`CogViewImageTool`, the BaseTool."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import Decimal
from functools import cache, partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Unpack, get_args

from langchain_core.runnables import RunnableBinding
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives, RunnableConfigurableFields
from langchain_core.tools import BaseTool, ToolException
from langchain_core.tools.base import ToolExceptionHandlerOutput
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    SkipValidation,
    ValidationError,
    WithJsonSchema,
    create_model,
    field_serializer,
    field_validator,
)

from langchain_cogview.api.redaction import SafeErrors, attempt
from langchain_cogview.artifact import ImageArtifact  # noqa: TC001  LangChain reads the annotations of `_run`
from langchain_cogview.catalog import ModelInfo, Quality, currency_of, legal_size, model_info
from langchain_cogview.concurrency import in_thread, raised_by_signal
from langchain_cogview.cost import Budget, Spending, checked_amount
from langchain_cogview.errors import MAX_MODEL_TEXT, CogViewConfigurationError, CogViewError, Outcome, printable
from langchain_cogview.generator import CogViewImageGenerator
from langchain_cogview.request import GeneratorSettings, check_names, checked_prompt, describe_validation, specified

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

    from langchain_cogview.result import GeneratedImage, ImageResult

TOOL_NAME: Final = "cogview_generate_image"
TOOL_DESCRIPTION: Final = (
    "Make a picture from a text description. Use it when the user asks for an image, drawing, photo or illustration. "
    "You get a short confirmation with the picture's id and where it is saved, not the picture. "
    "Each call costs money: call it once for each picture that the user asked for."
)
SHOWN_TO_USER: Final = " The application shows the picture to the user."
DEFAULT_OUTPUT_DIR: Final = "cogview_images"
_PATH_CHARACTERS = 160

# The id of the call that is being run: BaseTool keeps it from `_run`, and an injected argument would break plain `invoke`.
_tool_call_id: ContextVar[str | None] = ContextVar("cogview_tool_call_id", default=None)


class _ErrorAsTextError(ToolException):
    """An error that is no `ToolException` itself, to be given to the model; the error is its cause."""


def _text_of_error(error: ToolException) -> str:
    if isinstance(error, CogViewError):
        return error.text_for_model
    if isinstance(error, _ErrorAsTextError):
        return str(error)
    return "No image was made. The image tool failed. Tell the user; do not try again by yourself."


def _text_of_bad_arguments(error: Any) -> str:
    said = describe_validation(error) if isinstance(error, ValidationError) else "the arguments are not valid"
    return printable(f"No image was made. Wrong arguments: {said}", MAX_MODEL_TEXT)


def _resolved(generator: Any, bound: dict[str, Any]) -> Iterator[tuple[CogViewImageGenerator, dict[str, Any]]]:
    """The generators behind what LangChain wrapped, each with the arguments that are bound to it.

    Only what hands its arguments on is known to keep the budget, and only what sends once does not pay again.
    """
    if isinstance(generator, CogViewImageGenerator):
        yield generator, bound
    elif type(generator) is RunnableBinding:
        yield from _resolved(generator.bound, {**generator.kwargs, **bound})
    elif type(generator) is RunnableConfigurableFields:
        yield from _resolved(generator.default, bound)
    elif type(generator) is RunnableConfigurableAlternatives:
        for each in (generator.default, *generator.alternatives.values()):
            yield from _resolved(each, bound)
    else:
        raise CogViewConfigurationError(
            f"generator= takes a CogViewImageGenerator; this is of type {type(generator).__name__}.",
            hint="Pass the generator itself: max_retries and fallback_models are its own.",
        )


class ToolSettings(GeneratorSettings, total=False):
    """The keyword arguments of `CogViewImageTool` beside `generator`; its docstring says what each of them does."""

    content_format: Literal["text", "image_url"]
    on_failure: Literal["error", "continue"]
    shown_to_user: bool
    max_images: int | None
    budget: Decimal | float | str | None
    name: str
    description: str
    args_schema: Any
    return_direct: bool
    verbose: bool
    callbacks: Any
    tags: list[str] | None
    metadata: dict[str, Any] | None
    handle_tool_error: bool | str | Callable[[ToolException], ToolExceptionHandlerOutput] | None
    handle_validation_error: bool | str | Callable[[Any], str] | None
    response_format: Literal["content_and_artifact"]
    extras: dict[str, Any] | None


class CogViewImageTool(SafeErrors, BaseTool):
    """Lets an agent make pictures with Zhipu's CogView endpoint.

    Setup:
        Install `langchain-cogview`, and set `ZHIPUAI_API_KEY` (a key from open.bigmodel.cn, mainland China) or
        `ZAI_API_KEY` (a key from z.ai, international).

    Instantiation:
        >>> from langchain_cogview import CogViewImageTool
        >>> tool = CogViewImageTool(base_url="sandbox:", output_dir="pictures")  # offline; leave base_url out for the service

    Invocation with args:
        >>> tool.invoke({"prompt": "a cute little kitten"})    # doctest: +SKIP
        'Made 1 image: 3f2a9c1b (1024x1024, saved as pictures/...png). ...'

    Invocation with a ToolCall, as an agent does it; the message's artifact holds the result as plain JSON:
        >>> message = tool.invoke(
        ...     {"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": "a kitten"}}
        ... )    # doctest: +SKIP
        >>> message.artifact["images"][0]["path"]    # doctest: +SKIP

    Agent:
        >>> from langchain.agents import create_agent    # doctest: +SKIP
        >>> agent = create_agent("openai:gpt-5", tools=[tool])    # doctest: +SKIP
        >>> output = agent.invoke({"messages": "Draw me a kitten"})    # doctest: +SKIP
        >>> images_from_messages(output)[0].show()    # doctest: +SKIP

    A blocked prompt, wrong arguments and an unknown outcome become a text for the model, and the agent goes on. Errors that no
    model can act on (key, balance, rate limit, network) are raised unless `on_failure="continue"`; they are LangChain's
    `ModelError`s, which its retry middleware understands.

    Args:
        generator: What makes the pictures. None: one is made of the other arguments.
        content_format: What the model gets: `text` alone, or `image_url`, the text and a block with the link. Chat APIs of
            OpenAI's form refuse image blocks in tool messages; Anthropic, OpenAI Responses and Gemini take them.
        on_failure: What happens after an error that no model can act on, in the words of LangChain's middleware: `error` raises
            it, which ends an agent's run; `continue` gives it to the model as a text that says not to call again. Raised in one
            of several parallel calls, it keeps the images of the others out of the agent's state.
        shown_to_user: Whether the application shows each image to the user by itself. Then the model is told so, and told not
            to write a link. By default the model is told only the image's id and where it is saved.
        max_images: How many pictures this instance may make in all. A further request is refused before it is sent, with a
            text that the model can pass on. None: no limit.
        budget: The same in money, in the currency of the platform (CNY in China, USD internationally), at the catalog's
            prices, in the sandbox too. None: no limit.
        name: What the model calls it.
        description: What the model reads of it.
        **kwargs: Arguments of `CogViewImageGenerator`, when no `generator` is given. `output_dir` is then `cogview_images`
            unless said otherwise: the artifact has no bytes, and a link does not last.
    """

    name: str = TOOL_NAME
    description: str = TOOL_DESCRIPTION
    args_schema: Any = None
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    handle_tool_error: bool | str | Callable[[ToolException], ToolExceptionHandlerOutput] | None = _text_of_error
    handle_validation_error: bool | str | Callable[[Any], str] | None = _text_of_bad_arguments
    # An instance is used as it is: validating it again would warn again. What LangChain binds has another class.
    generator: Annotated[CogViewImageGenerator, SkipValidation] = Field(repr=False)
    content_format: Literal["text", "image_url"] = "text"
    on_failure: Literal["error", "continue"] = "error"
    shown_to_user: bool = False
    max_images: int | None = Field(default=None, ge=0)
    budget: Decimal | None = None

    _spending: Spending = PrivateAttr(default_factory=Spending)

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @field_validator("budget")
    @classmethod
    def _budget_is_an_amount(cls, value: Decimal | None) -> Decimal | None:
        return None if value is None else checked_amount(value)

    def __init__(self, *, generator: CogViewImageGenerator | None = None, **settings: Unpack[ToolSettings]) -> None:
        _, failure = attempt(self._construct, generator, settings)
        if failure is not None:
            del self, generator, settings
            raise failure

    @field_serializer("generator", mode="wrap")
    def _dumped_generator(self, generator: Any, dump: SerializerFunctionWrapHandler) -> Any:
        # What LangChain binds holds its arguments and configuration as they are, and the key may be among them.
        return dump(generator) if isinstance(generator, CogViewImageGenerator) else type(generator).__name__

    def _construct(self, generator: CogViewImageGenerator | None, settings: Mapping[str, Any]) -> None:
        own, others = self._sorted(settings)
        if generator is None:
            if others.get("download", True):
                others.setdefault("output_dir", DEFAULT_OUTPUT_DIR)
            generator = CogViewImageGenerator(**others)
        elif others:
            raise CogViewConfigurationError(
                f"{', '.join(sorted(others))} cannot be given beside generator=.", hint="Set it on the generator."
            )
        generators = list(_resolved(generator, {}))
        if own.get("args_schema") is None:
            own["args_schema"] = arguments_schema(generator)
        if own.get("shown_to_user") is True:
            own.setdefault("description", TOOL_DESCRIPTION + SHOWN_TO_USER)
        super().__init__(generator=generator, **own)
        self._refuse_unpriced(generators)

    @classmethod
    def _sorted(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        # `response_format` is LangChain's, but people mean that of other image APIs.
        own = {
            name
            for name in values
            if name in cls.model_fields and (name != "response_format" or values[name] == "content_and_artifact")
        }
        known = CogViewImageGenerator.model_fields
        check_names([name for name in values if name not in own], {*known, *cls.model_fields} - {"response_format"})
        return {name: values[name] for name in own}, {name: values[name] for name in values if name not in own}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Show all arguments in the signature, those of the generator included."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.__signature__ = _signature(cls)

    # --- a run

    def run(self, *args: Any, tool_call_id: str | None = None, **kwargs: Any) -> Any:
        """LangChain's; remembers the tool call's id for the events."""
        token = _tool_call_id.set(tool_call_id)
        try:
            return super().run(*args, tool_call_id=tool_call_id, **kwargs)
        finally:
            _tool_call_id.reset(token)

    async def arun(self, *args: Any, tool_call_id: str | None = None, **kwargs: Any) -> Any:
        """LangChain's; remembers the tool call's id for the events."""
        token = _tool_call_id.set(tool_call_id)
        try:
            return await super().arun(*args, tool_call_id=tool_call_id, **kwargs)
        finally:
            _tool_call_id.reset(token)

    # The generator finds the tool's run, its parent, in LangChain's context.

    def _run(
        self, prompt: str, size: str | None = None, quality: str | None = None
    ) -> tuple[str | list[dict[str, Any]], ImageArtifact]:
        given = _given(prompt, size, quality)
        with self._failures():
            result = self.generator.invoke(given, _config(), budget=self._budget())
        return self._answer(_saved_all_the_same(result) if any(map(_is_unsaved, result.images)) else result)

    async def _arun(
        self, prompt: str, size: str | None = None, quality: str | None = None
    ) -> tuple[str | list[dict[str, Any]], ImageArtifact]:
        given = _given(prompt, size, quality)
        with self._failures():
            result = await self.generator.ainvoke(given, _config(), budget=self._budget())
        return self._answer(
            await in_thread(_saved_all_the_same, result) if any(map(_is_unsaved, result.images)) else result
        )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except CogViewError as error:
            if self.on_failure == "error" or not self.handle_tool_error or isinstance(error, ToolException):
                raise
            raise _ErrorAsTextError(error.text_for_model) from error

    def _budget(self) -> Budget:
        # The limits can be changed on the way; what was spent stays. The generator counts, where request and price are known.
        return Budget(self.budget, max_images=self.max_images, owner="this tool", spending=self._spending)

    def _refuse_unpriced(self, generators: list[tuple[CogViewImageGenerator, dict[str, Any]]]) -> None:
        if self.budget is None:
            return
        self._spending.currency = currency_of(generators[0][0].resolved_region)
        for generator, bound in generators:
            for model in (bound.get("model") or generator.model, *generator.fallback_models):
                if generator.price(model) is None:
                    raise CogViewConfigurationError(
                        f"The price of {model} is not known, so a budget cannot be kept.",
                        hint="Use max_images, or tell it: prices={...}.",
                    )

    # --- what the model reads

    def _answer(self, result: ImageResult) -> tuple[str | list[dict[str, Any]], ImageArtifact]:
        text = text_for_model(result, shown_to_user=self.shown_to_user)
        if self.content_format == "text":
            return text, result.to_artifact()
        links = [{"type": "image_url", "image_url": {"url": image.url}} for image in result.images if image.url]
        return [{"type": "text", "text": text}, *links], result.to_artifact()

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        # The schema's class is made for this instance; the other process makes its own.
        state["__dict__"] = {**state["__dict__"], "args_schema": None}
        return state

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self.args_schema = arguments_schema(self.generator)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> CogViewImageTool:
        return self.model_copy()


def _signature(cls: type[CogViewImageTool]) -> inspect.Signature:
    """All arguments of a tool: its own, then the generator's."""
    own = inspect.signature(cls).parameters
    others = inspect.signature(CogViewImageGenerator).parameters
    added = [parameter for name, parameter in others.items() if name not in own]
    return inspect.Signature([*own.values(), *added], return_annotation=inspect.Signature.empty)


CogViewImageTool.__signature__ = _signature(CogViewImageTool)


def _given(prompt: str, size: str | None, quality: str | None) -> dict[str, Any]:
    said = {"prompt": prompt, "size": size, "quality": quality}
    return {name: value for name, value in said.items() if value is not None}


def _config() -> RunnableConfig:
    return {"metadata": {"tool_call_id": _tool_call_id.get()}}


def _is_unsaved(image: GeneratedImage) -> bool:
    return image.path is None and image.uri is None and image.mime_type is not None


def _saved_all_the_same(result: ImageResult) -> ImageResult:
    """A result whose bytes are in files: an artifact has none, so what is only in memory goes into a temporary folder."""
    images = [_saved(image) if _is_unsaved(image) else image for image in result.images]
    return result.model_copy(update={"images": tuple(images)})


def _saved(image: GeneratedImage) -> GeneratedImage:
    kept: dict[str, Any] = {}
    try:
        folder = _temporary_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        path = image.save(folder)
        note = f"The picture is saved in a temporary folder: {path.parent}. Set output_dir to keep it."
        kept = {"path": path}
    except Exception as error:  # it is paid for: the artifact still has its link
        if raised_by_signal(error):
            raise
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        note = f"The picture could not be saved in a temporary folder: {printable(why)}. Only its link is left."
    return image.model_copy(update={**kept, "warnings": (*image.warnings, note)})


@cache
def _temporary_folder() -> Path:
    """One for the process, readable by this user alone."""
    return Path(tempfile.mkdtemp(prefix="cogview_images-"))


def text_for_model(result: ImageResult, *, shown_to_user: bool = False) -> str:
    """What the model reads of a result: short ids, whether it worked, and what not to do.

    Args:
        result: What was made.
        shown_to_user: Whether the application shows the images to the user.

    Returns:
        At most 500 characters. They never suggest that the model has seen an image.
    """
    count = len(result.images)
    fetched = [image for image in result.images if image.mime_type]
    pictures = []
    for image in result.images[:3]:
        facts = [f"{image.width}x{image.height}" if image.width else image.size or ""]
        place = str(image.path or image.uri or "")
        if place:
            facts.append(
                f"saved as {place if len(place) <= _PATH_CHARACTERS // min(count, 3) else PurePath(place).name}"
            )
        pictures.append(f"{image.id} ({', '.join(fact for fact in facts if fact)})")
    more = f" and {count - 3} more" if count > 3 else ""  # noqa: PLR2004
    text = f"Made {count} image{'s' if count > 1 else ''}: {'; '.join(pictures)}{more}."
    unknown = sum(failure.outcome is Outcome.UNKNOWN for failure in result.failures)
    if len(result.failures) > unknown:
        text += f" {len(result.failures) - unknown} more could not be made."
    if unknown:
        text += f" {unknown} more may have been made and charged, but did not arrive."
    if result.sandbox:
        text += " It is a sandbox placeholder, not a real picture."
    if len(fetched) < count:
        missing = "It" if count == 1 else f"{count - len(fetched)} of them"
        if all(image.url or image.mime_type for image in result.images):
            text += f" {missing} was not fetched: the application has only a link, which ends. Tell the user."
        else:
            text += f" {missing} did not arrive as a whole image, and may have been charged. Tell the user."
    elif any(image.path is None and image.uri is None for image in result.images):
        has = "link" if all(image.url for image in result.images) else "bytes"
        text += f" It is not saved as a file; the application has its {has}."
    it = "it" if count == 1 else "them"
    if shown_to_user and len(fetched) == count:
        advice = f"The user already sees {it}. Do not write a link, and do not call this tool again unless asked."
    else:
        advice = f"Refer to {it} by id or path. Do not make up a link, and do not call this tool again unless asked."
    return f"{printable(text, MAX_MODEL_TEXT - len(advice) - 1)} {advice}"


class ImageArguments(BaseModel):
    """Base of the arguments of an image tool."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


def arguments_schema(generator: CogViewImageGenerator) -> type[BaseModel]:
    """The arguments that a chat model may decide, as the image model allows them.

    The JSON schema uses only keywords that every provider takes, also with `strict=True`: bounds and defaults stand in the
    descriptions and hold in the validation. The validation takes more than the schema offers: every legal size, words, and
    what chat models send for an argument that they would leave out.

    Args:
        generator: Its settings are the defaults.

    Returns:
        A class for `args_schema`.
    """
    base, bound = next(_resolved(generator, {}))
    info = model_info(bound.get("model") or base.model)
    limit = info.max_prompt_characters
    sizes = _offered_sizes(info, bound.get("size") or base.size)
    qualities = info.qualities
    quality = bound.get("quality") or base.quality or qualities[0]
    size_text = "Width x height in pixels."
    if sizes:
        size_text += f" {sizes[0]} unless the user wants another shape: wide for landscapes, tall for portraits."
    quality_text = f"{quality} unless the user wants another; hd has finer detail and takes longer."
    fields: dict[str, Any] = {
        "prompt": (
            Annotated[str, AfterValidator(partial(_sendable, info)), _json_schema()],
            Field(
                description="What the picture shows: subject, style, colours, composition. In the user's language."
                + (f" At most {limit} characters." if limit else ""),
            ),
        ),
        "size": (
            Annotated[str | None, BeforeValidator(partial(_size_of, info)), _json_schema(*sizes)],
            _field(sizes[0] if sizes else None, size_text),
        ),
        "quality": (
            Annotated[Literal[qualities] | None, BeforeValidator(partial(_quality_of, info)), _json_schema(*qualities)],
            _field(quality, quality_text if len(qualities) > 1 else "The only one."),
        ),
    }
    return create_model(
        "CogViewImageArguments",
        __base__=ImageArguments,
        __doc__="Arguments of the image tool.",
        **fields,
    )


def _sendable(info: ModelInfo, prompt: str) -> str:
    return checked_prompt(prompt, info)


def _size_of(info: ModelInfo, size: Any) -> Any:
    size = specified(size, quality=False)
    return legal_size(info, size) if isinstance(size, str) else size


def _quality_of(info: ModelInfo, quality: Any) -> Any:
    quality = specified(quality, quality=True)
    # A word for a quality that the model does not have becomes the one that it has.
    return info.qualities[0] if quality in get_args(Quality) and quality not in info.qualities else quality


def _json_schema(*values: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "enum": list(values)} if values else {"type": "string"})


def _field(default: str | None, description: str) -> Any:
    # A factory keeps the default out of the JSON schema, also in the copy that LangChain makes of the fields.
    return Field(default_factory=lambda: default, description=description)


def _offered_sizes(info: ModelInfo, default: str | None) -> tuple[str, ...]:
    first = legal_size(info, default) if default else info.default_size
    return tuple(dict.fromkeys(size for size in (first, *info.sizes) if size))
