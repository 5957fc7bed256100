"""The static model: its readers on small snippets, its arithmetic on cases computed by hand, budgets, command."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.aot import Launch
from bench.static import budget, ffn, large, latency, model, sass, table, ttir
from bench.static.__main__ import ALGORITHMS, KERNELS, LARGE
from bench.static.constants import CONSTANTS

ROOT = Path(__file__).resolve().parents[2]
compiles = [
    pytest.mark.aot,
    pytest.mark.skipif(not (sass.TOOLS / "nvdisasm").exists(), reason="this Triton has no disassembler of NVIDIA code"),
]

# A loop over two lines of source; its LDG releases scoreboard 0, for which the FADD waits.
SASS = """
.text.some_kernel:
	//## File "/some/where/kernel.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
                                                                            /* 0x000fe20000000800 */
.L_x_0:
	//## File "/some/where/kernel.py", line 5
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;         /* 0x0000000402047981 */
                                                                            /* 0x000e22000c1e1d00 */
        /*0020*/              @!P1 FADD R8, R4, R8 ;                        /* 0x0000000804087221 */
                                                                            /* 0x001fe40000000000 */
	//## File "/some/where/kernel.py", line 4
        /*0030*/               @P0 BRA `(.L_x_0) ;                          /* 0xfffffffc00f00947 */
                                                                            /* 0x000fea000383ffff */
        /*0040*/                   EXIT ;                                   /* 0x000000000000794d */
                                                                            /* 0x000fea0003800000 */
.L_x_1:
        /*0050*/                   BRA `(.L_x_1) ;                          /* 0xfffffffc00fc7947 */
                                                                            /* 0x000fc0000383ffff */
        /*0060*/                   NOP ;                                    /* 0x0000000000007918 */
                                                                            /* 0x000fc00000000000 */
