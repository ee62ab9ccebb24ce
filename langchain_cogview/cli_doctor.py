"""`cogview doctor`: what stands between this machine and a picture, to be pasted into a bug report."""

from __future__ import annotations

from typing import Annotated

import typer

from langchain_cogview.shell import exit_code, finish, in_shell_words, json_text, write


def doctor(
    *,
    region: Annotated[str | None, typer.Option(help="china or international. Default: as the key that is set.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Default: COGVIEW_BASE_URL, else the region's.")] = None,
    sandbox: Annotated[
        bool, typer.Option("--sandbox", help="Look at the sandbox instead: no key, no network.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Ask nobody: versions and settings only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")] = False,
) -> None:
    """Check versions, settings, network and key. Makes no picture and costs nothing.

    Of the key it shows where it comes from and the last four characters. It asks no host but the API's, and that for something
    that must be refused.
    """
    if base_url is not None and (sandbox or not base_url.strip()):
        raise typer.BadParameter("--base-url needs a URL, and does not go with --sandbox.")
    if region not in {None, "china", "international"}:
        raise typer.BadParameter("--region is china or international.")
    finish(lambda: _doctor(region, "sandbox:" if sandbox else base_url, offline=offline, as_json=as_json))


def _doctor(region: str | None, base_url: str | None, *, offline: bool, as_json: bool) -> int:
    from langchain_cogview.doctor import diagnose  # noqa: PLC0415
    from langchain_cogview.errors import error_class  # noqa: PLC0415

    diagnosis = diagnose(base_url=base_url, region=region, offline=offline)  # type: ignore[arg-type]
    written = write(json_text(diagnosis.to_dict()) if as_json else in_shell_words(str(diagnosis)))
    failed = diagnosis.first_failed
    return exit_code(error_class(failed.error)) if failed else written
