"""The demonstration's manifest."""

from __future__ import annotations

from pathlib import Path

from peer.corpus import load_tokenizer
from peer.data import ShardReader, tree_path, verify_tree_file
from peer.recipes import demo_manifest
from swarm.manifest import DiLoCo, Manifest, Muon


def test_the_demonstration_is_complete_on_this_machine(tmp_path: Path) -> None:
    """Every file that the manifest names is written and verifies, and the manifest survives its own bytes."""
    manifest = demo_manifest(tmp_path, seed=3, data_bytes=300_000)
    for tree in (manifest.tokenizer, *manifest.data.train, *manifest.data.validation):
        verify_tree_file(tree_path(tmp_path, tree), tree)
    reader = ShardReader.open(manifest.data.train, tmp_path, 128, 257)
    assert len(reader) == manifest.data.train_samples > 1000
    tokenizer = load_tokenizer(tree_path(tmp_path, manifest.tokenizer))
    assert "import" in tokenizer.decode(reader.batch(range(200)).flatten().tolist())
    assert Manifest.parse(manifest.canonical_bytes).run_id == manifest.run_id


def test_the_demonstration_is_the_measured_recipe(tmp_path: Path) -> None:
    """0.87 M parameters, Muon inside, plain averaging outside, a schedule for three peers and twenty rounds."""
    manifest = demo_manifest(tmp_path, data_bytes=300_000)
    strategy = manifest.strategy
    assert manifest.model.parameters == 869_760
    assert isinstance(strategy, DiLoCo)
    assert isinstance(strategy.inner, Muon)
    assert (strategy.inner_steps, strategy.outer.lr, strategy.outer.momentum) == (20, 1.0, 0.0)
    assert strategy.schedule.total_tokens == 3 * 20 * 20 * 8 * 128


def test_the_automatic_demonstration_spends_the_same_tokens(tmp_path: Path) -> None:
    """`auto` chooses its own rounds for the same budget; pinned, there are as many rounds as asked for, of as many steps."""
    chosen, pinned = (
        demo_manifest(tmp_path, data_bytes=300_000, rounds=6, inner_steps=20, strategy="auto", pinned=given)
        for given in (False, True)
    )
    steps = [sum(value.phase(index + 1).inner_steps for index in range(value.rounds.total)) for value in (chosen, pinned)]
    assert steps == [120, 120]
    assert pinned.rounds.total == 6
    assert {value.strategy.schedule.total_tokens for value in (chosen, pinned)} == {3 * 120 * 8 * 128}


def test_the_same_source_gives_the_same_run(tmp_path: Path) -> None:
    """Two owners on the same Python get the same run id; another seed gives another."""
    first, second, other = (
        demo_manifest(tmp_path / str(number), seed=seed, data_bytes=300_000) for number, seed in enumerate((1, 1, 2))
    )
    assert first.run_id == second.run_id != other.run_id
