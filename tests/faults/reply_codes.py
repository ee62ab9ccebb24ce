"""Replies whose status, business code or Retry-After decides."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Final

from tests.faults.reply_table import (
    AMPLE,
    ANY_FINAL,
    AT_ONCE,
    AUTHENTICATION,
    BALANCE,
    BUSY,
    CONFIGURATION,
    FILTER,
    GOOD,
    INVALID,
    MALFORMED,
    NOT_FOUND,
    PERMISSION,
    RATE,
    RESULT,
    SERVER,
    SERVER_WORDS,
    SHORT,
    TOO_LONG,
    UNKNOWN,
    UNSURE,
    WAITED_FOR,
    add,
    error,
    in_turn,
    raw,
    reply_fault,
    says,
    sends,
)
from tests.faults.server import Connection, Request, success

# Statuses, without a body, with an error of no code, and with HTML.

_STATUSES: Final[dict[int, tuple[str, ...]]] = {
    200: (MALFORMED,),
    201: (MALFORMED,),
    202: (MALFORMED,),
    203: (MALFORMED,),
    204: (MALFORMED,),
    206: (MALFORMED,),
    226: (MALFORMED,),
    300: (CONFIGURATION,),
    301: (CONFIGURATION,),
    302: (CONFIGURATION,),
    303: (CONFIGURATION,),
    304: (CONFIGURATION,),
    307: (CONFIGURATION,),
    308: (CONFIGURATION,),
    400: (INVALID,),
    401: (AUTHENTICATION,),
    402: (BALANCE, PERMISSION),
    403: (PERMISSION,),
    404: (NOT_FOUND,),
    405: (*ANY_FINAL, CONFIGURATION),
    406: (*ANY_FINAL, CONFIGURATION),
    407: (*ANY_FINAL, CONFIGURATION),
    408: (UNKNOWN,),
    409: (*ANY_FINAL, UNKNOWN),
    410: ANY_FINAL,
    411: ANY_FINAL,
    413: ANY_FINAL,
    414: ANY_FINAL,
    415: ANY_FINAL,
    418: ANY_FINAL,
    421: (*ANY_FINAL, CONFIGURATION),
    422: (INVALID,),
    425: (*ANY_FINAL, UNKNOWN),
    428: ANY_FINAL,
    431: ANY_FINAL,
    451: ANY_FINAL,
    499: (*ANY_FINAL, UNKNOWN),
    500: (UNKNOWN,),
    501: (UNKNOWN,),
    502: (UNKNOWN,),
    504: (UNKNOWN,),
    505: (UNKNOWN,),
    507: (UNKNOWN,),
    511: (UNKNOWN,),
    520: (UNKNOWN,),
    522: (UNKNOWN,),
    524: (UNKNOWN,),
    529: (UNKNOWN,),
    530: (UNKNOWN,),
    599: (UNKNOWN,),
}
for _status, _expected in _STATUSES.items():
    _body = b"" if _status in (204, 304) else json.dumps({"error": {"message": SERVER_WORDS}}).encode()
    add(f"{_status} without a body", sends(b"", _status), *_expected)
    if _body:
        add(
            f"{_status} with an error without code",
            sends(_body, _status, "Content-Type: application/json"),
            *((UNKNOWN,) if _status < 300 else _expected),
        )
for _status in (400, 401, 403, 404, 429, 500, 502, 503, 504):
    _page = f"<html><body><h1>{_status}</h1>{SERVER_WORDS}</body></html>".encode()
    _known = {429: (RATE,), 503: (SERVER,)}.get(_status) or _STATUSES[_status]
    _times = 3 if _status in (429, 503) else 1
    add(
        f"{_status} with an HTML page", sends(_page, _status, "Content-Type: text/html", AT_ONCE), *_known, posts=_times
    )
for _status, _class in ((429, RATE), (503, SERVER)):
    add(f"{_status} without a body", sends(b"", _status, AT_ONCE), _class, posts=3)
    add(f"{_status} with an error without code", says({"error": {"message": "x"}}, _status, AT_ONCE), _class, posts=3)
    add(
        f"{_status} without Retry-After",
        says(error("1302"), 429) if _status == 429 else sends(b"", 503),
        _class,
        **(WAITED_FOR if _status == 429 else {"posts": (1, 3), "timeout": SHORT}),
    )
    add(f"{_status} once, then good", in_turn(says({}, _status, AT_ONCE), success), RESULT, posts=2)
    add(
        f"{_status} twice, then good",
        in_turn(says({}, _status, AT_ONCE), says({}, _status, AT_ONCE), success),
        RESULT,
        posts=3,
    )
    add(f"{_status}, then 500", in_turn(says({}, _status, AT_ONCE), says({}, 500)), UNKNOWN, posts=2)
    add(
        f"{_status}, then a blocked prompt",
        in_turn(says({}, _status, AT_ONCE), says(error("1301"), 400)),
        FILTER,
        posts=2,
    )
    add(
        f"{_status}, then silence",
        in_turn(says({}, _status, AT_ONCE), lambda connection, _: connection.hang()),
        UNKNOWN,
        posts=2,
        timeout=SHORT,
    )
add("201 with an image", says(GOOD, 201), RESULT)
add("202 with an image", says(GOOD, 202), RESULT, *UNSURE)
add("101 that switches protocols", raw(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), *UNSURE)
add("a status of 600", sends(b"", 600), *UNSURE)
add("a status of 999", sends(b"{}", 999), *UNSURE)
add("a status of 099", raw(b"HTTP/1.1 099 What\r\nContent-Length: 0\r\n\r\n"), *UNSURE)

# Business codes, in agreement with the status and against it.

_CODES: Final[dict[str, tuple[int, str, int]]] = {
    "1000": (401, AUTHENTICATION, 1),
    "1001": (401, AUTHENTICATION, 1),
    "1002": (401, AUTHENTICATION, 1),
    "1003": (401, AUTHENTICATION, 1),
    "1004": (401, AUTHENTICATION, 1),
    "1005": (401, AUTHENTICATION, 1),
    "401": (401, AUTHENTICATION, 1),
    "1110": (403, PERMISSION, 1),
    "1111": (403, PERMISSION, 1),
    "1112": (403, PERMISSION, 1),
    "1113": (429, BALANCE, 1),
    "1120": (403, PERMISSION, 1),
    "1121": (403, PERMISSION, 1),
    "1210": (400, INVALID, 1),
    "1212": (400, INVALID, 1),
    "1213": (400, INVALID, 1),
    "1214": (400, INVALID, 1),
    "1215": (400, INVALID, 1),
    "1231": (400, INVALID, 1),
    "1211": (400, NOT_FOUND, 1),
    "1221": (404, NOT_FOUND, 1),
    "1222": (404, NOT_FOUND, 1),
    "1220": (403, PERMISSION, 1),
    "1261": (400, TOO_LONG, 1),
    "1300": (400, FILTER, 1),
    "1301": (400, FILTER, 1),
    "1302": (429, RATE, 3),
    "1303": (429, RATE, 3),
    "1304": (429, BALANCE, 1),
    "1305": (429, BUSY, 3),
    "1312": (429, BUSY, 3),
    "1200": (500, UNKNOWN, 1),
    "1230": (500, UNKNOWN, 1),
    "1234": (500, UNKNOWN, 1),
    **{str(code): (429, BALANCE, 1) for code in (1308, 1309, 1310, 1311, *range(1313, 1322))},
}
for _code, (_status, _class, _times) in _CODES.items():
    _more = WAITED_FOR if _code == "1302" else {"posts": _times}
    add(f"code {_code} with {_status}", says(error(_code), _status, AT_ONCE), _class, **_more)
for _code in ("1000", "1113", "1211", "1214", "1220", "1261", "1301", "1302", "1305", "1200", "1234"):
    _, _class, _times = _CODES[_code]
    for _status in (200, 400, 429, 500, 503):
        if _CODES[_code][0] != _status:
            _more = WAITED_FOR if _code == "1302" else {"posts": _times}
            add(f"code {_code} against {_status}", says(error(_code), _status, AT_ONCE), _class, **_more)
add("code 401 inside a 200", says(error("401")), AUTHENTICATION)
add("code 1302 as an integer", says(error(1302), 429, AT_ONCE), RATE, **WAITED_FOR)
add("code 1113 as an integer", says(error(1113), 429, AT_ONCE), BALANCE)
add("code 1301 as an integer inside a 200", says(error(1301)), FILTER)
add("unknown code with 400", says(error("1999"), 400), INVALID)
add("unknown code with 429", says(error("1999"), 429, AT_ONCE), RATE, posts=3)
add("unknown code with 500", says(error("1999"), 500), UNKNOWN)
add("unknown code with 503", says(error("1999"), 503, AT_ONCE), SERVER, posts=3)
add("unknown code inside a 200", says(error("1999")), UNKNOWN)
for _what, _odd in (
    ("a float", 1302.5),
    ("a list", ["1302"]),
    ("an object", {"code": "1302"}),
    ("true", True),
    ("null", None),
    ("blank", " "),
    ("very long", "9" * 50_000),
    ("a huge integer", 10**400),
    ("with escape codes", "\x1b[2J1302\n\x07"),
):
    add(f"code that is {_what}", says(error(_odd), 400), INVALID)
for _what, _odd in (
    ("a string", SERVER_WORDS),
    ("null", None),
    ("a list", [1, 2]),
    ("a number", 7),
    ("empty", {}),
    ("true", True),
):
    add(f"error that is {_what}, with 400", says({"error": _odd}, 400), INVALID)
    add(f"error that is {_what}, with 200", says({"error": _odd}), UNKNOWN if _odd else MALFORMED)
for _what, _odd in (
    ("null", None),
    ("a list", ["a", 1]),
    ("an object", {"a": 1}),
    ("a number", 10**30),
    ("true", True),
):
    add(f"message that is {_what}", says(error("1214", _odd), 400), INVALID)
for _what, _form in (
    ("an error object without a code", {"error": {"message": SERVER_WORDS}}),
    ("an error object with a null code", {"error": {"code": None, "message": SERVER_WORDS, "type": "upstream_error"}}),
    ("an error object with an empty code", {"error": {"code": "", "message": SERVER_WORDS}}),
    ("an error that is a text", {"error": SERVER_WORDS}),
    ("an error that is true and a message", {"error": True, "message": SERVER_WORDS}),
    ("a message", {"message": SERVER_WORDS}),
    ("a detail", {"detail": SERVER_WORDS}),
    ("a detail that is a list", {"detail": [{"loc": ["body", "size"], "msg": SERVER_WORDS}]}),
    ("a msg", {"msg": SERVER_WORDS}),
    ("a list of errors", {"errors": [{"message": SERVER_WORDS}]}),
    ("success: false and null data", {"success": False, "message": SERVER_WORDS, "data": None}),
    ("a message beside empty data", {"data": [], "message": SERVER_WORDS}),
):
    for _status, _class in (
        (200, UNKNOWN),
        (500, UNKNOWN),
        (502, UNKNOWN),
        (400, INVALID),
        (401, AUTHENTICATION),
        (404, NOT_FOUND),
    ):
        add(f"{_what}, with {_status}", says(_form, _status), _class)
add("an image and a message", says({**GOOD, "message": "ok"}), RESULT)
add("wrong route, as recorded", says({"code": 500, "msg": "404 NOT_FOUND", "success": False}), NOT_FOUND)
add("another failure in the wrong route's form", says({"code": 500, "msg": SERVER_WORDS, "success": False}), *UNSURE)
add(
    "code 1302 outside of an error object, 429",
    says({"code": "1302", "message": "x"}, 429, AT_ONCE),
    RATE,
    **WAITED_FOR,
)
add("an image and an error object", says({**GOOD, **error("1302")}), RESULT, *UNSURE)
add("an image and an error that is null", says({**GOOD, "error": None}), RESULT)
add("an image and a code that is 200", says({**GOOD, "code": 200, "success": True}), RESULT)

# Retry-After.

for _what, _value, _times, _within in (
    ("that fits no deadline", "500", (1, 1), 0.3),
    ("of a day", "86400", (1, 1), 0.3),
    ("that is absurd", "9" * 40, (1, 1), 0.3),
    ("of ten thousand digits", "9" * 10_000, (1, 3), None),
    ("that is negative", "-5", (1, 3), None),
    ("that is a fraction", "0.0", (1, 3), None),
    ("that is NaN", "nan", (1, 3), None),
    ("that is infinite", "inf", (1, 3), None),
    ("that is 1e400", "1e400", (1, 3), None),
    ("that is empty", "", (1, 3), None),
    ("in words", "soon", (1, 3), None),
    ("with latin-1 bytes", "\xb2\xe9\xff", (1, 3), None),
    ("as a date in a day", formatdate(time.time() + 86400, usegmt=True), (1, 1), 0.3),
    ("as a date long past", "Sun, 06 Nov 1994 08:49:37 GMT", (1, 3), None),
    ("as the last date of all", "Fri, 31 Dec 9999 23:59:59 GMT", (1, 1), 0.3),
    ("as a date that is none", "Mon, 99 Foo 2026 99:99:99 GMT", (1, 3), None),
    ("as a date in the year 0", "Sat, 01 Jan 0000 00:00:00 GMT", (1, 3), None),
    ("as a date without zone", "Sun, 06 Nov 1994 08:49:37", (1, 3), None),
    ("as a date in a zone that is none", "Sun, 06 Nov 2094 08:49:37 +9999", (1, 3), None),
):
    _limit = AMPLE if _within else SHORT
    if _times == (1, 3):
        _times = WAITED_FOR["posts"]
    add(
        f"Retry-After {_what}",
        says(error("1302"), 429, f"Retry-After: {_value}"),
        RATE,
        posts=_times,
        within=_within,
        timeout=_limit,
    )
add("Retry-After of 0 in seconds", says(error("1302"), 429, AT_ONCE), RATE, within=0.5, **WAITED_FOR)
add("Retry-After of 0 with 503", sends(b"", 503, AT_ONCE), SERVER, posts=3, within=0.5)
add("Retry-After that fits no deadline, with 503", sends(b"", 503, "Retry-After: 500"), SERVER, within=0.3)
add("Retry-After of 0 with 500", says({}, 500, AT_ONCE), UNKNOWN)
add("Retry-After of 0 with no balance", says(error("1113"), 429, AT_ONCE), BALANCE)
add("Retry-After of 0 with a blocked prompt", says(error("1301"), 400, AT_ONCE), FILTER)
add("Retry-After of 0 with a 200 without sense", says({}, 200, AT_ONCE), MALFORMED)
add(
    "Retry-After twice, 0 and 3600",
    says(error("1302"), 429, AT_ONCE, "Retry-After: 3600"),
    RATE,
    **WAITED_FOR,
)
add(
    "Retry-After of one second, then good",
    in_turn(says(error("1302"), 429, "Retry-After: 1"), success),
    RESULT,
    posts=2,
    least=0.99,
)


@reply_fault("Retry-After as a date in a second, then good", RESULT, posts=2, least=0.4)
def _(connection: Connection, request: Request) -> None:
    if request.number > 1:
        success(connection, request)
    else:
        # A date has whole seconds: two ahead is between one and two.
        connection.json(error("1302"), 429, f"Retry-After: {formatdate(time.time() + 2, usegmt=True)}")
