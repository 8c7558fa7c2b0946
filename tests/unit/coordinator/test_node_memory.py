"""What a node has left, from control groups of both versions, and what its ranks need together."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from offload_adam.coordinator import node_memory
from offload_adam.coordinator.node_memory import NodeNeed, check_node_memory, control_group_memory
from offload_adam.coordinator.ranks import RankGroup, open_rank_group
from offload_adam.errors import HostMemoryError
from tests.support.ranks import RankPool

GIB = 1024**3


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_version_2_counts_every_level_and_droppable_cache(tmp_path: Path) -> None:
    write(tmp_path / "jobs/memory.max", f"{8 * GIB}\n")
    write(tmp_path / "jobs/memory.current", f"{6 * GIB}\n")
    write(tmp_path / "jobs/memory.stat", f"anon 1\ninactive_file {GIB}\n")
    write(tmp_path / "jobs/ours/memory.max", f"{5 * GIB}\n")
    write(tmp_path / "jobs/ours/memory.current", f"{GIB}\n")
    found = control_group_memory(tmp_path, {"": "/jobs/ours"})
    assert [nbytes for nbytes, _ in found] == [4 * GIB, 3 * GIB]
    assert "memory.max" in found[0][1]


def test_no_limit_is_none(tmp_path: Path) -> None:
    write(tmp_path / "jobs/memory.max", "max\n")
    write(tmp_path / "jobs/memory.current", f"{GIB}\n")
    write(tmp_path / "memory/a/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "memory/a/memory.usage_in_bytes", "1\n")
    assert control_group_memory(tmp_path, {"": "/jobs", "memory": "/a"}) == []
    assert control_group_memory(tmp_path, {"cpu": "/jobs"}) == []


def test_version_1_and_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    write(tmp_path / "memory/memory.limit_in_bytes", f"{4 * GIB}\n")
    write(tmp_path / "memory/memory.usage_in_bytes", f"{3 * GIB}\n")
    write(tmp_path / "memory/memory.stat", f"total_inactive_file {GIB // 2}\n")
    found = control_group_memory(tmp_path, {"memory": "/docker/0123", "cpu": "/docker/0123"})
    assert [nbytes for nbytes, _ in found] == [GIB + GIB // 2]


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "memory.max", "100\n")
    write(tmp_path / "memory.current", "200\n")
    assert control_group_memory(tmp_path, {"": "/"})[0][0] == 0


def test_the_table_says_what_needs_what() -> None:
    need = NodeNeed("a", (0, 1), {"exp_avg": 1024, "exp_avg_sq": 3 * 1024}, 2048, "of the machine")
    assert need.table().splitlines() == [
        "  exp_avg                       1.00 KiB",
        "  exp_avg_sq                    3.00 KiB",
        "  total                         4.00 KiB",
        "  available (of the machine)    2.00 KiB",
    ]


def test_overcommitment_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_memory, "available_memory", lambda: (2047, "of the machine"))
    with pytest.raises(HostMemoryError, match="does not fit"):
        check_node_memory(RankGroup(), {"exp_avg": 2048}, allow_overcommit=False)
    check_node_memory(RankGroup(), {"exp_avg": 2048}, allow_overcommit=True)
    assert "does not fit" in caplog.text
    check_node_memory(RankGroup(), {"exp_avg": 2047}, allow_overcommit=False)


def need_more_on_one_rank(rank: int, world_size: int) -> str:
    ranks = open_rank_group(None)
    sees = patch.object(node_memory, "available_memory", lambda: (4000 + rank, "of the machine"))
    with sees:
        check_node_memory(ranks, {"exp_avg": 1000}, allow_overcommit=False)
        with pytest.raises(HostMemoryError) as caught:
            check_node_memory(ranks, {"exp_avg": 1000 + rank}, allow_overcommit=False)
    ranks.release()
    return str(caught.value)


def test_the_ranks_of_a_node_are_added_up(ranks: RankPool) -> None:
    messages = ranks.run(need_more_on_one_rank, 4)
    assert len(set(messages)) == 1
    assert "rank(s) [0, 1, 2, 3] does not fit" in messages[0]
    assert "3.91 KiB" in messages[0]