"""


class TestSass:
    def test_instructions_come_with_unit_source_and_schedule(self):
        code = sass.parse(SASS)
        assert [i.name for i in code.instructions] == ["LDC", "LDG", "FADD", "BRA", "EXIT"]
        load, add = code.instructions[1:3]
        assert (load.opcode, load.unit, load.line, load.wavefronts) == ("LDG.E.128", "lsu", ("kernel.py", 5), 4)
        assert load.releases == (0, 7) and load.waits == [] and load.stall == 1
        assert (add.opcode, add.unit, add.waits, add.stall) == ("FADD", "fma", [0], 2)

    def test_a_loop_is_known_by_the_line_of_its_branch(self):
        assert sass.parse(SASS).loops == [sass.Loop(0x10, 0x30, ("kernel.py", 4))]

    def test_the_branch_back_of_a_loop_that_an_exit_leaves_is_kept(self):
        rows = (".L_x_0:", "FADD R1, R1, R2", "@P0 EXIT", "BRA `(.L_x_0)", ".L_x_1:", "BRA `(.L_x_1)")
        lines = [row if row.startswith(".") else f"        /*{16 * n:04x}*/ {row} ;" for n, row in enumerate(rows)]
        code = sass.parse("\n".join(lines))
        assert [i.name for i in code.instructions] == ["FADD", "EXIT", "BRA"]
        assert [(loop.first, loop.last) for loop in code.loops] == [(16, 48)]

    def test_an_outer_loop_comes_before_the_inner_one(self):
        text = [(0, "NOP2"), (1, "MOV"), (2, "BRA `(.L_x_1)"), (3, "BRA `(.L_x_0)"), (4, "EXIT")]
        code = sass.Code([sass.Instruction(*row) for row in text], {".L_x_0": 0, ".L_x_1": 1})
        assert [(loop.first, loop.last) for loop in code.loops] == [(0, 3), (1, 2)]

    @pytest.mark.parametrize(
        ("text", "unit", "wavefronts"),
        [
            ("IMAD.WIDE R2, R3, 0x4, R4", "imad", 0),
            ("@P0 LOP3.LUT R2, R3, R4, RZ, 0xc0, !PT", "alu", 0),
            ("HFMA2.BF16_V2 R2, R3, R4, R5", "fp16", 0),
            ("MUFU.EX2 R2, R3", "xu", 0),
            ("UIADD3 UR4, UR4, 0x40, URZ", "uniform", 0),
            ("UTMALDG.2D [UR8], [UR4]", "control", 0),
            ("SHFL.BFLY PT, R2, R3, 0x1, 0x1f", "lsu", 1),
            ("LDSM.16.M88.4 R4, [R2]", "lsu", 4),
            ("STS.U16 [R2], R3", "lsu", 0.5),
            ("STG.E.64 desc[UR4][R2.64], R4", "lsu", 2),
        ],
    )
    def test_units_and_passes_through_shared_memory(self, text, unit, wavefronts):
        i = sass.Instruction(0, text)
        assert (i.unit, i.wavefronts) == (unit, wavefronts)

    def test_a_product_takes_its_operations_or_its_operands_from_shared_memory(self):
        # 2 x 64 x 128 x 16 operations at 4096 a clock are 64 clocks; 16 x 128 x 2 bytes at 128 a clock are 32.
        held = sass.Instruction(0, "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24, gsb0")
        assert held.tensor_clocks == 64 / 4 and held.operations == 2 * 64 * 128 * 16 / 4
        # 2 x 64 x 16 x 16 operations are 8 clocks; (64 + 16) x 16 x 2 bytes are 20.
        narrow = sass.Instruction(0, "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24")
        assert narrow.tensor_clocks == 20 / 4
        assert sass.Instruction(0, "FADD R1, R1, R2").operations == 0


# Two branches of a kernel, each of which a program may skip; the second ends the kernel.
BRANCHED_SASS = (
    "MOV R1, R2", "@P0 BRA `(.L_x_0)", "FADD R1, R1, R2", "FADD R1, R1, R2", ".L_x_0:", "MOV R1, R2", "@P1 EXIT",
    "LDG.E R4, [R2]", "EXIT",
)  # fmt: skip


@pytest.fixture
def branched_code():
    """Instructions at 0, 16, .., all of line 4."""
    lines, place = ['//## File "/some/where/kernel.py", line 4'], 0
    for row in BRANCHED_SASS:
        lines.append(row if row.startswith(".") else f"        /*{16 * place:04x}*/ {row} ;")
        place += not row.startswith(".")
    return sass.parse("\n".join(lines))


class TestBranches:
    def test_a_branch_forward_and_an_exit_skip_what_follows(self, branched_code):
        found = [(branch.first, branch.end, branch.line) for branch in branched_code.branches]
        assert found == [(0x20, 0x40, ("kernel.py", 4)), (0x60, float("inf"), ("kernel.py", 4))]

    def test_instructions_count_for_the_programs_that_execute_them(self, branched_code, branched):
        found = model.count(branched_code, [], model.ways(branched_code, branched))
        assert found["issue"] == 4 + (4 * 2 + 8 * 2) / 14  # two FADDs in 4 of 14 programs, LDG and EXIT in 8
        assert (found["fma"], found["lsu"]) == (2 * 4 / 14, 8 / 14)

    def test_a_warp_alone_skips_too(self, branched_code):
        first, last = branched_code.branches
        assert latency.clocks(branched_code, []) == 8 and latency.clocks(branched_code, [], [first]) == 6
        assert latency.clocks(branched_code, [], [first, last]) == 4

    def test_branches_that_the_compiler_changed_are_told_and_count_as_taken(self, branched_code, branched):
        code = sass.Code(branched_code.instructions[3:], branched_code.labels)
        with pytest.warns(UserWarning, match="the compiler changed the branches"):
            assert model.ways(code, branched) == [([], 14)]


class TestLatency:
    def test_a_result_is_waited_for_in_every_round(self):
        # LDC stalls 1; each round is LDG (1, then its 650 are waited for), FADD 2, BRA 5; EXIT 5.
        code = sass.parse(SASS)
        assert latency.clocks(code, [1]) == 1 + (650 + 2 + 5) + 5
        assert latency.clocks(code, [3]) == 1 + 3 * (650 + 2 + 5) + 5

    def test_copies_are_waited_for_by_groups(self):
        rows = ["LDGSTS.E [R1], [R2]", "LDGDEPBAR", "LDGSTS.E [R1], [R2]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", "EXIT"]
        code = sass.Code([sass.Instruction(n, row, control=7 << 5 | 7 << 8) for n, row in enumerate(rows)])
        assert latency.clocks(code, []) == 650 + 2  # the first group's end, then DEPBAR and EXIT

    def test_a_product_of_a_warpgroup_is_waited_for(self):
        rows = ["HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"]
        code = sass.Code([sass.Instruction(n, row, control=7 << 5 | 7 << 8) for n, row in enumerate(rows)])
        assert latency.clocks(code, []) == 20 + 64 + 15 + 2


# Walks over the columns of x by 64, from 0 to d, then over a task's numbers in y by 16.
TTIR = """#loc = loc("/some/where/kernel.py":3:1)
#loc1 = loc(unknown)
#loc2 = loc("/some/where/helper.py":9:5)
#loc3 = loc("/some/where/kernel.py":7:5)
#loc4 = loc("total"(#loc3))
#loc5 = loc(callsite(#loc2 at #loc4))
module {
  tt.func public @some_kernel(%x: !tt.ptr<bf16>, %y: !tt.ptr<f32>, %offsets: !tt.ptr<i32>, %d: i32) {
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %c16_i32 = arith.constant 16 : i32 loc(#loc1)
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %zero = arith.constant dense<0.000000e+00> : tensor<32x16xf32> loc(#loc1)
    %total = scf.for %start = %c0_i32 to %d step %c64_i32 iter_args(%sum = %zero) -> (tensor<32x16xf32>)  : i32 {
      %0 = tt.splat %x : !tt.ptr<bf16> -> tensor<32x64x!tt.ptr<bf16>> loc(#loc4)
      %1 = tt.addptr %0, %start : tensor<32x64x!tt.ptr<bf16>>, tensor<32x64xi32> loc(#loc4)
      %2 = tt.load %1 : tensor<32x64x!tt.ptr<bf16>> loc(#loc4)
      %3 = tt.trans %2 {order = array<i32: 1, 0>} : tensor<32x64xbf16> -> tensor<64x32xbf16> loc(#loc4)
      %4 = tt.dot %2, %3, %sum : tensor<32x64xbf16> * tensor<64x16xbf16> -> tensor<32x16xf32> loc(#loc4)
      scf.yield %4 : tensor<32x16xf32> loc(#loc4)
    } loc(#loc4)
    %0 = tt.addptr %offsets, %c1_i32 : !tt.ptr<i32>, i32 loc(#loc1)
    %first = tt.load %offsets : !tt.ptr<i32> loc(#loc1)
    %end = tt.load %0 : !tt.ptr<i32> loc(#loc1)
    %task = tt.get_program_id y : i32 loc(#loc1)
    %chunk = arith.muli %task, %c64_i32 : i32 loc(#loc1)
    %from = arith.addi %first, %chunk : i32 loc(#loc1)
    scf.for %row = %from to %end step %c16_i32  : i32 {
      %1 = tt.splat %y : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>> loc(#loc5)
      %2 = tt.load %1 : tensor<16x!tt.ptr<f32>> loc(#loc5)
      tt.store %1, %2 : tensor<16x!tt.ptr<f32>> loc(#loc5)
    } loc(#loc5)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


@pytest.fixture
def source():
    """TTIR's, in two by three programs."""
    arguments = {
        "x": torch.empty(64, 100, dtype=torch.bfloat16, device="meta"),
        "y": torch.empty(1000, device="meta"),
        "offsets": torch.tensor([5, 45, 50], dtype=torch.int32),
        "d": 100,
    }
    return ttir.parse(TTIR, Launch(None, (2, 3), arguments))


BRANCHES = """#loc1 = loc(unknown)
#loc2 = loc("/some/where/kernel.py":4:1)
    %c2_i32 = arith.constant 2 : i32 loc(#loc1)
    %c6_i32 = arith.constant 6 : i32 loc(#loc1)
    %0 = tt.get_program_id x : i32 loc(#loc1)
    %1 = arith.cmpi slt, %0, %c2_i32 : i32 loc(#loc1)
    scf.if %1 {
      %2 = tt.splat %x : !tt.ptr<bf16> -> tensor<32x64x!tt.ptr<bf16>> loc(#loc1)
      %3 = tt.load %2 : tensor<32x64x!tt.ptr<bf16>> loc(#loc1)
      %4 = arith.cmpi sgt, %0, %c2_i32 : i32 loc(#loc1)
    } loc(#loc2)
    %5 = arith.cmpi sge, %0, %c2_i32 : i32 loc(#loc1)
    %6 = arith.cmpi slt, %0, %c6_i32 : i32 loc(#loc1)
    %7 = arith.andi %5, %6 : i1 loc(#loc1)
    scf.if %7 {
      %8 = tt.splat %x : !tt.ptr<bf16> -> tensor<16x!tt.ptr<bf16>> loc(#loc1)
      tt.store %8, %8 : tensor<16x!tt.ptr<bf16>> loc(#loc1)
    } loc(#loc2)
"""


@pytest.fixture
def branched():
    """BRANCHES in seven programs by two: the first two take one branch, the next four the other, the last none."""
    arguments = {"x": torch.empty(500, 64, dtype=torch.bfloat16, device="meta")}
    return ttir.parse(BRANCHES, Launch(None, (7, 2), arguments))


class TestTtir:
    def test_programs_are_counted_by_the_branches_that_they_take(self, branched):
        assert branched.ways == {(True, False): 4, (False, True): 8, (False, False): 2}
        assert [branch.line for branch in branched.branches] == [("kernel.py", 4)] * 2
        assert branched.traffic()[1] == 4 * 32 * 64 * 2 + 8 * 16 * 2

    def test_trips_follow_from_arguments_and_offsets(self, source):
        assert [source.trips(loop) for loop in source.loops] == [2, 3]  # 100 / 64 and (45 - 5) / 16, rounded up

    def test_a_loop_stands_at_its_statement_also_where_it_was_inlined(self, source):
        assert [loop.line for loop in source.loops] == [("kernel.py", 7), ("helper.py", 9)]

    def test_bytes_count_once_for_memory_and_each_time_for_the_l2(self, source):
        x = 6 * 2 * 32 * 64 * 2  # programs, rounds, tile, bytes: 49,152, of which x has only 64 x 100 x 2 = 12,800
        y = 6 * 3 * 16 * 4  # read and written: 1,152 each, which y has
        offsets = 6 * 2 * 4  # two numbers: 48, of 12
        assert source.traffic() == (12_800 + 2 * y + 12, x + 2 * y + offsets)

    def test_operations_and_dimensions_of_products(self, source):
        assert source.flops() == 6 * 2 * (2 * 32 * 64 * 16)
        assert source.product() == (2 * 64, 6 * 32 * 16 // 64)  # x has 64 rows

    def test_rounds_that_a_persistent_grid_shares_out_count_once_in_all(self):
        """23 tiles among five programs: the first makes five of them, all together 23."""
        rows = [
            "%c3_i32 = arith.constant 3 : i32 loc(#loc1)", "%0 = tt.get_program_id x : i32 loc(#loc1)",
            "%1 = tt.get_num_programs x : i32 loc(#loc1)", "scf.for %tile = %0 to %tiles step %1  : i32 {",
            "%2 = tt.splat %x : !tt.ptr<bf16> -> tensor<32x64x!tt.ptr<bf16>> loc(#loc1)",
            "scf.for %part = %c3_i32 to %tiles step %c3_i32  : i32 {",
            "%3 = tt.load %2 : tensor<32x64x!tt.ptr<bf16>> loc(#loc1)",
            "%4 = tt.trans %3 {order = array<i32: 1, 0>} : tensor<32x64xbf16> -> tensor<64x32xbf16> loc(#loc1)",
            "%5 = tt.dot %3, %4, %4 : tensor<32x64xbf16> * tensor<64x32xbf16> -> tensor<32x32xf32> loc(#loc1)",
            "} loc(#loc1)", "} loc(#loc1)",
        ]  # fmt: skip
        arguments = {"x": torch.empty(500, 64, dtype=torch.bfloat16, device="meta"), "tiles": 23}
        code = ttir.parse("\n".join(rows), Launch(None, (5,), arguments))
        assert [code.trips(loop) for loop in code.loops] == [5, 7]
        assert code.flops() == 23 * 7 * 2 * 32 * 64 * 32
        assert code.traffic()[1] == 23 * 7 * 32 * 64 * 2
        assert code.imbalance == 5 * 5 / 23

    def test_a_descriptor_s_tile_is_counted(self):
        text = "%a = tt.descriptor_load %x[%c0, %c1] : !tt.tensordesc<128x64xbf16> -> tensor<128x64xbf16>"
        assert ttir._tile_bytes(text) == 128 * 64 * 2
        assert ttir._tile_bytes("tt.load %first : !tt.ptr<i32>") == 4

    def test_what_does_not_follow_is_refused_by_name(self, source):
        with pytest.raises(ttir.Unknown, match="nothing is known of %?elsewhere"):
            source.value("elsewhere")


class TestModel:
    def test_programs_on_a_multiprocessor(self):
        assert model.resident(96, 59_392, 4) == 3  # 228 KB / (58 + 1) KB
        assert model.resident(168, 4_096, 4) == 3  # 65,536 registers / (4 warps x 5,376)
        assert model.resident(32, 0, 8) == 8  # 64 warps / 8
        assert model.resident(255, 230_000, 8) == 1

    def make(self, **changes) -> model.Cost:
        settled = {
            "name": "some_kernel", "programs": 264, "warps": 4, "registers": 128, "shared": 100 * 1024,
            "per_warp": {"issue": 1_755.0, "fma": 400.0, "imad": 400.0, "alu": 351.0, "wavefronts": 175.5},
            "serial": 17_550.0, "dram_bytes": 30_000_000, "l2_bytes": 55_000_000, "flops": 0, "product": (3_072, 768),
            "loops": (("kernel.py:4", 3),),
        }  # fmt: skip
        return model.Cost(**settled | changes)

    def test_each_unit_s_least_time(self):
        cost, scale = self.make(), 2 * 4 / 1_755  # two programs of four warps on each of 132 multiprocessors
        units = cost.units("H100")
        assert units["issue"] == pytest.approx(1_755 / 4 * scale)
        assert units["fma"] == pytest.approx(200 * scale)  # 800 at 4 a clock, 400 of them at 2
        assert units["alu"] == pytest.approx(351 / 2 * scale) and units["shared"] == pytest.approx(175.5 * scale)
        assert units["L2"] == pytest.approx(10) and units["DRAM"] == pytest.approx(10)
        assert cost.units("H200")["DRAM"] == pytest.approx(30 / 4.3)
        assert cost.instructions == 264 * 4 * 1_755

    def test_programs_side_by_side_hide_each_other_s_latency(self):
        assert self.make().units("H100")["latency"] == pytest.approx(10)  # two fit: one wave of 17,550 clocks
        assert self.make(shared=200 * 1024).units("H100")["latency"] == pytest.approx(20)  # one fits: two waves
        assert self.make(serial=100.0).units("H100")["latency"] == pytest.approx(2)  # 2 x 4 x 1,755 / 4 clocks of issue

    def test_the_longest_binds(self):
        assert self.make(l2_bytes=0).microseconds("H100") == pytest.approx(10 / 0.85)
        assert self.make(dram_bytes=1).microseconds("H100") == pytest.approx(10)
        assert self.make(l2_bytes=110_000_000).binding("H100") == "L2"

    def test_a_product_of_ours_is_judged_by_cublas(self):
        cost = self.make(flops=67_000_000_000)
        assert cost.microseconds("H100") == pytest.approx(100 / 0.85) and cost.binding("H100") == "product"
        cost = self.make(flops=60_000_000_000, product=(768, 3_072))
        assert cost.microseconds("H100") == pytest.approx(100 / 0.85)

    def test_a_persistent_product_pays_its_last_wave_and_the_epilogues_that_are_not_hidden(self):
        # The product takes 100 / 0.85 us, ten rounds of the fullest program where the mean has eight; two programs are
        # resident, each of 17,550 clocks: 10 us, of which the tensor cores work 2 x 4 x 1,316.25 clocks, 6 us.
        per_warp = {"issue": 1_755.0, "tensor_clocks": 1_316.25}
        cost = self.make(flops=67_000_000_000, imbalance=10 / 8, per_warp=per_warp)
        assert cost.microseconds("H100") == pytest.approx(1.25 * 100 / 0.85 + (10 - 6))
        hidden = self.make(flops=67_000_000_000, imbalance=1.0, per_warp=per_warp, serial=10_530.0)
        assert hidden.microseconds("H100") == pytest.approx(100 / 0.85)

    def test_what_streams_is_bound_by_both_issue_and_memory(self):
        cost = self.make(loops=(), per_warp={"issue": 1_800.0})  # 264 x 4 x 1,800 / (132 x 4 x 1,800) clocks
        issue, dram = 2 / 0.85, 10 / 0.97
        assert cost.microseconds("H100") == pytest.approx((issue**6 + dram**6) ** (1 / 6))
        assert cost.stream_dram("H100") == pytest.approx(dram)
        assert self.make(loops=(), serial=175_500.0).microseconds("H100") == pytest.approx(100)  # one wave of them

    def test_instructions_are_multiplied_by_the_trips_of_their_loops(self):
        code = sass.parse(SASS)
        found = model.count(code, [10], [([], 1)])
        assert found["issue"] == 1 + 3 * 10 + 1
        assert (found["lsu"], found["fma"], found["control"], found["wavefronts"]) == (10, 10, 12, 40)

    def test_a_loop_that_cannot_be_matched_is_named(self, source):
        code = sass.parse(SASS)
        with pytest.warns(UserWarning) as warned:
            assert model.loop_trips(code, source) == [1]
        assert [str(w.message).split(")")[0] for w in warned] == [
            "the loop of ('kernel.py', 4", "the loop of ('kernel.py', 7", "the loop of ('helper.py', 9",
        ]  # fmt: skip

    def test_products_that_the_machine_code_lacks_are_told(self, source, monkeypatch):
        product = sass.Instruction(0, "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24")
        monkeypatch.setattr(model, "machine_code", lambda cubin: (sass.Code([product]), 32))
        binary = SimpleNamespace(
            asm={"cubin": b"", "ttir": TTIR}, metadata=SimpleNamespace(name="some_kernel", num_warps=4, shared=0)
        )
        launch = Launch(binary, source.launch.grid, source.launch.arguments)
        with pytest.warns(UserWarning, match="the machine code has 25% of the source's products"):
            model.cost(launch)  # 6 programs' 2 x 64 x 16 x 16, where the source has 12 rounds of 2 x 32 x 64 x 16


class TestRatios:
    def test_products_at_cublas_s_assumed_rates(self):
        operations = 2 * 40_960 * 768 * 3_072 / 1e6
        assert ffn.Product(40_960, 768, 3_072).microseconds("H100", "mid") == pytest.approx(operations / 600)
        assert ffn.Product(40_960, 3_072, 768).microseconds("H100", "fast") == pytest.approx(operations / 730)
        few = 2 * 7_880 * 768 * 3_072 / 1e6
        assert ffn.Product(7_880, 768, 3_072).microseconds("H100", "mid") == pytest.approx(few / 600 / 0.9)

    def test_further_columns_cost_their_share_within_and_a_tile_without(self):
        operations = 2 * 40_960 * 768 * 3_072 / 1e6
        inner = ffn.Product(40_960, 3_130, 768).microseconds("H100", "mid")
        assert inner == pytest.approx(operations / 670 * 3_136 / 3_072)
        outer = ffn.Product(40_960, 768, 3_136).microseconds("H100", "mid")
        assert outer == pytest.approx(1.045 * operations / 600)

    def test_the_frozen_ffn_is_four_products_and_pytorch_s_gelu(self):
        base = ffn.frozen("bf16", 40_960)
        assert [type(step).__name__ for step in base.forward] == ["Product", "TorchGelu", "Product"]
        assert [type(step).__name__ for step in base.backward] == ["Product", "TorchGelu", "Product"]
        products = 2 * 40_960 * 768 * 3_072 / 1e6 * (1 / 600 + 1 / 670)
        issue = 40_960 * 3_072 / 32 * 28.7 / (132 * 4 * 1_800 * 0.85)
        dram = 40_960 * 3_072 * 4 / (3.0e6 * 0.97)
        expected = products + (issue**6 + dram**6) ** (1 / 6) + 3 * 1.2
        assert ffn.microseconds(base.forward, "H100") == pytest.approx(expected)
        bound = products + dram + 3 * 1.2
        assert ffn.microseconds(base.forward, "H100", gelu_at_dram=True) == pytest.approx(bound)

    def test_the_frozen_ffn_over_itself_is_one(self):
        base = ffn.frozen("bf16", 7_880)
        for found in ffn.ratios(base, base, "H200", 7_880).values():
            assert found["ratio"] == found["low"] == found["high"] == found["gelu_at_dram"] == 1
            assert found["uncertainty"] == 0.06

    def test_views_and_empty_tensors_are_no_launches(self):
        def run():
            x = torch.empty(8, 8, device="meta")
            x.new_empty(3)[1:].t()
            return x.sum(0)

        assert ffn.trace(run) == [ffn.Other("sum", 8 * 8 * 4 + 8 * 4)]


class TestBudget:
    def test_every_launch_has_a_budget(self):
        for own in json.loads(budget.FILE.read_text())["triton"].values():
            assert set(own) == set(KERNELS)

    def test_the_committed_table_is_of_these_launches_and_their_budgets(self):
        results = json.loads((ROOT / "bench" / "results" / "static.json").read_text())
        limits = json.loads(budget.FILE.read_text())["triton"][".".join(results["triton"].split(".")[:2])]
        rows = [
            row for row in results["kernels"] if (row["dtype"], row["tokens"]) == (budget.DTYPE, sum(budget.COUNTS))
        ]
        assert {row["kernel"] for row in rows} == set(KERNELS)
        for row in rows:
            assert row["instructions_per_token"] == pytest.approx(limits[row["kernel"]][row["pool"]], abs=0.11), row

    def test_a_dearer_kernel_is_named_with_its_budget(self, tmp_path, monkeypatch):
        file = tmp_path / "budget.json"
        monkeypatch.setattr(budget, "measure", lambda kernel, pool: 100.0)
        budget.renew(["gelu"], ["16/3/1/4"], file)
        assert budget.exceeded(["gelu"], ["16/3/1/4"], file) == []
        monkeypatch.setattr(budget, "measure", lambda kernel, pool: 100.1)
        dearer = "gelu 16/3/1/4: 100.1 instructions a token, its budget is 100.0"
        assert budget.exceeded(["gelu"], ["16/3/1/4"], file) == [dearer]
        (unknown,) = budget.exceeded(["expand"], ["16/3/1/4"], file)
        assert unknown.startswith("expand 16/3/1/4: no budget")

    def test_renewing_keeps_other_versions_and_drops_what_is_gone(self, tmp_path, monkeypatch):
        file = tmp_path / "budget.json"
        file.write_text(budget.dump({"3.1": {"gelu": {"a": 1.0}}, budget.version(): {"gone": {"a": 1.0}}}))
        monkeypatch.setattr(budget, "measure", lambda kernel, pool: 2.0)
        budget.renew(["gelu"], ["b"], file)
        kept = json.loads(file.read_text())["triton"]
        assert kept == {"3.1": {"gelu": {"a": 1.0}}, budget.version(): {"gelu": {"b": 2.0}}}

    def test_an_unknown_version_of_triton_warns(self, monkeypatch):
        monkeypatch.setattr(budget.triton, "__version__", "9.8.7")
        with pytest.warns(UserWarning, match="no budgets for Triton 9.8, only for 3.9"):
            assert budget.exceeded(["gelu"], ["16/3/1/4"]) == []


@pytest.fixture(scope="module")
def run_static(tmp_path_factory):
    """run_static(arguments..): the command, in a process that compiles; kernels are compiled once for all tests."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))

    def run(*arguments):
        command = [sys.executable, "-m", "bench.static", *arguments]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)

    return run


class TestLargePools:
    pytestmark = compiles

    def test_both_algorithms_are_in_the_committed_table_beside_the_rule(self):
        rows = json.loads((ROOT / "bench" / "results" / "static.json").read_text())["large"]
        settings = {(row["pool"], row["dtype"], row["tokens"], row["gpu"]) for row in rows}
        assert settings == set(product(large.POOLS, ("bf16", "fp16"), (40_960, 7_880), ("H100", "H200")))
        assert all(row[name][way] > 0 for row in rows for name in LARGE for way in ("forward", "backward"))
        assert {row["pool"]: row["rule"] for row in rows} == dict.fromkeys(large.POOLS, "dense")

    def test_sorted_experts_are_the_launches_of_kernels_grouped(self):
        """Every expert has equally many pairs, so that a program of weight_grad walks over its share of them."""
        code = """
import json
from bench.static import ffn, large
own, dense = (large.passes("64/12/4/16", "bf16", 1280, 5, name) for name in ("grouped", "dense"))
(grad, _) = (step for step in own.backward if step.name == "weight_grad_kernel")
products = [(step.m, step.k, step.n) for step in dense.forward if isinstance(step, ffn.Product)]
print(json.dumps([[step.name for step in own.forward if step.name.endswith("kernel")], grad.loops[0][1], products]))
"""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        names, trips, products = json.loads(done.stdout)
        sorting = ["count_kernel", "prefix_kernel", "scatter_kernel"]
        assert names == ["route_kernel", *sorting, "shrink_kernel", "expand_kernel", "combine_kernel"]
        assert trips == 1280 * 16 // 64 // 64  # pairs over experts, 64 at a time
        assert products == [[1280, 768, 1024], [1280, 1024, 768]]


class TestCommand:
    pytestmark = compiles

    def test_every_kernel_is_within_its_budget(self, run_static):
        done = run_static("--check", "--pools", "16/3/1/4,64/12/4/16")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_the_table_says_that_nothing_was_timed_and_prints_its_constants(self, run_static, tmp_path):
        out = tmp_path / "static.json"
        chosen = ("--kernels", "route_shrink", "--pools", "16/3/1/4", "--dtypes", "bf16", "--tokens", "7880")
        done = run_static(*chosen, "--markdown", "--out", out)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Warning") == 0
        assert table.NOT_TIMED in done.stdout
        for line in CONSTANTS.lines():
            assert line in done.stdout
        results = json.loads(out.read_text())
        (row,) = results["kernels"]
        # 768 columns by 128, the second and the third expert of each token
        assert list(row["loops"].values()) == [6, 2]
        ratios = {(r["gpu"], r["algorithm"]): r for r in results["ratios"]}
        assert set(ratios) == set(product(("H100", "H200"), ALGORITHMS))
        for (gpu, algorithm), r in ratios.items():
            if algorithm == "fused":  # saves the passes of GELU, which the frozen FFN makes
                for direction in ("forward", "both"):
                    assert 0.8 < r[direction]["ratio"] < ratios[gpu, "columns"][direction]["ratio"]
            else:
                assert 1 < r["forward"]["gelu_at_dram"] < r["both"]["ratio"] < 1.5

    def test_compiling_under_the_interpreter_is_refused_in_one_line(self):
        done = subprocess.run(
            [sys.executable, "-m", "bench.static"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )
        assert done.returncode == 2
        assert done.stderr.splitlines() == ["bench.static compiles: unset TRITON_INTERPRET"]
