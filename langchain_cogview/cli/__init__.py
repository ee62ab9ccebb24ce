"""The `cogview` command: images from a shell, batches, and the tool's JSON schema. Typer is the extra `cli`."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

from langchain_cogview.catalog import DEFAULT_MODEL
from langchain_cogview.cli.output import (
    EXIT_CODES,
    Terminal,
    detect_terminal,
    exit_code,
    hint_of,
    inline_image,
    json_text,
    open_file,
    path_link,
    print_stderr,
    print_stdout,
    print_warning,
    run_command,
    shows_on_terminal,
    with_cli_options,
    write_stdout,
)
from langchain_cogview.cli.style import columns_of, dimmed, is_terminal, spinner, terminal_width, wrapped
from langchain_cogview.text import moment_text, visible

try:
    import typer
    from typer.core import TyperCommand, TyperGroup

    from langchain_cogview.cli.completion import complete_model, complete_quality, complete_region, complete_size
except ImportError:
    typer = None  # type: ignore[assignment]
    TyperCommand = TyperGroup = object  # type: ignore[assignment,misc]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_cogview.result import GeneratedImage

TYPER_MISSING: Final = 'The cogview command needs typer. Install it with: pip install "langchain-cogview[cli]"'


_PASTED_COLUMNS: Final = 80
_CLOSE: Final = 0.75
"""Similarity from 0 to 1 above which a word is taken for a mistyped command."""


class PlainFlags:
    """A command whose help shows plain types, and none beside an option that takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """List the parameters, as typer does.

        Returns:
            The parameters, with the option for help.
        """
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            elif param.metavar is None and getattr(param, "min", None) is not None:  # its limits stand in the help
                param.metavar = "<int>"
        return params


class Command(PlainFlags, TyperCommand):
    """One command."""


class GenerateCommand(Command):
    """The command `generate`, which takes one prompt."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; say how to quote a prompt of several words.

        Returns:
            The remaining arguments, of which there are none.
        """
        ctx.allow_extra_args = True
        others: list[str] = super().parse_args(ctx, args)
        if others and not ctx.resilient_parsing:
            words = visible(" ".join((str(ctx.params["prompt"]), *others)))
            ctx.fail(f"The prompt is one argument. Put it in quotes: cogview {_quoted(words)}")
        return others


def _quoted(text: str) -> str:
    # Double quotes work in every shell, single ones do not in that of Windows.
    return shlex.quote(text) if any(character in text for character in '"$`!\\%') else f'"{text}"'


