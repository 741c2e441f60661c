"""A record as text: the rows of the table, the summary under it, and two records compared."""

import statistics
from collections.abc import Sequence
from typing import Any

from . import reading, sustained, targets
from .cases import Case, PrefillCase, case_of
from .peers import SHORT_NAMES
from .runner import row_ok

COLUMNS = (
    "H", "B", "L", "page", "dtype", "us", "min", "p90", "plan", "us+plan/61", "cold", "chained",
    "GB/s", "% read", "TFLOP/s", "% cuBLAS", "x public", "rel err",
)  # fmt: skip
load = reading.load

SHORT_DTYPE = {"bfloat16": "bf16", "float16": "fp16"}


def columns(peers: Sequence[str] = ()) -> tuple[str, ...]:
    return (*COLUMNS, *peers)


def cells(row: dict[str, Any], peers: Sequence[str] = ()) -> tuple[str, ...]:
    """One row of the record as strings, in the order of `columns(peers)`."""
    case = case_of(row)
    head = (str(case.num_heads), *_batch_and_length(case), str(case.page_size), _types(case))
    if "error" in row:
        return (*head, "error", *[""] * (len(columns(peers)) - len(head) - 1))
    ratio = row.get("public_best_ratio")
    error = row["check"]["rel_err"]
    return (
        *head,
        *(f"{row[key]:.1f}" for key in ("us", "us_min", "us_p90")),
        f"{row['plan_us']:.1f}",
        f"{row['us_amortised']:.1f}",
        f"{row['us_cold']:.1f}" if "us_cold" in row else "-",
        f"{row['us_chained']:.1f}",
        f"{row['gbps']:.0f}",
        f"{row['read_share']:.1%}",
        f"{row['tflops']:.0f}",
        f"{row['cublas_share']:.1%}",
        f"{ratio:.2f}" if ratio is not None else "-",
        ("nan" if error is None else f"{error:.1e}") + ("" if row_ok(row) else " WRONG"),
        *(_peer_cell(row, name) for name in peers),
    )


def _types(case: Case | PrefillCase) -> str:
    """bf16; of an FP8 cache its format, the queries, and the 16-bit dtype if it is not theirs and not bf16:
    tensor/bf16, token/e4m3, group/e4m3/fp16. Then head dimensions that are not 512 + 64, bf16/256+64, and the accuracy
    where the case has one, tensor/bf16/fast."""
    dtype = SHORT_DTYPE[case.dtype]
    if case.kv_format:
        queries = dtype if not case.q_fp8 else "e4m3" if case.dtype == "bfloat16" else f"e4m3/{dtype}"
        dtype = f"{case.kv_format}/{queries}"
    sparse = "/sparse" if isinstance(case, Case) and case.sparse else ""
    others = "".join(f"/{name}" for name in (case.dims_label, case.accuracy) if name)
    return dtype + others + ("" if case.layout == "separate" else "/fused") + sparse


def _batch_and_length(case: Case | PrefillCase) -> tuple[str, str]:
    """128, 8192; of a ragged batch 128, 1024..32768; of a prefill 64+1, 1/8192+2048/8192: query tokens and keys of a
    request, per group."""
    if isinstance(case, Case):
        return str(case.batch), str(case.kv_len) + (f"..{case.longest}" if case.longest else "")
    return "+".join(str(n) for n, _, _ in case.groups), "+".join(f"{q}/{kv}" for _, q, kv in case.groups)


def _peer_cell(row: dict[str, Any], name: str) -> str:
    peer = row["peers"].get(name, {})
    if "us" not in peer:
        return "unsupported" if "unsupported" in peer else "error"
    wrong = "" if peer["check"]["ok"] else " WRONG"
    return f"{peer['us']:.1f} ({peer['us'] / row['us_amortised']:.2f}x){wrong}"


def best_peer(row: dict[str, Any]) -> tuple[str, float] | None:
    """Name and time of the fastest peer whose output is right; None where no peer has one."""
    peers = row.get("peers", {})
    right = {name: peer["us"] for name, peer in peers.items() if "us" in peer and peer["check"]["ok"]}
    return min(right.items(), key=lambda item: item[1], default=None)


def beside(row: dict[str, Any]) -> str:
    """ "45.7 (46.6 FA3)": the time of a row, in parentheses that of the fastest peer, if there is one."""
    if not row_ok(row):
        return "-"
    best = best_peer(row)
    ours = f"{row['us_amortised']:.1f}"
    return ours if best is None else f"{ours} ({best[1]:.1f} {SHORT_NAMES.get(best[0], best[0])})"


