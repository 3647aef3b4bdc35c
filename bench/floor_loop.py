"""Floor of B4 where mini-swe-agent cannot be installed: a linear loop, one bubblewrap a command, the whole history saved as JSON after every step."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import openai

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Execute a bash command",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
WALL = "bwrap --unshare-user-try --ro-bind / / --tmpfs /tmp --proc /proc --dev /dev --new-session".split()
END = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def main() -> None:
    """Runs to the end of the script."""
    facts = json.load(sys.stdin)
    client = openai.OpenAI(base_url=facts["model"], api_key="no-key-required")
    tree = tempfile.mkdtemp(dir=facts["folder"])
    messages: list[Any] = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": facts["task"]}]
    output = ""
    while not output.startswith(END):
        message = client.chat.completions.create(model="scripted-1", messages=messages, tools=[TOOL]).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        calls: list[Any] = list(message.tool_calls or ())
        for call in calls:
            command = json.loads(call.function.arguments)["command"]
            argv = [*WALL, "--bind", tree, tree, "--chdir", tree, "bash", "-c", command]
            ran = subprocess.run(argv, text=True, timeout=30, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            output = ran.stdout
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"<returncode>{ran.returncode}</returncode>\n{output}"})
        (Path(facts["folder"]) / "trajectory.json").write_text(json.dumps(messages, indent=2))


main()
