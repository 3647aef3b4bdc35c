"""Floor of B4: mini-swe-agent's own agent, LiteLLM model and bubblewrap environment, with its trajectory saved after every step as its command line does.

Runs with the Python of the environment mini-swe-agent was installed into; nothing of this repository is imported.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.extra.bubblewrap import BubblewrapEnvironment
from minisweagent.models.litellm_model import LitellmModel


def main() -> None:
    """Runs to the end of the script."""
    facts = json.load(sys.stdin)
    logging.disable(logging.WARNING)
    model = LitellmModel(
        model_name="openai/scripted-1",
        model_kwargs={"api_base": facts["model"], "api_key": "no-key-required"},
        cost_tracking="ignore_errors",
    )
    agent = DefaultAgent(
        model,
        BubblewrapEnvironment(),
        system_template="You are a helpful assistant that can interact with a computer.",
        instance_template="{{task}}",
        cost_limit=0.0,
        output_path=Path(facts["folder"]) / "trajectory.json",
    )
    agent.run(facts["task"])


main()
