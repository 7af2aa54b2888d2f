"""A bare grpcio server with TLS that sends every request back: what the coordinator is held against."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc

from bench.children import arguments, say

METHOD = "/bench.Echo/Echo"


async def echo(request: bytes, context: Any) -> bytes:
    """The request."""
    return request


async def serve(key: bytes, certificate: bytes) -> None:
    """Serve until a line comes on stdin."""
    server = grpc.aio.server()
    method = METHOD.rpartition("/")
    handlers = {method[2]: grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(method[0].strip("/"), handlers),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    await server.start()
    say(port=port)
    await asyncio.to_thread(input)
    say(processor_s=time.process_time())
    await server.stop(0)


if __name__ == "__main__":
    given = arguments()
    asyncio.run(serve(Path(given["key"]).read_bytes(), Path(given["certificate"]).read_bytes()))