def over_best_peers(record: dict[str, Any]) -> str | None:
    """What there is to say of all rows that a peer has run right: speed over the fastest, and which was how often."""
    pairs = [(row, best) for row in record["rows"] if row_ok(row) and (best := best_peer(row)) is not None]
    if not pairs:
        return None
    ratios = {case_of(row): us / row["us_amortised"] for row, (_, us) in pairs}
    least = min(ratios, key=ratios.__getitem__)
    fastest = [name for _, (name, _) in pairs]
    counts = ", ".join(f"{name} {fastest.count(name)}" for name in sorted(set(fastest), key=fastest.count)[::-1])
    values = list(ratios.values())
    return (
        f"against the fastest peer per cell, {len(pairs)} cells: faster in {sum(ratio > 1 for ratio in values)}, "
        f"geometric mean {statistics.geometric_mean(values):.3f}x, lowest {ratios[least]:.3f}x ({least.label}); "
        f"fastest peer: {counts}"
    )


def beside_tables(record: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Tables of `beside` over heads, batch and length, as (page size and types, columns, rows): for decode batches of
    one length that a peer has run."""
    found: dict[tuple[int, str], dict[tuple[int, int], dict[int, str]]] = {}
    timed = set()
    for row in record["rows"]:
        case = case_of(row)
        if isinstance(case, Case) and not case.longest:
            kind = (case.page_size, _types(case))
            found.setdefault(kind, {}).setdefault((case.num_heads, case.batch), {})[case.kv_len] = beside(row)
            if best_peer(row) is not None:
                timed.add(kind)
    tables = []
    for kind in (kind for kind in found if kind in timed):
        cells_of = found[kind]
        lengths = sorted({length for by_length in cells_of.values() for length in by_length})
        columns = ("heads", "batch", *map(str, lengths))
        rows = [
            (str(heads), str(batch), *(cells_of[heads, batch].get(length, "") for length in lengths))
            for heads, batch in sorted(cells_of)
        ]
        tables.append((f"page {kind[0]}, {kind[1]}", columns, rows))
    return tables


def widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def line(texts: Sequence[str], column_widths: Sequence[int]) -> str:
    return "  ".join(text.rjust(width) for text, width in zip(texts, column_widths, strict=True)).rstrip()


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned lines, the first of which are the columns' names."""
    sizes = widths(rows)
    return "\n".join(line(row, sizes) for row in rows)


def summary(record: dict[str, Any]) -> list[str]:
    """What the table does not say: ceilings, host time, targets, absent peers, failures."""
    gpu, ceilings = record["gpu"], record["ceilings"]
    lines = []
    if gpu is not None:
        clocks = gpu.get("clocks_under_load") or {}
        lines.append(
            f"{gpu['name']}, {gpu['sm_count']} SMs, driver {gpu['driver']}, "
            f"SM clock under load {clocks.get('sm_mhz')} MHz"
        )
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    for key, what in (("read_gbps", "read bandwidth, GB/s"), ("cublas_bf16_tflops", "cuBLAS bf16 8192^3, TFLOP/s")):
        end = ceilings["end"]
        at_end = f"{end[key]:.0f}" if end else "not measured"
        lines.append(f"{what}: {ceilings['start'][key]:.0f} at the start, {at_end} at the end")
    if "empty_graph_us" in ceilings:
        lines.append(
            f"a graph with an empty kernel measures as {ceilings['empty_graph_us']:.1f} us, part of every us above"
        )
    host = record.get("host", {})
    if "call_us" in host:
        lines.append(
            f"host time of one call: {host['call_us']:.1f} us with a plan, "
            f"{host['call_without_plan_us']:.1f} us without"
        )
        for prefix, what in (("prefill", "prefill call"), ("fp8", "call with an FP8 cache")):
            if f"{prefix}_call_us" in host:
                lines.append(
                    f"host time of one {what}: {host[f'{prefix}_call_us']:.1f} us with a plan, "
                    f"{host[f'{prefix}_call_without_plan_us']:.1f} us without"
                )
    elif "error" in host:
        lines.append(f"FAILED host time of one call: {host['error']}")
    for name, peer in record["peers"].items():
        lines.append(f"peer {name}: " + (f"{peer['version']}" if peer["present"] else f"absent ({peer['why']})"))
    if judged := targets.judge(record):
        lines.append(targets.sentence(judged))
    for one in judged:
        verdict, of = "met" if one.met else "MISSED", f" on an {one.gpu}" if one.gpu else ""
        beyond = "" if one.beyond is None else f", beyond {one.beyond:g}"
        lines.append(f"{verdict:>6}  {one.what}: {one.measured:.3g} (reach {one.reach:g}{beyond}{of})")
    ratios = [row["public_best_ratio"] for row in record["rows"] if "public_best_ratio" in row]
    if ratios:
        mean, slower = statistics.geometric_mean(ratios), sum(ratio < 1 for ratio in ratios)
        lines.append(
            f"against the best public kernel per cell, {len(ratios)} cells: "
            f"geometric mean {mean:.3f}x, lowest {min(ratios):.3f}x, {slower} slower"
        )
    if text := over_best_peers(record):
        lines.append(text)
    lines += sustained.lines(record, lambda row: case_of(row).label)
    for row in (row for row in record["rows"] if "cublas_share_beside" in row):
        lines.append(
            f"{case_of(row).label}: {row['cublas_share_beside']:.1%} of what cuBLAS reached right after it, "
            f"{row['cublas_beside_tflops']:.0f} TFLOP/s"
        )
    lines += failures(record)
    for row in record["rows"]:
        for name, peer in row.get("peers", {}).items():
            if reason := peer.get("error") or peer.get("unsupported"):
                lines.append(f"{name}, {case_of(row).label}: {reason}")
    if not record["complete"]:
        lines.append("INCOMPLETE: interrupted")
    lines.append(f"{len(record['rows'])} cases in {record['seconds']} s, {record['failed']} failed")
    return lines


def failures(record: dict[str, Any]) -> list[str]:
    """A line per row that failed or is wrong."""
    lines = []
    for row in record["rows"]:
        label = case_of(row).label
        if "error" in row:
            lines.append(f"FAILED {label}: {row['error']}")
        elif not row_ok(row):
            lines.append(f"WRONG  {label}: {row['check']}")
    return lines


COMPARE_COLUMNS = (
    "H",
    "B",
    "L",
    "page",
    "dtype",
    "a us",
    "b us",
    "a / b",
    "a plan",
    "b plan",
    "a chained",
    "b chained",
)


def compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of COMPARE_COLUMNS for the cells of both records (a / b above 1: b is faster), and the lines under them."""
    times = [{case_of(row): row for row in record["rows"] if "error" not in row} for record in (a, b)]
    shared = [case for case in times[0] if case in times[1]]
    rows, ratios = [], []
    for case in shared:
        old, new = times[0][case], times[1][case]
        ratios.append(old["us_amortised"] / new["us_amortised"])
        rows.append(
            (
                *cells(old)[:5],
                f"{old['us_amortised']:.1f}",
                f"{new['us_amortised']:.1f}",
                f"{ratios[-1]:.3f}",
                *(f"{side[key]:.1f}" for key in ("plan_us", "us_chained") for side in (old, new)),
            )
        )
    lines = [f"{name}: {origin(record)}" for name, record in (("a", a), ("b", b))]
    if (a["gpu"] or {}).get("name") != (b["gpu"] or {}).get("name"):
        lines.append("WARNING: different GPUs, the ratios compare cards and not code")
    for name, only in (("a", set(times[0]) - set(shared)), ("b", set(times[1]) - set(shared))):
        if only:
            lines.append(f"only in {name}: " + "; ".join(sorted(case.label for case in only)))
    if ratios:
        mean = statistics.geometric_mean(ratios)
        lines.append(
            f"{len(ratios)} cells: a / b geometric mean {mean:.3f}, lowest {min(ratios):.3f}, highest {max(ratios):.3f}"
        )
    return rows, lines


def origin(record: dict[str, Any]) -> str:
    """Date, GPU, code and ceilings in a line."""
    git, gpu, used = record["git"], record["gpu"] or {}, record["ceilings"]["used"]
    code = f"source {record['source_sha256'][:12]}"
    if git is not None:
        code = git["commit"][:12] + ("+dirty" if git["dirty"] else "")
    return (
        f"{record['date']}, {gpu.get('name')}, mla_cute {record['versions']['mla_cute']} {code}, "
        f"read {used['read_gbps']:.0f} GB/s, cuBLAS {used['cublas_bf16_tflops']:.0f} TFLOP/s"
    )
