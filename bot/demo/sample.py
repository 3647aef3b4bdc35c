"""The repository of the demo: a small shell project with a bug, a test that shows it, and the issue that asks for the mend."""

from __future__ import annotations

from typing import Final

BUGGY_LINE: Final = "  printf '%s\\n' \"$1\" | tr ' ' '-'"
FIXED_LINE: Final = "  printf '%s\\n' \"$1\" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]\\n' '-' | sed 's/^-//; s/-$//'"

ISSUE_TITLE: Final = "slug keeps capitals and punctuation"
ISSUE_BODY: Final = """\
`sh slug.sh "Hello, World!"` prints `Hello,-World!`, so our links break.

It should print `hello-world`: lower case, and one dash for everything that is neither a letter nor a digit, none at the ends.
`sh test.sh` shows it.
"""

FILES: Final[dict[str, str]] = {
    "README.md": """\
# slug

Turns a title into the last part of a link.

    sh slug.sh "Hello, World!"
    hello-world

Run the tests with `sh test.sh`.
""",
    "AGENTS.md": """\
Plain POSIX sh, no bashisms. Run `sh test.sh` before you finish.
""",
    "slug.sh": """\
#!/bin/sh
. "$(dirname "$0")/lib/slug.sh"
slug "$1"
""",
    "lib/slug.sh": f"""\
# slug TITLE: prints TITLE as the last part of a link.
slug() {{
{BUGGY_LINE}
}}
""",
    "test.sh": """\
#!/bin/sh
# Each line: a title, and the slug we expect.
cd "$(dirname "$0")" || exit 2
. lib/slug.sh
failed=0
check() {
  got=$(slug "$1")
  if [ "$got" = "$2" ]; then
    echo "ok   $1"
  else
    echo "FAIL $1: expected $2, got $got"
    failed=1
  fi
}
check 'one' 'one'
check 'two words' 'two-words'
check 'Hello, World!' 'hello-world'
check '  spaces   around ' 'spaces-around'
exit $failed
""",
}
