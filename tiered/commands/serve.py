"""tiered serve"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.output import notes


@click.command("serve")
@click.argument("model")
@opt.option(
    "--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen; 0.0.0.0: everywhere."
)
@opt.option("--port", type=click.IntRange(0, 65535), default=8080, help="0: any free one.")
@opt.option("--api-key", multiple=True, metavar="KEY", help="Clients must send one of these.")
@opt.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="What clients call the model; * answers to any name. Default: the file's name.",
)
@opt.option("--parallel", type=click.IntRange(1), default=16, help="Requests computed at once.")
@opt.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    help="Engines behind one port, in processes of their own; more than one need Ray.",
)
@opt.option("--queue", type=click.IntRange(1), default=256, help="Requests that may wait.")
@opt.option(
    "--kv-tokens",
    type=click.IntRange(1),
    help="Tokens of KV cache for all requests and remembered prefixes. Default: four contexts.",
)
@opt.prefill_chunk_option
@opt.option(
    "--timeout",
    type=click.FloatRange(1),
    default=600.0,
    help="Seconds a request may take, waiting included.",
)
@opt.option("--max-body", default="8M", metavar="SIZE", help="Largest request.")
@opt.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin call the server from a browser.",
)
@opt.option(
    "--drain",
    type=click.IntRange(0),
    default=30,
    help="Seconds that requests get to end after SIGTERM.",
)
@opt.speculate_option
@opt.routing_options
@opt.engine_options
def command(
    model: str,
    host: str,
    port: int,
    api_key: tuple[str, ...],
    names: tuple[str, ...],
    parallel: int,
    replicas: int,
    queue: int,
    kv_tokens: int | None,
    prefill_chunk: int,
    timeout: float,
    max_body: str,
    allow_origin: tuple[str, ...],
    drain: int,
    **choices: Any,
) -> None:
    """Serve MODEL to many users at once, by OpenAI's and Anthropic's interfaces.

    MODEL is a file or folder, or what `tiered pull` was given. A page to talk with it, and to watch
    its experts move, is at /. Requests are computed together; a conversation's next turn does not
    compute its history again.

    With --replicas, engines run on Ray Serve: of the cluster that RAY_ADDRESS names, where the
    model has the same path everywhere, or of this machine, which they share. A replica that dies is
    replaced; each has prefixes, a page and metrics of its own.
    """
    try:
        from tiered.serve.server import Server
        from tiered.serve.setup import Setup, opened

        if replicas > 1:
            import ray.serve  # noqa: F401
    except ImportError as error:
        extra = "ray" if replicas > 1 else "serve"
        raise click.UsageError(
            f'{error}; pip install "tiered[{extra}]" brings what a server needs'
        ) from None
    from tiered.hub.pulled import find_model
    from tiered.memory import parse_bytes
    from tiered.serve.running import announced
    from tiered.serve.service import Limits

    path = find_model(model)
    context = choices["context"] or 4096
    choices |= {"kv_tokens": kv_tokens or 4 * context, "prefill_chunk": prefill_chunk}
    limits = Limits(body_bytes=parse_bytes(max_body), request_seconds=timeout)
    names = names or (default_name(path, model),)
    setup = Setup(path, choices, names, parallel, queue, limits, api_key, allow_origin)
    if not api_key and not is_local(host):
        notes.print(
            f"warning: whoever reaches {host} may use this server; give it an --api-key",
            style="yellow",
        )

    @contextmanager
    def announce(port: int) -> Iterator[None]:
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        with announced(model=str(path), name=names[0], url=url):
            notes.print(f"{names[0]} at {url} (page) and {url}/v1 (API); Ctrl-C ends")
            yield

    with ExitStack() as stack:
        if replicas > 1:
            from tiered.serve.replicas import Replicas, wait_for_signal

            with notes.status(f"opening {replicas} times {path.name}"):
                served = stack.enter_context(Replicas(setup, replicas, host, port, drain))
            with announce(served.port):
                wait_for_signal()
        else:
            with notes.status(f"opening {path.name}"):
                service, app = stack.enter_context(opened(setup))
            server = Server(app, host, port, service=service, drain_seconds=drain)
            with announce(server.port):
                server.run()
    notes.print("ended", style="dim")


def default_name(path: Path, given: str) -> str:
    """A model's name for clients: its file's, or what it was pulled as."""
    return path.stem if path.is_file() else path.name if Path(given).exists() else given


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
