"""The coordinator's admin address as the operator's command sees it: pinned TLS, and every command signed by an admin's key."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from swarm.identity import Identity
from swarm.messages import seal
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.coordinator_pb2 import AdminCommand, ExecuteRequest, ExecuteResponse
from swarm.rpc.v1.coordinator_pb2_grpc import AdminServiceStub

if TYPE_CHECKING:
    from swarm.rpc.v1.coordinator_pb2_grpc import AdminServiceAsyncStub

NONCE_BYTES = 16


class AdminClient(CoordinatorClient):
    """Use as `async with await AdminClient.connect(link)`, with the admin link that the coordinator prints."""

    async def execute(self, admin: Identity, now_s: float, **command: Any) -> ExecuteResponse:
        """Sign a command and have it carried out. Raises `Rejected`, `NotAdmitted` or `CoordinatorUnreachable`."""
        message = AdminCommand(run_id=self.link.run_id, issued_at=int(now_s), nonce=os.urandom(NONCE_BYTES))
        message.MergeFrom(AdminCommand(**command))
        stub: AdminServiceAsyncStub = AdminServiceStub(self._channel)
        return await self._call(stub.Execute, ExecuteRequest(command=seal(admin, message)))
