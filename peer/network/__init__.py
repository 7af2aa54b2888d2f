"""Everything that touches libp2p: the node, calls and streams between peers, discovery, and verified blobs."""
