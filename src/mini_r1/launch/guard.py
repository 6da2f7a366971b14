"""Lets a run alone talk to its vLLM server: a key for each, and the middleware that asks for it.

TRL sends the weights through development endpoints, which replace the model for whoever asks: a
stranger on the network, or another user of the node. vLLM's own --api-key leaves them open (0.31
guards /v1, /v2, /inference and /cohere). So the server loads `OnlyTheRun` with --middleware, which
refuses every request, /health included, that does not bring the key; `quirks.show_key` has TRL's
client bring it. A tunnel would need sshd on the nodes, a secret path would stand in error messages.

The key is drawn anew for each start and known by environment only, which other users cannot read,
unlike command lines. What it does not do: HTTP is not encrypted, so who can read the packets
between the nodes can read the key. And the port at which the NCCL group of the weights gathers,
`vllm_group_port` on the first training node, asks for nothing, like all ports of torch.distributed,
which trusts its network: https://github.com/pytorch/pytorch/security/policy.

Imports nothing but the standard library: vLLM may have an environment of its own.
"""

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY = "MINI_R1_VLLM_KEY"
MIDDLEWARE = "mini_r1.launch.guard.OnlyTheRun"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def draw_key() -> str:
    """A new key, for this process and those it starts from here on."""
    os.environ[KEY] = secrets.token_urlsafe(32)
    return os.environ[KEY]


def key_header() -> dict[str, str]:
    """What a request to the server must bring; nothing to a server that was given without a key."""
    key = os.environ.get(KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


class OnlyTheRun:
    """Answers 401 to whoever does not bring the key; an ASGI middleware.

    Raises:
        RuntimeError: there is no key, so nobody could be let in.
    """

    def __init__(self, app: App):
        if not os.environ.get(KEY):
            raise RuntimeError(f"set {KEY}, the same for this server and the run that it is for")
        self._app, self._wanted = app, key_header()["Authorization"].encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        brought = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(brought, self._wanted):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"only this server's run may ask\n"})
