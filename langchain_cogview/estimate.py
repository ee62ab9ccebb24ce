"""What images would cost, and the approval of a person before they are paid for. Nothing here sends a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from langchain_cogview.catalog import PRICES_AS_OF
from langchain_cogview.cost import Money, checked_amount
from langchain_cogview.errors import (
    CogViewBudgetError,
    CogViewConfigurationError,
    CogViewInvalidRequestError,
    printable,
)

if TYPE_CHECKING:
    from decimal import Decimal

    from langchain_cogview.budget import Budget
    from langchain_cogview.middleware import CogViewMiddleware
    from langchain_cogview.request import ImageRequest
    from langchain_cogview.tool import CogViewImageTool

_PROMPT_CHARACTERS = 200


class EstimateArtifact(TypedDict):
    """The artifact of `cogview_estimate`. Plain JSON; amounts are decimal numbers as text."""

    type: str
    """`cogview.estimate`."""
    version: int
    """1."""
    n: int
    """The number of images."""
    model: str
    """The model."""
    size: str | None
    """Size in pixels; None if the model decides."""
    quality: str | None
    """Quality."""
    price: str | None
    """Price of one image; None if it is unknown."""
    total: str | None
    """Price of all images; None if it is unknown."""
    currency: str | None
    """ISO code of the currency."""
    spent: str | None
    """What counts as spent."""
    left: str | None
    """What the budget leaves; None without a budget."""
    images_left: int | None
    """How many images the limits leave; None without a limit."""
    is_covered: bool
    """Whether the limits cover the images."""
    sandbox: bool
    """Whether the sandbox makes the images, so that nothing is charged."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What images would cost, before they are requested."""

    n: int
    """The number of images."""
    model: str
    """The model."""
    size: str | None
    """Size in pixels; None if the model decides."""
    quality: str | None
    """Quality."""
    price: Money
    """List price of one image, or the price of `prices=`; it may be unknown."""
    spent: Money
    """What counts as spent so far, including images in flight."""
    left: Money | None
    """What the budget leaves; None without a budget."""
    images_left: int | None
    """How many images the limits leave, in number and in money; None without a limit."""
    sandbox: bool
    """Whether the sandbox makes the images, so that nothing is charged."""

    @classmethod
    def of(cls, request: ImageRequest, price: Money, budget: Budget, spent: Money, *, sandbox: bool) -> Estimate:
        """Estimate a request.

        Args:
            request: The request.
            price: The price of one image.
            budget: The limits.
            spent: What is spent.
            sandbox: Whether the sandbox makes the images.

        Returns:
            The estimate.
        """
        left, images_left = budget.left, budget.images_left
        if left is not None and left.amount is not None and price.amount:
            by_money = int(left.amount // price.amount)
            images_left = by_money if images_left is None else min(images_left, by_money)
        if left is not None and left.currency is None:  # nothing is spent yet
            left = Money(left.amount, price.currency)
        size, quality = request.resolved_size, request.resolved_quality
        return cls(request.n, request.model, size, quality, price, spent, left, images_left, sandbox)

    @property
    def total(self) -> Money:
        """The price of all images; it may be unknown."""
        return Money() if self.price.amount is None else Money(self.n * self.price.amount, self.price.currency)

    @property
    def is_covered(self) -> bool:
        """Whether the limits cover the images. A budget of money covers none of unknown price."""
        if self.left is not None and self.price.amount is None:
            return False
        return self.images_left is None or self.n <= self.images_left

    def __str__(self) -> str:
        images = "1 image" if self.n == 1 else f"{self.n} images"
        facts = ", ".join(filter(None, (images, self.size, self.quality, self.model)))
        cost = f"list price {self.total} as of {PRICES_AS_OF}" if self.price.amount else str(self.total)
        each_image = f" ({self.price} each)" if self.n > 1 and self.price.amount else ""
        money = f"sandbox, nothing is charged; {cost}{each_image}" if self.sandbox else f"{cost}{each_image}"
        spent = f" Spent so far: {self.spent}." if self.spent.currency else ""
        left = [] if self.left is None else [f"{self.left}"]
        left += (
            [] if self.images_left is None else ["1 image" if self.images_left == 1 else f"{self.images_left} images"]
        )
        text = f"{facts}: {money}.{spent}" + (f" Left: {', '.join(left)}." if left else "")
        return text if self.is_covered else f"{text} The limits do not cover this."

    def to_artifact(self) -> EstimateArtifact:
        """Convert the estimate to plain JSON.

        Returns:
            The artifact.
        """
        return {
            "type": "cogview.estimate",
            "version": 1,
            "n": self.n,
            "model": self.model,
            "size": self.size,
            "quality": self.quality,
            "price": _text(self.price),
            "total": _text(self.total),
            "currency": self.price.currency,
            "spent": _text(self.spent),
            "left": None if self.left is None else _text(self.left),
            "images_left": self.images_left,
            "is_covered": self.is_covered,
            "sandbox": self.sandbox,
        }


def _text(money: Money) -> str | None:
    return None if money.amount is None else str(money.amount)


def spending_approval(
    tool: CogViewImageTool | CogViewMiddleware,
    *,
    above: Decimal | float | str | None = None,
    allowed_decisions: tuple[str, ...] = ("approve", "edit", "reject"),
) -> dict[str, Any]:
    """Ask a person before an agent spends money, by LangChain's `HumanInTheLoopMiddleware`.

    The description that the person sees has the price, the size, what is spent and what is left. Calls whose arguments are not
    legal are not interrupted: the tool refuses them for nothing.

    Args:
        tool: The tool of the agent, or its `CogViewMiddleware`: then what is spent and left is that of the conversation.
        above: Ask only if the images of one message of the agent cost more than this together, in the platform's currency. Images
            of unknown price are always asked for. None: always ask.
        allowed_decisions: What the person may decide.

    Returns:
        An `InterruptOnConfig` of LangChain, a plain dict.

    Raises:
        CogViewConfigurationError: `above` is not an amount of money, or the middleware has no image tool.

    Example:
        >>> approval = {tool.name: spending_approval(tool, above="0.20")}    # doctest: +SKIP
        >>> create_agent(model, tools=[tool], middleware=[HumanInTheLoopMiddleware(approval)])    # doctest: +SKIP
    """
    try:
        limit = None if above is None else checked_amount(above)
    except ValueError as error:
        raise CogViewConfigurationError(
            f"above= is {printable(str(above), 40)!r}. {error}", hint="Pass an amount such as '0.20'."
        ) from None
    source: Any = tool  # the module of the middleware is not loaded here, because it needs LangChain

    def limited(state: Any) -> CogViewImageTool:
        found: CogViewImageTool = source.limited_tool(state) if hasattr(source, "limited_tool") else source
        return found

    limited({})  # a middleware without an image tool is refused now

    def estimated(call: Mapping[str, Any], state: Any) -> Estimate | None:
        arguments = call.get("args")
        if not isinstance(arguments, Mapping):
            return None
        values = {name: arguments.get(name) for name in ("prompt", "size", "quality")}
        try:
            return limited(state).estimate(str(values.pop("prompt")), **values)
        except (CogViewInvalidRequestError, CogViewBudgetError):  # the tool refuses such a call too
            return None

    def describe(tool_call: Mapping[str, Any], state: Any, runtime: Any) -> str:  # noqa: ARG001  LangChain passes them
        prompt = printable(str((tool_call.get("args") or {}).get("prompt", "")), _PROMPT_CHARACTERS)
        return f"{estimated(tool_call, state) or 'The arguments are not legal; nothing would be charged.'}\nPrompt: {prompt}"

    # LangChain asks again when the run resumes, and needs the same answer: it depends on the message alone, not on what is spent.
    def is_expensive(request: Any) -> bool:
        estimate = estimated(request.tool_call, request.state)
        if estimate is None:
            return False
        if limit is None or estimate.total.amount is None:
            return True
        # The call may be one of a toolkit's, whose name is another.
        calls = [call for call in _calls_of(request) if call.get("name") == request.tool_call["name"]]
        together = [found.total for call in calls if (found := estimated(call, request.state))] or [estimate.total]
        return any(money.amount is None for money in together) or sum(money.amount or 0 for money in together) > limit

    return {"allowed_decisions": list(allowed_decisions), "description": describe, "when": is_expensive}


def _calls_of(request: Any) -> list[Mapping[str, Any]]:
    """Return the tool calls of the message to which a request of LangChain belongs."""
    state = request.state
    messages = state.get("messages", ()) if isinstance(state, Mapping) else getattr(state, "messages", ())
    for message in reversed(messages or ()):
        calls = getattr(message, "tool_calls", None)
        if calls:
            return list(calls)
    return [request.tool_call]
