"""Better prompts: rewritten by a chat model with quoted text kept word for word, or with a named style appended."""

import asyncio

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda

from langchain_cogview import CogViewConfigurationError, CogViewImageGenerator, CogViewImageTool, ImageResult
from langchain_cogview.enhance import STYLES, quoted_texts

both = pytest.mark.parametrize("how", ["sync", "async"])


class Answers:
    """A chat model that counts its calls."""

    def __init__(self, answer):
        self.asked = []

        def respond(messages):
            self.asked.append(messages)
            if isinstance(answer, Exception):
                raise answer
            return answer

        self.model = RunnableLambda(respond)


def made(generator, how, prompt="a kitten"):
    return generator.invoke(prompt) if how == "sync" else asyncio.run(generator.ainvoke(prompt))


def generator_of(sandbox, chat_model, **settings):
    return CogViewImageGenerator(base_url=sandbox.base_url, enhance=chat_model, **settings)


def sent(sandbox):
    return [request.body["prompt"] for request in sandbox.requests]


@both
def test_the_rewritten_prompt_is_sent_and_the_original_is_kept(sandbox, how):
    chat = FakeListChatModel(responses=["A tabby kitten on a windowsill in morning light"])
    result = made(generator_of(sandbox, chat), how)
    assert sent(sandbox) == ["A tabby kitten on a windowsill in morning light"] == [result.prompt]
    assert result.original_prompt == "a kitten"
    assert result.to_artifact()["original_prompt"] == "a kitten"
    assert ImageResult.from_artifact(result.to_artifact()).original_prompt == "a kitten"


@both
def test_a_prompt_is_rewritten_once(sandbox, how):
    chat = Answers(AIMessage("a fine kitten"))
    generator = generator_of(sandbox, chat.model, n=2)
    for _ in range(3):
        assert made(generator, how).prompt == "a fine kitten"
    assert len(chat.asked) == 1
    assert chat.asked[0][-1].content == "a kitten"


@both
@pytest.mark.parametrize(
    "prompt", ['a sign "OPEN 24/7"', "a sign “Zum Löwen”", "招牌上写着「欢迎光临」", 'two signs "A" and "B"']
)
def test_quoted_text_is_kept_word_for_word_or_the_prompt_stays(sandbox, how, prompt):
    kept = prompt + ", at night, neon light"
    assert made(generator_of(sandbox, Answers(AIMessage(kept)).model), how, prompt).prompt == kept
    result = made(generator_of(sandbox, Answers(AIMessage('a sign "CLOSED"')).model), how, prompt)
    assert (result.prompt, result.original_prompt) == (prompt, None)
    assert "did not keep the quoted text" in result.warnings[0]


@both
@pytest.mark.parametrize(
    "answer", ["", "   ", "x" * 2000, RuntimeError("no key"), TimeoutError(), AIMessage([]), 5, "half \ud83d"]
)
def test_a_chat_model_that_fails_costs_no_image(sandbox, how, answer):
    result = made(generator_of(sandbox, Answers(answer).model, model="glm-image", use_tasks=False), how)
    assert (result.prompt, result.original_prompt) == ("a kitten", None)
    assert len(result.warnings) == 1
    assert "The prompt was not rewritten" in result.warnings[0]
    assert sandbox.images_made == 1


@both
def test_a_code_fence_around_the_answer_is_removed(sandbox, how):
    assert made(generator_of(sandbox, Answers("```text\na fine kitten\n```").model), how).prompt == "a fine kitten"


def test_an_illegal_request_costs_no_call_of_the_chat_model(sandbox):
    chat = Answers("a fine kitten")
    with pytest.raises(ValueError, match="blank"):
        generator_of(sandbox, chat.model).invoke(" ")
    assert chat.asked == []


def test_a_submitted_task_keeps_the_original_prompt(sandbox):
    task = generator_of(sandbox, Answers("a fine kitten").model, model="glm-image").submit("a kitten")
    assert (task.result().prompt, task.result().original_prompt) == ("a fine kitten", "a kitten")


def test_what_is_no_chat_model_is_refused(sandbox):
    with pytest.raises(CogViewConfigurationError, match="enhance= takes a chat model"):
        generator_of(sandbox, "openai:gpt-5")


def test_an_agents_tool_rewrites_too(sandbox, tmp_path):
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, enhance=Answers("a fine kitten").model)
    call = {"type": "tool_call", "name": tool.name, "id": "1", "args": {"prompt": "a kitten"}}
    assert tool.invoke(call).artifact["original_prompt"] == "a kitten"


def test_quotes_are_found_in_every_script():
    assert quoted_texts('"a" “b” 「c」 『d』 «e» it\'s "f g"') == ["a", "b", "c", "d", "e", "f g"]
    assert quoted_texts("„a“ und „b“, „c” »d« oder »e« ＂f＂") == list("abcdef")


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("a kitten", '"A tabby kitten, by day."', "A tabby kitten, by day."),
        ("a kitten", "“A tabby kitten, by day.”", "A tabby kitten, by day."),
        ("a kitten", '"Hello", says a "kitten"', '"Hello", says a "kitten"'),
        ('"OPEN"', '"OPEN"', '"OPEN"'),
    ],
)
def test_quotation_marks_around_the_whole_answer_are_removed(sandbox, prompt, answer, expected):
    assert made(generator_of(sandbox, FakeListChatModel(responses=[answer])), "sync", prompt).prompt == expected


# --- styles


@both
@pytest.mark.parametrize("style", list(STYLES))
def test_a_style_is_appended_to_every_prompt(sandbox, tmp_path, how, style):
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, style=style)
    tool.invoke({"prompt": "a kitten"}) if how == "sync" else asyncio.run(tool.ainvoke({"prompt": "a kitten"}))
    assert sent(sandbox) == [f"a kitten Style: {STYLES[style]}."]


@both
@pytest.mark.parametrize("ending", ["", f" Style: {STYLES['oil']}."])
def test_a_style_stays_when_a_chat_model_rewrites_the_prompt(sandbox, tmp_path, how, ending):
    chat = FakeListChatModel(responses=[f"A tabby kitten.{ending}"])
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, enhance=chat, style="oil")
    made(tool, how, {"prompt": "a kitten"})
    assert sent(sandbox) == [f"A tabby kitten. Style: {STYLES['oil']}."]


def test_an_unknown_style_is_refused_with_the_known_ones(sandbox):
    with pytest.raises(ValueError, match="watercolor"):
        CogViewImageTool(base_url=sandbox.base_url, style="baroque")


def test_a_style_leaves_less_room_for_the_prompt(sandbox, tmp_path):
    tool = CogViewImageTool(base_url=sandbox.base_url, output_dir=tmp_path, model="glm-image", style="photo")
    available = 1000 - len(f" Style: {STYLES['photo']}.")
    assert f"At most {available} characters." in tool.args["prompt"]["description"]
    assert "Made 1 image" in tool.invoke({"prompt": "x" * available})
    assert "No image was made" in tool.invoke({"prompt": "x" * (available + 1)})
    assert sandbox.images_made == 1


def test_the_model_is_told_to_quote_text_that_appears_in_the_image(sandbox):
    assert "double quotes" in CogViewImageTool(base_url=sandbox.base_url).args["prompt"]["description"]
