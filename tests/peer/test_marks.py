"""Values with marks, and that documents in one row don't see each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peer.marks import IGNORED, NO_LOSS, STARTS, lesson, marked, token_ids
from swarm.errors import DataInvalid
from swarm.manifest import PACKS_DOCUMENTS

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "sliding_window": 4,
}
SMALL_GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def document(ids: list[int], counts: list[bool]) -> np.ndarray:
    return marked(np.array(ids), np.array(counts))


def test_rows_give_ids_labels_and_positions() -> None:
    """Positions start anew, a token that starts a document is never learned, and others only where they count."""
    row = np.concatenate([document([5, 6, 7], [True, False, True]), document([8, 9], [True, True])])
    found = lesson(torch.from_numpy(row)[None])
    assert found.ids.tolist() == [[5, 6, 7, 8]]
    assert found.labels.tolist() == [[IGNORED, 7, IGNORED, 9]]
    assert found.positions.tolist() == [[0, 1, 2, 0]]
    assert token_ids(row).tolist() == [5, 6, 7, 8, 9]


def test_a_row_needs_no_start_at_its_beginning() -> None:
    """Hostile rows have a position for every token too."""
    row = torch.tensor([[1, 2, 3 | STARTS, 4, 5 | STARTS]])
    assert lesson(row).positions.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("bit", [28, 29])
def test_marks_without_a_meaning_are_refused(bit: int) -> None:
    """Who knows only two marks doesn't train on data that has a third."""
    with pytest.raises(DataInvalid, match="mark"):
        token_ids(np.array([3, 3 | 1 << bit | NO_LOSS]))


@pytest.mark.parametrize("kind", sorted(PACKS_DOCUMENTS))
def test_packed_documents_dont_see_each_other(kind: str) -> None:
    """The logits of a document in a row are those of the document alone, in each architecture that a manifest may name."""
    settings = AutoConfig.for_model(kind, **(SMALL_GPT2 if kind == "gpt2" else SMALL), **TOKENS)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa", dtype=torch.float32).eval()
    parts = [np.random.default_rng(0).integers(3, 64, size) for size in (7, 9, 6)]
    row = torch.from_numpy(np.concatenate([document(list(part), [True] * len(part)) for part in parts]))[None]
    shown = lesson(row)
    with torch.no_grad():
        packed = network(input_ids=shown.ids, position_ids=shown.positions, use_cache=False).logits[0]
        mixed = network(input_ids=shown.ids, use_cache=False).logits[0]
        alone = torch.cat([network(input_ids=torch.from_numpy(part)[None], use_cache=False).logits[0] for part in parts])[:-1]
    assert torch.allclose(packed, alone, atol=1e-5)
    assert not torch.allclose(mixed, alone, atol=1e-3)
