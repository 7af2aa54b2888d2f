"""The wire: generated messages and stubs, their signed form, and the translation of errors.

gRPC reads its environment when it is first imported, which happens below this package. Its fork handlers are switched off before
that: a peer starts the libp2p daemon by fork and exec, and now and then they end the new process before it gets that far.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
