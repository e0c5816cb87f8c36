"""Counts in listings of machine code, and the estimate of rounds of dependent loads."""

from __future__ import annotations

import pytest

from bench import machine_code

SASS = """
.text.kernel:
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.64.CONSTANT R8, desc[UR4][R2.64] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/              @P1  BRA `(.L_x_1) ;
        /*0070*/                   STL [R1], R8 ;
        /*0080*/                   LDL R8, [R1] ;
.L_x_2:
        /*0090*/                   EXIT ;
"""

AMDGCN = """
.LBB0_1:
	global_load_dwordx4 v[4:7], v[2:3], off
	s_barrier
	s_cbranch_scc1 .LBB0_1
	scratch_store_dword off, v1, s32
	global_load_ushort v1, v[2:3], off
	s_barrier
	s_branch .LBB0_2
.LBB0_2:
	s_endpgm
"""


def test_counts_in_sass():
    assert machine_code.counts_of(SASS, amd=False) == (128, 2, 1, 1)


def test_counts_in_amdgcn():
    assert machine_code.counts_of(AMDGCN, amd=True) == (128, 1, 1, 0)


# Ten rows in steps of four are three iterations, of which each waits for an index and then a row; before them a scale
# is loaded, after them a bias. The inner loop waits E / 16 times.
TTIR = """
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x"(#loc)), %N: i32, %E: i32) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c4 = arith.constant 4 : i32
    %c16 = arith.constant 16 : i32
    %program = tt.get_program_id x : i32
    %begin = arith.muli %program, %N : i32
    %rest = arith.subi %N, %begin : i32
    %end = arith.minsi %rest, %N : i32
    %scale = tt.load %x_ptr : !tt.ptr<f32>
    %sum = scf.for %i = %c0 to %end step %c4 iter_args(%acc = %scale) -> (f32)  : i32 {
      %index_ptr = tt.addptr %x_ptr, %i : !tt.ptr<f32>, i32
      %index = tt.load %index_ptr : !tt.ptr<f32>
      %other = tt.load %x_ptr : !tt.ptr<f32>
      %row_ptr = tt.addptr %x_ptr, %index : !tt.ptr<f32>, i32
      %row = tt.load %row_ptr : !tt.ptr<f32>
      %part = scf.for %e = %c0 to %E step %c16 iter_args(%p = %row) -> (f32)  : i32 {
        %value = tt.load %x_ptr : !tt.ptr<f32>
        DOT
        scf.yield %value : f32
      } loc(#loc2)
      scf.yield %part : f32
    }
    %bias = tt.load %x_ptr : !tt.ptr<f32>
    %last = tt.load %x_ptr : !tt.ptr<f32>
    tt.return
  }
}
"""


@pytest.mark.parametrize(
    ("integers", "dot", "overlapped", "rounds"),
    [
        ({"N": 10, "E": 64}, "", 1, 1 + 3 * (2 + 4) + 1),
        ({"N": 0, "E": 64}, "", 1, 2),
        ({"E": 16}, "", 1, 1 + (2 + 1) + 1),
        ({"N": 10, "E": 64}, "%d = tt.dot %value, %value, %p", 2, 1 + 2 * (2 + 2) + 1),
    ],
    ids=["loops", "no iteration", "unknown bound", "copies ahead"],
)
def test_rounds_of_dependent_loads(integers, dot, overlapped, rounds):
    assert machine_code.rounds(TTIR.replace("DOT", dot), integers, (1,), overlapped) == rounds
