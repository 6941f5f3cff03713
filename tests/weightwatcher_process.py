"""weightwatcher in a process of its own: a line of JSON `[source, question]` in, a line `{"answer": …}` out.

Importing weightwatcher silences every warning and reconfigures the root logger, so it stays out of the tests' process.
The source defines `answer(weightwatcher, question)`; what the tool prints goes nowhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback


def reply(weightwatcher, source: str, question) -> dict[str, object]:
    """What `answer` of the source returns, or how it failed."""
    names: dict = {}
    try:
        exec(source, names)
        return {"answer": names["answer"](weightwatcher, question)}
    except Exception:  # noqa: BLE001 - whatever happens, the test that asked is told
        return {"failure": traceback.format_exc()}


def main() -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()):
        import weightwatcher

        for line in sys.stdin:
            print(json.dumps(reply(weightwatcher, *json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