class GenerateByDefault(PlainFlags, TyperGroup):
    """The group of commands; arguments that name no command belong to `generate`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the name of the default command.

        Returns:
            The remaining arguments.
        """
        if not args:
            args = ["--help"]
        elif args[0] == "help":
            args = [*(word for word in args[1:2] if word in self.commands), "--help"]
        elif args == ["version"]:
            args = ["--version"]
        elif args[0] not in {
            *self.commands,
            *ctx.help_option_names,
            *(name for option in self.params for name in option.opts),
        }:
            close = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=_CLOSE)
            if close:  # sending a mistyped command as a prompt would cost money
                ctx.fail(
                    f"Did you mean the command {close[0]}? To use the word as a prompt: cogview generate {args[0]}"
                )
            args = ["generate", *args]
        return super().parse_args(ctx, args)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the arguments; a usage error looks like every other error.

        Returns:
            The context.
        """
        with _short_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; its usage errors look like every other error too.

        Returns:
            The command's result.
        """
        with _short_usage_errors():
            return super().invoke(ctx)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete the first word: a command, an option of the group, or an option of `generate`.

        Returns:
            The candidates.
        """
        command = self.commands["generate"]
        return [
            *super().shell_complete(ctx, incomplete),
            *command.shell_complete(command.context_class(command), incomplete),
        ]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Use the usage line of `generate`.

        Returns:
            The pieces of the line.
        """
        return self.commands["generate"].collect_usage_pieces(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show one page for everything: the options of `generate` together with those of the group."""
        page = copy.copy(self)
        page.params = [*self.commands["generate"].params, *self.params]
        super(GenerateByDefault, page).format_help(ctx, formatter)


@contextlib.contextmanager
def _short_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if not hasattr(error, "format_message") or not isinstance(message, str):
            raise
        context = getattr(error, "ctx", None)
        text = visible(error.format_message()).removeprefix("Invalid value: ").rstrip()
        text = text if text.endswith((".", "?", "!", '"')) else f"{text}."
        command = context.command_path if context else "cogview"
        print_stderr(f"Error: {text}", f"To see the options: {command} --help")
        raise typer.Exit(2) from None


def application() -> typer.Typer:
    """Build the command as a typer application. Its help is plain text unless both outputs are terminals.

    Returns:
        The application.
    """
    terminal = all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
    codes = "\n".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items())
    app = typer.Typer(
        cls=GenerateByDefault,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if terminal else None,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=("" if terminal else "\b\n") + f"Exit codes (of several images, the highest):\n{codes}",
    )
    app.callback(invoke_without_command=True)(_common)
    app.command("generate", cls=GenerateCommand)(generate)
    app.command("schema", cls=Command)(schema)
    from langchain_cogview.cli.batch import batch, merge, work  # noqa: PLC0415  which needs typer

    app.command("batch", cls=Command)(batch)
    app.command("work", cls=Command)(work)
    app.command("merge", cls=Command)(merge)
    app.command("doctor", cls=Command)(check)
    from langchain_cogview.cli.mcp import mcp  # noqa: PLC0415

    app.command("mcp", cls=Command)(mcp)
    return app


def main() -> int:
    """Run the command with the arguments of this process.

    Returns:
        2 if typer is missing; otherwise typer ends the process.
    """
    if typer is None:
        print_stderr(TYPER_MISSING)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may have bytes or characters that the stream's encoding lacks
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")
    application()(prog_name="cogview")
    return 0


def _common(*, version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Generate images with Zhipu's CogView. The key is read from ZHIPUAI_API_KEY or ZAI_API_KEY."""
    if version:
        from importlib.metadata import version as installed  # noqa: PLC0415

        raise typer.Exit(print_stdout(f"langchain-cogview {installed('langchain-cogview')}"))


def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Description of the image; - reads the standard input.")
    ],
    *,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="File (replaced if it exists), folder, or - for the standard output."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="For example 1024x1024, 16:9, square, portrait or landscape.", autocompletion=complete_size),
    ] = None,
    quality: Annotated[str | None, typer.Option(help="standard or hd.", autocompletion=complete_quality)] = None,
    model: Annotated[
        str, typer.Option(help="One of the provider's image models.", autocompletion=complete_model)
    ] = DEFAULT_MODEL,
    n: Annotated[int, typer.Option("--n", help="Number of images (a.png, a-2.png, ...), each at full price.")] = 1,
    user_id: Annotated[str | None, typer.Option(help="The end user, for abuse reports; 6 to 128 characters.")] = None,
    region: Annotated[
        str | None,
        typer.Option(
            help="china or international. Default: the region of the key that is set.", autocompletion=complete_region
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Default: COGVIEW_BASE_URL, else the region's URL.")] = None,
    timeout: Annotated[float, typer.Option(help="Total time limit for one image, in seconds.")] = 120.0,
    sandbox: Annotated[
        bool, typer.Option("--sandbox", help="Generate a placeholder offline: no key, no cost.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the whole result as JSON instead of the path.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show/--no-show", help="Show the image in the terminal (kitty, iTerm2).")
    ] = True,
    open_saved: Annotated[bool, typer.Option("--open", help="Open the saved file in the system's viewer.")] = False,
) -> None:
    """Generate an image. The word generate may be omitted, unless the prompt is help or the name of a command."""
    if base_url is not None and (sandbox or not base_url.strip()):
        raise typer.BadParameter("--base-url needs a URL and cannot be combined with --sandbox.")
    if output == "-":
        _check_bytes_can_be_written(alone=n == 1 and not as_json and not open_saved)
    overrides = {"size": size, "quality": quality, "user_id": user_id, "region": region}
    overrides["base_url"] = "sandbox:" if sandbox else base_url
    settings: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    settings |= {"model": model, "n": n, "timeout": timeout}
    try:
        text = prompt if prompt != "-" else sys.stdin.read().rstrip("\r\n") if sys.stdin else ""
    except UnicodeDecodeError:
        raise typer.BadParameter("The prompt on the standard input is not valid UTF-8.") from None
    display = _Display(show=show and not as_json, open_saved=open_saved, as_json=as_json)
    run_command(lambda: _generate(text, output, settings, display))


def schema(
    model: Annotated[
        str, typer.Option(help="The model that the tool uses.", autocompletion=complete_model)
    ] = DEFAULT_MODEL,
) -> None:
    """Write the tool's JSON schema, as a chat model receives it. Needs no key."""
    run_command(lambda: _schema(model))


def _schema(model: str) -> int:
    from langchain_core.utils.function_calling import convert_to_openai_tool  # noqa: PLC0415

    from langchain_cogview.tool import CogViewImageTool  # noqa: PLC0415

    return print_stdout(json_text(convert_to_openai_tool(CogViewImageTool(base_url="sandbox:", model=model))))


def check(
    *,
    region: Annotated[
        str | None,
        typer.Option(
            help="china or international. Default: the region of the key that is set.", autocompletion=complete_region
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Default: COGVIEW_BASE_URL, else the region's URL.")] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox", help="Check the sandbox instead: no key, no network.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Send nothing: check versions and settings only.")] = False,
    paid: Annotated[
        bool,
        typer.Option(
            "--paid",
            help="After a question with the price, make one image of the cheapest model and compare the service.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --paid: do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")] = False,
) -> None:
    """Check versions, settings, network and key. Without --paid it generates no image and costs nothing.

    Shows where the key comes from and its last four characters. Contacts only the API's host, with a request that the API must
    refuse. --paid says the price and asks; it then prints what is documented and what the service did, without anything secret.
    """
    if base_url is not None and (sandbox or not base_url.strip()):
        raise typer.BadParameter("--base-url needs a URL and cannot be combined with --sandbox.")
    if region not in {None, "china", "international"}:
        raise typer.BadParameter("--region is china or international.")
    if (paid and offline) or (yes and not paid):
        raise typer.BadParameter("--paid cannot be combined with --offline, and --yes needs --paid.")
    base_url = "sandbox:" if sandbox else base_url
    run_command(lambda: _check(region, base_url, offline=offline, as_json=as_json, paid=paid, yes=yes))


def _check(region: str | None, base_url: str | None, *, offline: bool, as_json: bool, paid: bool, yes: bool) -> int:
    from langchain_cogview.cli.doctor import diagnose  # noqa: PLC0415
    from langchain_cogview.errors import error_class  # noqa: PLC0415

    diagnosis = diagnose(base_url=base_url, region=region, offline=offline)  # type: ignore[arg-type]
    failed = diagnosis.first_failed
    content = diagnosis.to_dict()
    written = 0 if as_json and paid and not failed else _write_check(str(diagnosis), content if as_json else None)
    if failed:
        print_stderr("Nothing was paid, because of the problem above." if paid else "")
        return exit_code(error_class(failed.error))
    return max(written, _check_paid(region, base_url, content if as_json else None, yes=yes)) if paid else written


def _write_check(text: str, content: dict[str, Any] | None) -> int:
    """Return the exit code of writing a check: as JSON, or as text in lines that fit when they are pasted."""
    if content is not None:
        return print_stdout(json_text(content))
    return print_stdout(wrapped(visible(with_cli_options(text)), _PASTED_COLUMNS), wrap=True)


def _check_paid(region: str | None, base_url: str | None, content: dict[str, Any] | None, *, yes: bool) -> int:
    from langchain_cogview.api.settings import region_of  # noqa: PLC0415
    from langchain_cogview.cli.doctor import find_service  # noqa: PLC0415
    from langchain_cogview.cli.paid import Fact, PaidCheck, PaidImageLostError, facts_as_json, report_text  # noqa: PLC0415

    service, _ = find_service(base_url, region)  # type: ignore[arg-type]
    if service is None:  # which the diagnosis has reported
        return 2
    check = PaidCheck.of(service, region_of(service.base_url, region))  # type: ignore[arg-type]
    if not yes and not _agreed(check.question):
        return 2
    facts: list[Fact] = []
    code = 0
    try:
        with spinner("Making one image, and some requests that cost nothing"):
            for fact in check.run():  # what was seen before an error is shown too
                facts.append(fact)  # noqa: PERF402
    except PaidImageLostError as error:
        print_stderr(f"Error: {error}")
        code = 6
    finally:
        if content is not None:
            _write_check("", content | {"paid": facts_as_json(facts)})
        elif facts:
            _write_check(f"\n{report_text(facts)}", None)
    return code


def _agreed(question: str) -> bool:
    """Return whether the user agrees on the terminal; without one, nobody can."""
    if not is_terminal(sys.stdin):
        what = question.removesuffix(" Continue?")
        print_stderr(
            "Error: Nothing was paid, because there is no terminal to ask on.", f"{what} In a script, add --yes."
        )
        return False
    print_stderr(question)
    sys.stderr.write("Type y and Enter to continue: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in {"y", "yes"}:
        return True
    print_stderr("Nothing was paid.")
    return False


class _Display(NamedTuple):
    """What happens to an image besides saving it."""

    show: bool
    open_saved: bool
    as_json: bool


def _check_bytes_can_be_written(*, alone: bool) -> None:
    if not alone:
        raise typer.BadParameter(
            "-o - writes the bytes of one image and cannot be combined with --n, --json or --open."
        )
    if sys.stdout is None or sys.stdout.isatty():
        raise typer.BadParameter("-o - writes binary data, which a terminal cannot show: pipe it, or name a file.")


def _generate(prompt: str, output: str | None, settings: dict[str, Any], display: _Display) -> int:
    from langchain_cogview.errors import error_class  # noqa: PLC0415
    from langchain_cogview.generator import CogViewImageGenerator  # noqa: PLC0415

    generator = CogViewImageGenerator(**settings)
    target = None if output == "-" else _target(output)
    with spinner("Making the image" if generator.n == 1 else f"Making {generator.n} images"):
        result = generator.invoke(prompt)
    codes, images = [0], []
    for number, image in enumerate(result.images, 1):
        written = output == "-" and _write_bytes(image)
        path = None if written else _save(image, number, target, codes)
        image = _as_saved(image, path)  # noqa: PLW2901
        images.append(image)
        if path and output == "-":
            print_stderr("" if any(codes) else f"The image was generated and saved as {path}")
            codes.append(6)
        elif path and not display.as_json:
            codes.append(_show_path(image, path, show=display.show))
        if path and display.open_saved and (problem := open_file(path)):
            print_warning(f"{path} could not be opened: {problem}.")
        print_stderr(*(f"Content filter: {entry}" for entry in image.content_filter))
    for item in result.warnings:
        print_warning(item)
    is_marked = shows_on_terminal() and output != "-" and not display.as_json  # in the line of the image
    print_stderr("Sandbox: this is a placeholder, not a real image." if result.sandbox and not is_marked else "")
    for failure in result.failures:
        which, kind = f"Image {failure.index + 1} of {generator.n}", error_class(failure.error)
        hint = hint_of(kind, failure.hint)
        print_stderr(f"Error: {which} was not generated. {failure.message} {hint} Request id: {failure.request_id}")
        codes.append(exit_code(kind))
    if display.as_json:
        codes.append(print_stdout(json_text(result.model_copy(update={"images": tuple(images)}).to_artifact())))
    return max(codes)


def _as_saved(image: GeneratedImage, path: Path | None) -> GeneratedImage:
    """Return the image with its file, which may be in another format than the service made."""
    from langchain_cogview.images.formats import EXTENSIONS, sniff  # noqa: PLC0415

    facts: dict[str, Any] = {"path": path}
    if path and path.suffix.lower().replace(".jpeg", ".jpg") != EXTENSIONS.get(image.mime_type or ""):
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            facts |= {"sha256": digest, "size_bytes": len(content), "mime_type": sniff(content[:32])}
    return image.model_copy(update=facts)


def _write_bytes(image: GeneratedImage) -> bool:
    content = image.local_bytes()
    return content is not None and write_stdout(content)


def _show_path(image: GeneratedImage, path: Path, *, show: bool) -> int:
    """Return the exit code of writing the path: alone for a program; with facts for people, below the image if possible."""
    if not shows_on_terminal():
        code = print_stdout(str(path))
        print_stderr(f"{path}  {_facts(image)}" if is_terminal(sys.stderr) and not code else "")
        return code
    terminal = detect_terminal(os.environ, is_terminal=True)
    content = image.local_bytes() if show and image.width and image.height else None
    sequence = ""
    if content is not None:
        size = (image.width or 1, image.height or 1)
        sequence = inline_image(terminal, content, size, shutil.get_terminal_size())
    facts = _facts(image)
    fits = columns_of(f"{path}  {facts}") <= terminal_width(sys.stdout)
    link = visible(str(path)) if terminal is Terminal.PLAIN else path_link(terminal, path)
    between = "  " if fits else "\n  "
    return print_stdout(f"{sequence}{link}{between}{dimmed(facts, sys.stdout)}", sequences=True)


def _facts(image: GeneratedImage) -> str:
    from langchain_cogview.notebook.display import cost_text  # noqa: PLC0415

    facts = [f"{image.width}x{image.height}" if image.width and image.height else image.size or ""]
    facts.append(f"{image.size_bytes / 1000:,.0f} kB" if image.size_bytes else "")
    facts.append(f"{image.seconds:.1f} s" if image.seconds is not None else "")
    facts.append("sandbox placeholder, no cost" if image.sandbox and not image.cached else cost_text(image))
    return ", ".join(filter(None, facts))


def _target(output: str | None) -> Path | None:
    """Determine where the image is saved, and check that before anything is paid for.

    Returns:
        The file or folder; None for the current folder.

    Raises:
        CogViewConfigurationError: The image cannot be saved there.
    """
    from langchain_cogview.errors import CogViewConfigurationError  # noqa: PLC0415

    problem = "it is not a file name" if output == "" else ""
    try:
        target = Path(output or "").expanduser()
        if output and output.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = target.stat().st_mode
            problem = problem or ("" if S_ISREG(mode) or S_ISDIR(mode) else "it is neither a file nor a folder")
        folder = target if target.is_dir() else target.parent
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            problem = problem or f"{there.absolute()} is not a folder that can be written to"
    except (OSError, RuntimeError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error).rstrip(".")
    if problem:
        raise CogViewConfigurationError(
            f"The image cannot be written to {output or 'the current folder'}: {problem}.",
            hint="Nothing was sent. Choose another file or folder with -o.",
        )
    return target if output else None


def _save(image: GeneratedImage, number: int, target: Path | None, codes: list[int]) -> Path | None:
    """Return the file with the image: the target, else in the current folder, else in the temporary directory, else None."""
    from langchain_cogview.errors import CogViewStorageError  # noqa: PLC0415

    name = f"cogview-{image.id}"
    target = target or Path(name)
    if number > 1 and target.name != name and not target.is_dir():
        target = target.with_stem(f"{target.stem}-{number}")
    for candidate in (target, Path(name), None) if image.local_bytes() is not None else ():
        try:
            path = image.save(candidate or Path(tempfile.gettempdir(), name))
        except (CogViewStorageError, OSError) as error:
            print_stderr(f"Error: {getattr(error, 'message', error)}")
            continue
        if candidate is not target:
            print_stderr(f"The image was generated and saved as {path}")
            codes.append(6)
        return path
    until = f" (until {moment_text(image.expires_at)})" if image.expires_at else ""
    print_stderr(f"The image was generated, but could not be saved. Its URL{until}: {image.url}")
    codes.append(6)
    return None
