"""What is read from HLO: groups in every form, loops by how often they run, and sizes of the whole arrays."""

from __future__ import annotations

import pytest

from lm.costs.collectives import by_kind, collectives

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
PROGRAM = """HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %gathered = bf16[8,8]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
  %scattered = f32[4,8]{1,0} reduce-scatter(%y), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, to_apply=%add.1
  ROOT %both = (s32[], f32[4,8]) tuple(%i, %scattered)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%called (p: f32[16]) -> f32[16] {
  ROOT %one = f32[16]{0} all-reduce(%p), replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}
}

ENTRY %main (p0: f32[4,8]) -> f32[4,8] {
  %loop = (s32[], f32[4,8]) while(%t), condition=%condition, body=%body
  %known = (s32[], f32[4,8]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %call = f32[16]{0} call(%z), to_apply=%called, frontend_attributes={x="1"}
  %start = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%w), replica_groups=[4,2]<=[8], dimensions={0}
  %done = bf16[8]{0} all-gather-done(%start)
  %several = (f32[], f32[2,3]{1,0}) all-reduce(%u, %v), replica_groups=[1,8]<=[8], to_apply=%add.1
  %moved = f32[6]{0} all-to-all(%k), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={0}
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_every_collective_is_found_as_often_as_it_runs():
    found = [(c.kind, c.dtype, c.bytes, c.axes(MESH), c.group, c.times) for c in collectives(PROGRAM)]
    assert found == [
        ("all-gather", "bf16", 128, ("fsdp",), 2, 5),
        ("reduce-scatter", "f32", 256, ("fsdp",), 2, 5),
        ("all-gather", "bf16", 128, ("fsdp",), 2, 2),
        ("reduce-scatter", "f32", 256, ("fsdp",), 2, 2),
        ("all-reduce", "f32", 64, ("data", "tensor"), 4, 1),
        ("all-gather", "bf16", 16, ("tensor",), 2, 1),
        ("all-reduce", "f32", 28, ("data", "fsdp", "tensor"), 8, 1),
        ("all-to-all", "f32", 24, ("data", "fsdp"), 4, 1),
    ]
    assert by_kind(collectives(PROGRAM))["all-gather", "bf16"] == 7 * 128 + 16


def test_bytes_sent_are_those_of_rings():
    gather, scatter, *_, reduce, _ = collectives(PROGRAM)
    assert (gather.sent, scatter.sent, reduce.sent) == (5 * 64, 5 * 128, 2 * 28 * 7 / 8)


def test_what_cannot_be_counted_is_not_guessed():
    with pytest.raises(AssertionError, match="who knows how often"):
        collectives(PROGRAM.replace("%limit = s32[] constant(5)", "%limit = s32[] parameter(1)"))
    with pytest.raises(AssertionError, match="unknown form"):
        collectives(PROGRAM.replace("replica_groups=[1,8]<=[8]", "replica_groups=?"))
