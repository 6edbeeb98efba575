"""The command that serves rewards to trainers on other machines.

    python -m cli.reward_server --config server.yaml --port 8000

The file names the rewards by class, as a training config does:

    token_variable: REWARD_TOKEN
    rewards:
      quality: {class_path: demo.scorers.rewards.QualityReward, init_args: {verifier: annotator}}
    service: {max_batch: 32}
"""

from __future__ import annotations

import ipaddress
import sys

import torch
from fastapi import FastAPI
from jsonargparse import ActionConfigFile, ArgumentError, set_parsing_settings

from cli.literal_text import LiteralParser, finished, install
from flow_rl.rewards.base import Reward
from flow_rl.rewards.connections import server_of
from flow_rl.rewards.service import ServiceSettings, build_app
from flow_rl.rewards.wire import read_token


def serve(
    rewards: dict[str, Reward],
    host: str = "127.0.0.1",
    port: int = 8000,
    token_variable: str | None = "REWARD_TOKEN",
    threads: int = 0,
    service: ServiceSettings = ServiceSettings(),  # noqa: B008  (frozen)
) -> None:
    """Serve rewards until the process is told to stop.

    Args:
        rewards: scorers by the name that clients use.
        host: address to listen on.
        port: to listen on; 0 takes a free one and prints it.
        token_variable: name of the environment variable that holds the token which clients must send; null serves
            everyone who can reach the port, on this machine alone.
        threads: CPU threads of torch; 0 leaves its choice.
        service: limits.

    Raises:
        ValueError: settings that cannot be served.
    """
    token = read_token(token_variable)
    if token is None and not _is_loopback(host):
        raise ValueError(
            f"host {host} can be reached from other machines, and token_variable is null: set token_variable to the "
            "name of an environment variable that holds a token."
        )
    if threads > 0:
        torch.set_num_threads(threads)
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be from 0 to {2**16 - 1}, received {port}.")
    run(build_app(rewards, service, token, host), host, port)


def run(app: FastAPI, host: str, port: int) -> None:
    """Run the application with uvicorn until SIGTERM or SIGINT."""
    server_of(app, host=host, port=port, timeout_graceful_shutdown=10).run()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(args: list[str] | None = None) -> None:
    """Parse the command line and serve; a bad setting ends in one message and exit status 2.

    Args:
        args: the command line; None for the process's own.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    install()
    parser = LiteralParser(prog="python -m cli.reward_server", exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; several stack, later ones win")
    parser.add_function_arguments(serve)
    known = list(parser.get_defaults().keys(branches=True))
    try:
        config = finished(parser.parse_args(args))
        settings = parser.instantiate_classes(config)
        settings.pop("config", None)
        serve(**settings)
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        # Not above: it brings Lightning along, which takes seconds and which a server has no use for.
        from cli.errors import explain_instantiation, explain_parsing

        parsing = isinstance(error, ArgumentError)
        message = explain_parsing(error, known) if parsing else explain_instantiation(error)
        print(f"error: {message or error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
