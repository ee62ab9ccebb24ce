"""`CogViewImageTool`, the `BaseTool` for agents: the schema of its arguments, and the texts that the model reads."""

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, Unpack, get_args

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

from langchain_cogview.answers import ContentFormat, aanswer, answer, described, temporary_folder
from langchain_cogview.api.redaction import SafeErrors, attempt
from langchain_cogview.api.settings import is_sandbox
from langchain_cogview.artifact import ImageArtifact
from langchain_cogview.batches import check_many
from langchain_cogview.budget import Budget, Spending
from langchain_cogview.catalog import ModelInfo, Quality, currency_of, legal_size, model_info
from langchain_cogview.cost import Money, checked_amount
from langchain_cogview.enhance import STYLES, Style, style_text
from langchain_cogview.errors import MAX_MODEL_TEXT, CogViewConfigurationError, CogViewError, printable
from langchain_cogview.estimate import Estimate
from langchain_cogview.generator import CogViewImageGenerator
from langchain_cogview.request import (
    REQUEST_DEFAULTS,
    GeneratorSettings,
    check_names,
    checked_prompt,
    describe_validation,
    request_of,
    specified,
)

if TYPE_CHECKING:
    from langchain_cogview.images.remote import ImageAccess
    from langchain_cogview.result import ImageResult

TOOL_NAME: Final = "cogview_generate_image"
TOOL_DESCRIPTION: Final = (
    "Generate an image from a text description. Use it when the user asks for an image, drawing, photo or illustration. "
    "You get a short confirmation with the image's id and where it is saved, not the image. "
    "Each call costs money: call it once for each image that the user asked for."
)
DEFAULT_OUTPUT_DIR: Final = "cogview_images"


class _ErrorAsTextError(ToolException):
    """Gives the model the text of an error that is not a `ToolException`; the error is its cause."""


def _text_of_error(error: ToolException) -> str:
    if isinstance(error, CogViewError):
        return error.text_for_model
    if isinstance(error, _ErrorAsTextError):
        return str(error)
    return "No image was made. The image tool failed. Tell the user, and do not call this tool again on your own."


def _text_of_bad_arguments(error: Any) -> str:
    problem = describe_validation(error) if isinstance(error, ValidationError) else "the arguments are not valid"
    return printable(f"No image was made. Wrong arguments: {problem}", MAX_MODEL_TEXT)


def _resolved(generator: Any, bound: dict[str, Any]) -> Iterator[tuple[CogViewImageGenerator, dict[str, Any]]]:
    """Find the generators in a wrapper of LangChain, each with the arguments that are bound to it.

    Other wrappers are refused: one that does not pass its arguments on would lose the budget, and one that retries would pay
    again.

    Yields:
        Each generator with its arguments.

    Raises:
        CogViewConfigurationError: The object is no generator, or no wrapper of one that the tool can count.
    """
    if isinstance(generator, CogViewImageGenerator):
        yield generator, bound
    elif type(generator) is RunnableBinding:
        yield from _resolved(generator.bound, {**generator.kwargs, **bound})
    elif type(generator) is RunnableConfigurableFields:
        yield from _resolved(generator.default, bound)
    elif type(generator) is RunnableConfigurableAlternatives:
        for alternative in (generator.default, *generator.alternatives.values()):
            yield from _resolved(alternative, bound)
    else:
        raise CogViewConfigurationError(
            f"generator= takes a CogViewImageGenerator; this is of type {type(generator).__name__}.",
            hint="Pass the generator itself, and set max_retries and fallback_models on it.",
        )


class ToolSettings(GeneratorSettings, total=False):
    """The keyword arguments of `CogViewImageTool` other than `generator`; its docstring describes each of them."""

    content_format: ContentFormat
    on_failure: Literal["error", "continue"]
    shown_to_user: bool
    style: Style | None
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


