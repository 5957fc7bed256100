"""The rows of the static model, as text, Markdown and JSON."""

import json

import triton

from bench.aot import Launch
from bench.static.constants import CONSTANTS, RATES
from bench.static.ffn import Passes, ratios
from bench.static.model import TARGET, Cost
from kernels.experts.custom_ops import ALGORITHMS
from train.output.tables import format_table

GPUS = tuple(CONSTANTS.dram)
UNITS = ("issue", "fma", "fp16", "alu", "xu", "lsu", "uniform", "shared", "tensor", "L2", "latency")
COUNTED = (*RATES, "tensor", "wavefronts")
NOT_TIMED = (
    f"Nothing was timed. Instructions are counted in the code that Triton {triton.__version__} compiles for {TARGET}; "
    "microseconds and ratios follow from the constants below, which are assumed or published."
)
COUNTED_TITLE = "Instructions of one warp by unit, issue being all of them; those of all warps for each token; bytes"
Row = dict


def kernel_row(setting: Row, launch: Launch, cost: Cost) -> Row:
    """Everything about one launch; ``setting`` names its kernel, pool, dtype and tokens."""
    return setting | {
        "tile": "x".join(map(str, launch.sizes.values())),
        "warps": cost.warps,
        "registers": cost.registers,
        "shared": cost.shared,
        "programs": cost.programs,
        "resident": cost.resident,
        "waves": round(cost.waves, 2),
        "loops": dict(cost.loops),
        "per_warp": {name: round(cost.per_warp.get(name, 0), 1) for name in COUNTED},
        "instructions_per_token": round(cost.instructions / setting["tokens"], 1),
        "dram_bytes": cost.dram_bytes,
        "l2_bytes": cost.l2_bytes,
        "flops": cost.flops,
        "units": {unit: round(us, 2) for unit, us in cost.units(GPUS[0]).items() if unit != "DRAM"},
        "dram": {gpu: round(cost.units(gpu)["DRAM"], 2) for gpu in GPUS},
        "binding": {gpu: cost.binding(gpu) for gpu in GPUS},
        "microseconds": {gpu: round(cost.microseconds(gpu), 2) for gpu in GPUS},
    }


def ratio_rows(setting: Row, own: Passes, base: Passes) -> list[Row]:
    """One for each GPU; ``setting`` names pool, dtype, tokens and algorithm."""
    return [setting | {"gpu": gpu, **ratios(own, base, gpu, setting["tokens"])} for gpu in GPUS]


def _name(row: Row) -> list[str]:
    return [row["kernel"], f"{row['pool']} {row['dtype']} {row['tokens']:,}"]


def counts(rows: list[Row], markdown: bool) -> str:
    occupancy = ("tile", "programs", "resident", "waves", "registers", "shared")
    head = ["kernel", "pool, type, tokens", *occupancy, "instr/token", *COUNTED, "DRAM MB", "L2 MB"]
    lines = [
        [
            *_name(row),
            *(str(row[name]) for name in occupancy),
            f"{row['instructions_per_token']:,.0f}",
            *(f"{row['per_warp'][name]:,.0f}" for name in COUNTED),
            *(f"{row[name] / 1e6:,.1f}" for name in ("dram_bytes", "l2_bytes")),
        ]
        for row in rows
    ]
    return format_table([head, *lines], markdown, text_columns=2)


def times(rows: list[Row], markdown: bool) -> str:
    last = [f"{what} {gpu}" for what in ("DRAM", "binds", "modelled") for gpu in GPUS]
    lines = [
        [
            *_name(row),
            *(f"{row['units'][unit]:,.1f}" for unit in UNITS),
            *(f"{row['dram'][gpu]:,.1f}" for gpu in GPUS),
            *(row["binding"][gpu] for gpu in GPUS),
            *(f"{row['microseconds'][gpu]:,.1f}" for gpu in GPUS),
        ]
        for row in rows
    ]
    return format_table([["kernel", "pool, type, tokens", *UNITS, *last], *lines], markdown, text_columns=2)


def predictions(rows: list[Row], markdown: bool) -> str:
    head = ["pool, type, tokens", "algorithm, GPU"]
    for name in ("forward", "forward + backward"):
        head += [name, "by cuBLAS's rate", "GELUs at DRAM"]
    lines = []
    for row in rows:
        line = [f"{row['pool']} {row['dtype']} {row['tokens']:,}", f"{row['algorithm']} {row['gpu']}"]
        for found in (row["forward"], row["both"]):
            line.append(f"{found['ratio']:.2f} +- {found['uncertainty']:.2f}")
            line += [f"{found['low']:.3f}..{found['high']:.3f}", f"{found['gelu_at_dram']:.2f}"]
        lines.append(line)
    return format_table([head, *lines], markdown, text_columns=2)


def large_pools(rows: list[Row], markdown: bool) -> str:
    head = ["pool, type, tokens", "GPU", "rule"]
    head += [f"{name} {way}" for name in ALGORITHMS for way in ("forward", "backward")] + ["grouped / dense"]
    lines = []
    for row in rows:
        times = [row[name][way] for name in ALGORITHMS for way in ("forward", "backward")]
        line = [f"{row['pool']} {row['dtype']} {row['tokens']:,}", row["gpu"], row["rule"]]
        lines.append([*line, *(f"{us:,.0f}" for us in times), f"{sum(times[2:]) / sum(times[:2]):.2f}"])
    return format_table([head, *lines], markdown, text_columns=3)


def text(results: Row, markdown: bool) -> str:
    """All tables, with the constants that they depend on."""
    parts = [("# Static model" if markdown else "Static model"), NOT_TIMED]
    sections = (
        (COUNTED_TITLE, counts, results["kernels"]),
        ("Modelled microseconds by unit", times, results["kernels"]),
        ("Modelled time of the adapted FFN over the frozen one", predictions, results["ratios"]),
        ("Modelled microseconds of the experts of large pools, without routers' logits", large_pools, results["large"]),
    )
    for title, table, rows in sections:
        if rows:
            parts += [("## " if markdown else "") + title, table(rows, markdown)]
    return "\n\n".join([*parts, "\n".join(f"{'- ' if markdown else ''}{line}" for line in CONSTANTS.lines())])


def dump(results: Row) -> str:
    """JSON with one row to a line."""
    parts = [f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in results.items()]
    facts = json.dumps({"nothing_was_timed": NOT_TIMED, "triton": triton.__version__, "constants": CONSTANTS.lines()})
    return f"{facts[:-1]},\n{', '.join(parts)}}}\n"
