"""tiered serve"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
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
@opt.engine_options
def command(
    model: str,
    host: str,
    port: int,
    api_key: tuple[str, ...],
    names: tuple[str, ...],
    parallel: int,
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
    """
    try:
        from tiered.serve.app import make_app
        from tiered.serve.server import Server
    except ImportError as error:
        raise click.UsageError(
            f'{error}; pip install "tiered[serve]" brings what a server needs'
        ) from None
    from tiered.hub.pulled import find_model
    from tiered.memory import parse_bytes
    from tiered.serve.running import announced
    from tiered.serve.scheduler import Scheduler
    from tiered.serve.service import Limits, Service

    path = find_model(model)
    context = choices["context"] or 4096
    choices |= {"kv_tokens": kv_tokens or 4 * context, "prefill_chunk": prefill_chunk}
    limits = Limits(body_bytes=parse_bytes(max_body), request_seconds=timeout)
    with (
        open_engine(path, choices) as engine,
        Scheduler(engine, max_running=parallel, max_waiting=queue) as scheduler,
    ):
        service = Service(engine, scheduler, names or [default_name(path, model)], limits)
        app = make_app(service, api_key, allow_origin)
        server = Server(app, host, port, service=service, drain_seconds=drain)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{server.port}"
        if not api_key and not is_local(host):
            notes.print(
                f"warning: whoever reaches {host} may use this server; give it an --api-key",
                style="yellow",
            )
        notes.print(f"{service.name} at {url} (page) and {url}/v1 (API); Ctrl-C ends")
        with announced(model=str(path), name=service.name, url=url):
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