class ImageToolBase(BaseTool):
    """What the tools of this package have in common: a text and an artifact, errors as text, the id of the call in the events."""

    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    """The tool message has a text for the model, and an artifact for the application."""
    handle_tool_error: bool | str | Callable[[ToolException], ToolExceptionHandlerOutput] | None = _text_of_error
    """How a `ToolException` becomes a text for the model, as in LangChain."""
    handle_validation_error: bool | str | Callable[[Any], str] | None = _text_of_bad_arguments
    """How wrong arguments become a text for the model, as in LangChain."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    # The id of the tool call goes to the generator's run, and so to its events, in the metadata that LangChain inherits. An
    # injected argument of `_run` would break plain `invoke`.

    def run(
        self, *args: Any, tool_call_id: str | None = None, metadata: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Run the tool, as LangChain does, with the id of the tool call in the metadata.

        Returns:
            As `BaseTool.run`.
        """
        metadata = {**(metadata or {}), "tool_call_id": tool_call_id}
        return super().run(*args, tool_call_id=tool_call_id, metadata=metadata, **kwargs)

    async def arun(
        self, *args: Any, tool_call_id: str | None = None, metadata: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Async version of `run`.

        Returns:
            As `run`.
        """
        metadata = {**(metadata or {}), "tool_call_id": tool_call_id}
        return await super().arun(*args, tool_call_id=tool_call_id, metadata=metadata, **kwargs)

    def _schema(self) -> Any:
        return type(self).model_fields["args_schema"].default

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        # The class of the schema may be made for this instance, and the other process makes its own.
        state["__dict__"] = {**state["__dict__"], "args_schema": None}
        return state

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self.args_schema = self._schema()

    # LangChain would take the letters of a text for prompts, and each would be paid for.

    def batch(self, inputs: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Run the tool once for each input, as LangChain does. A single input is refused.

        Returns:
            As `BaseTool.batch`.
        """
        check_many(inputs)
        return super().batch(inputs, *args, **kwargs)

    async def abatch(self, inputs: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Async version of `batch`.

        Returns:
            As `batch`.
        """
        check_many(inputs)
        return await super().abatch(inputs, *args, **kwargs)

    def batch_as_completed(self, inputs: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Run the tool once for each input, and yield each output as it is finished. A single input is refused.

        Returns:
            As `BaseTool.batch_as_completed`.
        """
        check_many(inputs)
        return super().batch_as_completed(inputs, *args, **kwargs)

    def abatch_as_completed(self, inputs: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Async version of `batch_as_completed`.

        Returns:
            As `batch_as_completed`.
        """
        check_many(inputs)
        return super().abatch_as_completed(inputs, *args, **kwargs)


class CogViewImageTool(SafeErrors, ImageToolBase):
    """Lets an agent generate images with Zhipu's CogView endpoint.

    Setup:
        Install `langchain-cogview`, and set `ZHIPUAI_API_KEY` (a key from open.bigmodel.cn, mainland China) or
        `ZAI_API_KEY` (a key from z.ai, international).

    Instantiation:
        >>> from langchain_cogview import CogViewImageTool
        >>> tool = CogViewImageTool(base_url="sandbox:", output_dir="images")  # offline; leave base_url out for the service

    Invocation with args:
        >>> tool.invoke({"prompt": "a cute little kitten"})    # doctest: +SKIP
        'Made 1 image: 3f2a9c1b (1024x1024, saved as images/...png). ...'

    Invocation with a ToolCall, as an agent does it; the message's artifact has the result as plain JSON:
        >>> message = tool.invoke(
        ...     {"type": "tool_call", "id": "1", "name": tool.name, "args": {"prompt": "a kitten"}}
        ... )    # doctest: +SKIP
        >>> message.artifact["images"][0]["path"]    # doctest: +SKIP

    Agent:
        >>> from langchain.agents import create_agent    # doctest: +SKIP
        >>> agent = create_agent("openai:gpt-5", tools=[tool])    # doctest: +SKIP
        >>> output = agent.invoke({"messages": "Make an image of a kitten"})    # doctest: +SKIP
        >>> images_from_messages(output)[0].show()    # doctest: +SKIP

    A blocked prompt, wrong arguments and an unknown outcome become a text for the model, and the agent continues. Errors that no
    model can act on (key, balance, rate limit, network) are raised unless `on_failure="continue"`. They are `ModelError`s of
    LangChain, which its retry middleware understands.

    Args:
        generator: The generator, or one that LangChain has bound or made configurable. None: it is made of the other arguments.
        content_format: What the model gets: only a `text`, or also a block for each image: `thumbnail`, at most 512 pixels (needs
            Pillow); `image`, all of its bytes, which the agent's state then holds; `image_url`, the link. Chat APIs in OpenAI's
            format refuse image blocks in tool messages; Anthropic, OpenAI Responses and Gemini accept them.
        on_failure: What happens after an error that no model can act on, in the words of LangChain's middleware: `error` raises
            it, which ends the agent's run; `continue` gives the model a text that says not to call again. If one of several
            parallel calls raises, the agent's state does not get the images of the others.
        style: Name of a style that is appended to every prompt: `photo`, `cinematic`, `illustration`, `watercolor`, `oil`,
            `anime`, `3d`, `pixel-art`, `line-art` or `flat`. None: none.
        shown_to_user: Whether the application shows each image to the user. Then the model is told so, and told not to write a
            link. Otherwise the model is told only the image's id and where it is saved.
        max_images: Limit of the images that this instance may make. A further request is refused before it is sent, with a
            text for the model. None: no limit.
        budget: Limit of the money, in the currency of the platform (CNY in China, USD internationally), at the catalog's
            prices, in the sandbox too. None: no limit.
        name: Name of the tool for the model.
        description: Description of the tool for the model.
        **settings: Arguments of `CogViewImageGenerator`, if `generator` is None. The default of `output_dir` is then
            `cogview_images`, because an artifact has no bytes and a link expires.

    Raises:
        CogViewConfigurationError: An argument is missing, malformed or unknown, or the price that a budget needs is not known.
    """

    name: str = TOOL_NAME
    """Name of the tool for the model."""
    description: str = TOOL_DESCRIPTION
    """Description of the tool for the model."""
    args_schema: Any = None
    """Schema of the arguments; the default is made for the generator's model."""
    # An instance is not validated again, which would repeat its warnings. A bound generator has a class of LangChain.
    generator: Annotated[CogViewImageGenerator, SkipValidation] = Field(repr=False)
    """The generator that makes the images."""
    content_format: ContentFormat = "text"
    """Whether the model gets only a text, or also a block with the image, a thumbnail or the link."""
    on_failure: Literal["error", "continue"] = "error"
    """Whether an error that no model can act on is raised, or given to the model as a text."""
    shown_to_user: bool = False
    """Whether the application shows each image to the user."""
    style: Style | None = None
    """Name of the style that is appended to every prompt; None for none."""
    max_images: int | None = Field(default=None, ge=0)
    """Limit of the images that this instance may make; None for no limit."""
    budget: Decimal | None = None
    """Limit of the money, in the currency of the platform; None for no limit."""

    _spending: Spending = PrivateAttr(default_factory=Spending)
    _also: Budget | None = PrivateAttr(default=None)

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, value: Decimal | None) -> Decimal | None:
        return None if value is None else checked_amount(value)

    def __init__(self, *, generator: CogViewImageGenerator | None = None, **settings: Unpack[ToolSettings]) -> None:
        _, failure = attempt(self._construct, generator, settings)
        if failure is not None:
            del self, generator, settings
            raise failure

    @field_serializer("generator", mode="wrap")
    def _dump_generator(self, generator: Any, dump: SerializerFunctionWrapHandler) -> Any:
        # A bound generator of LangChain has its arguments and configuration as they are, and the key may be among them.
        return dump(generator) if isinstance(generator, CogViewImageGenerator) else type(generator).__name__

    def _construct(self, generator: CogViewImageGenerator | None, settings: Mapping[str, Any]) -> None:
        fields, others = self._split(settings)
        if generator is None:
            if others.get("download", True):
                others.setdefault("output_dir", DEFAULT_OUTPUT_DIR)
            generator = CogViewImageGenerator(**others)
        elif others:
            raise CogViewConfigurationError(
                f"{', '.join(sorted(others))} cannot be passed together with generator=.",
                hint="Set it on the generator.",
            )
        generators = list(_resolved(generator, {}))
        if fields.get("args_schema") is None:
            fields["args_schema"] = arguments_schema(generator, fields.get("style"))
        fields.setdefault("description", described(TOOL_DESCRIPTION, fields))
        super().__init__(generator=generator, **fields)
        self._refuse_unpriced(generators)

    @classmethod
    def _split(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        # LangChain has a field `response_format`, but users mean the argument of other image APIs.
        names = {
            name
            for name in values
            if name in cls.model_fields and (name != "response_format" or values[name] == "content_and_artifact")
        }
        known = CogViewImageGenerator.model_fields
        check_names([name for name in values if name not in names], {*known, *cls.model_fields} - {"response_format"})
        return {name: values[name] for name in names}, {name: values[name] for name in values if name not in names}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Show all arguments in the signature, including those of the generator."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.__signature__ = _signature(cls)

    # --- a run

    def _run(self, prompt: str, size: str | None = None, quality: str | None = None) -> Any:
        with self.failures():
            result = self.generator.invoke(self.call_arguments(prompt, size, quality), budget=self.limits())
        return self.answer(result)

    async def _arun(self, prompt: str, size: str | None = None, quality: str | None = None) -> Any:
        with self.failures():
            result = await self.generator.ainvoke(self.call_arguments(prompt, size, quality), budget=self.limits())
        return await self.aanswer(result)

    def call_arguments(self, prompt: str, size: str | None, quality: str | None) -> dict[str, Any]:
        """Collect the arguments that a chat model has set.

        Returns:
            The arguments of `ImageRequest`, without those that are None; the style is appended to the prompt.
        """
        arguments = {"prompt": prompt + style_text(self.style), "size": size, "quality": quality}
        return {name: value for name, value in arguments.items() if value is not None}

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Give the model the text of an error that would end the agent's run, if `on_failure` is `continue`.

        Raises:
            ToolException: The text, with the error as its cause.
            CogViewError: The error, with the text that `on_failure` asks for.
        """
        try:
            yield
        except CogViewError as error:
            if self.on_failure == "error" or not self.handle_tool_error or isinstance(error, ToolException):
                raise
            raise _ErrorAsTextError(error.text_for_model) from error

    def limits(self) -> Budget:
        """The limits of this instance, with what it has spent.

        Returns:
            A budget that counts with every other one that this method returns.
        """
        # The limits may be changed between calls, and what was spent remains. The generator counts, because it knows the prices.
        spending, also = self._spending, self._also
        return Budget(self.budget, max_images=self.max_images, owner="this tool", spending=spending, also=also)

    def estimate(
        self, prompt: str, size: str | None = None, quality: str | None = None, n: int | None = None
    ) -> Estimate:
        """Say what images would cost, and what the limits leave. Free: nothing is sent.

        Args:
            prompt: The prompt.
            size: Size; None for the generator's.
            quality: Quality; None for the generator's.
            n: The number of images; None for the generator's.

        Returns:
            The estimate, at list prices in the sandbox too.

        Raises:
            CogViewInvalidRequestError: An argument is illegal.
        """
        generator, bound = next(_resolved(self.generator, {}))
        arguments = self.call_arguments(prompt, size, quality) | ({} if n is None else {"n": n})
        defaults = {name: bound.get(name, getattr(generator, name)) for name in REQUEST_DEFAULTS}
        request, _ = request_of(arguments, defaults)
        price = generator.price(request.model)
        sandbox = is_sandbox(generator.resolved_base_url)
        limits = self.limits()
        spent = (self._also or limits).spent  # what other conversations spend is not for this one
        return Estimate.of(request, Money(*price) if price else Money(), limits, spent, sandbox=sandbox)

    def with_budget(self, budget: Budget) -> Self:
        """Make a copy whose images another budget must cover as well, such as that of a conversation.

        Args:
            budget: The other budget.

        Returns:
            A copy that counts what it spends with this tool, and in the other budget.

        Raises:
            CogViewConfigurationError: The budget limits the money, and the price of a model is not known.
        """
        if budget.amount is not None:
            self._check_prices(list(_resolved(self.generator, {})))
        copy = self.model_copy()
        copy._also = budget  # noqa: SLF001
        return copy

    def image_access(self) -> "ImageAccess":
        """Say what the images of this tool may be read from when their records come back from storage.

        Returns:
            The output folder; without one, the temporary folder. Files elsewhere are not read.
        """
        from langchain_cogview.images.remote import ImageAccess, remote_folder  # noqa: PLC0415  what images need

        generator, _ = next(_resolved(self.generator, {}))
        if generator.output_dir is None:
            return ImageAccess(within=temporary_folder())
        folder = remote_folder(generator.output_dir, generator.storage_options)
        return ImageAccess(within=folder) if isinstance(folder, Path) else ImageAccess(storage=(folder,))

    def _refuse_unpriced(self, generators: list[tuple[CogViewImageGenerator, dict[str, Any]]]) -> None:
        if self.budget is not None:
            self._spending.currency = currency_of(generators[0][0].resolved_region)
            self._check_prices(generators)

    def _check_prices(self, generators: list[tuple[CogViewImageGenerator, dict[str, Any]]]) -> None:
        for generator, bound in generators:
            for model in (bound.get("model") or generator.model, *generator.fallback_models):
                if generator.price(model) is None:
                    raise CogViewConfigurationError(
                        f"A budget needs the price of {model}, which is not known.",
                        hint="Pass prices={model: price}, or use max_images instead.",
                    )

    # --- what the model reads

    def answer(self, result: "ImageResult") -> tuple[str | list[dict[str, Any]], ImageArtifact]:
        """Make the tool message of a result.

        Args:
            result: The result.

        Returns:
            The content for the model, and the artifact for the application.
        """
        return answer(result, self.content_format, shown_to_user=self.shown_to_user)

    async def aanswer(self, result: "ImageResult") -> tuple[str | list[dict[str, Any]], ImageArtifact]:
        """Async version of `answer`.

        Returns:
            As `answer`.
        """
        return await aanswer(result, self.content_format, shown_to_user=self.shown_to_user)

    def _schema(self) -> Any:
        return arguments_schema(self.generator, self.style)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> "CogViewImageTool":
        return self.model_copy()


def _signature(cls: type[CogViewImageTool]) -> inspect.Signature:
    # The arguments of the tool, then those of the generator.
    parameters = inspect.signature(cls).parameters
    others = inspect.signature(CogViewImageGenerator).parameters
    added = [parameter for name, parameter in others.items() if name not in parameters]
    return inspect.Signature([*parameters.values(), *added], return_annotation=inspect.Signature.empty)


CogViewImageTool.__signature__ = _signature(CogViewImageTool)


class ImageArguments(BaseModel):
    """Base class of the arguments of an image tool."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


def arguments_schema(generator: CogViewImageGenerator, style: Style | None = None) -> type[BaseModel]:
    """Make the schema of the arguments that a chat model decides, for the image model of a generator.

    The JSON schema uses only keywords that every provider accepts, also with `strict=True`: bounds and defaults are in the
    descriptions, and the validation applies them. The validation accepts more than the schema offers: every legal size, words,
    and what chat models send for an argument that they would leave out.

    Args:
        generator: The generator, whose settings are the defaults.
        style: The style that is appended to every prompt, which leaves less room for the prompt.

    Returns:
        A class for `args_schema`.
    """
    base, bound = next(_resolved(generator, {}))
    info = model_info(bound.get("model") or base.model)
    appended = style_text(style) if style in STYLES else ""
    limit = info.max_prompt_characters and info.max_prompt_characters - len(appended)
    sizes = _offered_sizes(info, bound.get("size") or base.size)
    qualities = info.qualities
    quality = bound.get("quality") or base.quality or qualities[0]
    size_text = "Width x height in pixels."
    if sizes:
        size_text += f" {sizes[0]} unless the user wants another shape: wide for landscapes, tall for portraits."
    quality_text = f"{quality} unless the user wants another; hd has finer detail and takes longer."
    fields: dict[str, Any] = {
        "prompt": (
            Annotated[str, AfterValidator(partial(_sendable, info, appended)), _json_schema()],
            Field(
                description="What the image shows: subject, style, colours, composition. In the user's language. "
                "Text that is to appear in the image stands in double quotes, word for word."
                + (f" At most {limit} characters." if limit else ""),
            ),
        ),
        "size": (
            Annotated[str | None, BeforeValidator(partial(_size_of, info)), _json_schema(*sizes)],
            _field(sizes[0] if sizes else None, size_text),
        ),
        "quality": (
            Annotated[Literal[qualities] | None, BeforeValidator(partial(_quality_of, info)), _json_schema(*qualities)],
            _field(quality, quality_text if len(qualities) > 1 else "The only quality of this model."),
        ),
    }
    arguments = create_model(
        "CogViewImageArguments", __base__=ImageArguments, __doc__="Arguments of the image tool.", **fields
    )
    # LangChain reads the annotations of the signature twice in each call, and takes long over those of the fields.
    signature = inspect.signature(arguments)
    plain = [parameter.replace(annotation=str) for parameter in signature.parameters.values()]
    arguments.__signature__ = signature.replace(parameters=plain)
    return arguments


def _sendable(info: ModelInfo, appended: str, prompt: str) -> str:
    checked_prompt(checked_prompt(prompt) + appended, info)
    return prompt


def _size_of(info: ModelInfo, size: Any) -> Any:
    size = specified(size, quality=False)
    return legal_size(info, size) if isinstance(size, str) else size


def _quality_of(info: ModelInfo, quality: Any) -> Any:
    quality = specified(quality, quality=True)
    # A word for a quality that the model does not have becomes the quality that it has.
    return info.qualities[0] if quality in get_args(Quality) and quality not in info.qualities else quality


def _json_schema(*values: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "enum": list(values)} if values else {"type": "string"})


def _field(default: str | None, description: str) -> Any:
    # A factory keeps the default out of the JSON schema, also in the copy that LangChain makes of the fields.
    return Field(default_factory=lambda: default, description=description)


def _offered_sizes(info: ModelInfo, default: str | None) -> tuple[str, ...]:
    first = legal_size(info, default) if default else info.default_size
    return tuple(dict.fromkeys(size for size in (first, *info.sizes) if size))
