"""What a folder takes on the disk."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

ENTRIES_A_REST = 200


def size_of(folder: Path, *, most: int = sys.maxsize, rest_seconds: float = 0.0) -> int:
    """Bytes on disk below it, of `most` entries at most; links are not followed, and what cannot be read is not counted.

    Beside a service it rests now and then, because it holds the interpreter.
    """
    total, seen, waiting = 0, 0, [folder]
    while waiting and seen < most:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    seen += 1
                    if rest_seconds and seen % ENTRIES_A_REST == 0:
                        time.sleep(rest_seconds)
                    info = entry.stat(follow_symlinks=False)
                    total += info.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
        except OSError:
            continue
    return total
