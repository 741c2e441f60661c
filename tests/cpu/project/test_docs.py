"""The pages under docs/: their code runs, their numbers are the records', their messages are the source's, their links
and commands lead somewhere."""

import ast
import json
import pathlib
import re
import shlex

import pytest
import torch

import mla_cute
from mla_cute.config import default_config
from mla_cute.gpu_speed import H200, GpuSpeed
from mla_cute.tuned import select
from mla_cute.tuning import command, recipes

ROOT = pathlib.Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PAGES = ("formats", "engines", "libraries", "cuda_graphs", "tuning", "numerics", "troubleshooting", "benchmarks")
RECORDS = ROOT / "tune" / "measurements" / "NVIDIA_H200"
# Which errors users meet: those of the calls and of what is made for them.
SOURCES = (
    "api", "sparse", "append", "attend", "launch", "merge_states", "ops", "plan", "plan_decode", "plan_prefill",
    "check", "check_device",
    "expect", "quant", "config", "tuned/explain", "compile/warmup",
)  # fmt: skip


def text_of(page):
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def prose(page):
    return " ".join(re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL).split())


def tables(page):
    """Cells of the rows of every table, the heads among them."""
    rows = re.findall(r"^\|(.*)\|$", text_of(page), re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


# ------------------------------------------------------------------------------------------------ code


class Graph:
    """Where there is no GPU: what is captured runs once, a replay does nothing."""

    replays = 0

    def replay(self):
        Graph.replays += 1


class Capture:
    def __init__(self, graph):
        assert isinstance(graph, Graph)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


def run(page, monkeypatch):
    """The page's Python in one namespace, on CPU tensors; returns the namespace."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **{"backend": "aot_eager"} | k))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    torch.manual_seed(0)
    names = {}
    for code in blocks(page, "python"):
        exec(compile(code.replace('"cuda"', '"cpu"'), f"docs/{page}.md", "exec"), names)
    return names


def test_formats_runs(monkeypatch):
    names = run("formats", monkeypatch)
    assert names["out"].shape == (4, 64, 512)
    assert names["lse"].isfinite().all()
    views = names["group_ckv"], names["group_scales"], names["group_kpe"]
    assert [x.stride(1) for x in views] == [656, 164, 328]
    assert "656, 164 and 328 between tokens" in prose("formats")
    # fp8_rows holds what append_to_cache makes of `new`
    page, row = names["page"], names["row"]
    held = names["fp8_rows"][page, row].float() * 0.02
    assert (held - names["new"].float()).norm() < 0.04 * names["new"].float().norm()


def test_cuda_graphs_runs(monkeypatch):
    before = Graph.replays
    names = run("cuda_graphs", monkeypatch)
    assert Graph.replays == before + 1
    names["seq_lens"].copy_(torch.tensor([512, 3, 0, 77], dtype=torch.int32))
    names["step"]()  # what the replay would have done
    alone = torch.tensor([1, 2], dtype=torch.int32)
    for layer, cache in enumerate(names["caches"]):
        assert not names["out"][layer, 2].any()
        wanted, _ = mla_cute.mla_paged_decode_block_table(
            names["q_nope"][layer][[1, 3]], names["q_pe"][layer][[1, 3]], cache[..., :512], cache[..., 512:],
            names["block_table"][[1, 3]], torch.tensor([3, 77], dtype=torch.int32), sm_scale=192**-0.5,
        )  # fmt: skip
        torch.testing.assert_close(names["out"][layer][[1, 3]], wanted, rtol=0, atol=0)
        assert alone.numel() == len(wanted)


@pytest.mark.slow
def test_libraries_runs(monkeypatch):
    names = run("libraries", monkeypatch)
    assert names["out"].shape == (3, 16, 512)


@pytest.mark.parametrize("page", ["tuning", "numerics"])
def test_page_runs(page, monkeypatch):
    select.clear()
    assert run(page, monkeypatch)


def test_every_block_is_of_a_kind_that_is_tested():
    kinds = {(page, kind) for page in PAGES for kind in re.findall(r"^```(\w+)$", text_of(page), re.MULTILINE)}
    assert kinds == {
        *((page, "python") for page in PAGES if page not in ("benchmarks", "troubleshooting", "engines")),
        ("tuning", "toml"),
    }


def test_recipe_of_the_page_is_one():
    (recipe,) = blocks("tuning", "toml")
    assert len(recipes.parse(recipe, "docs/tuning.md")) == 3 * 2 * 2


def test_commands_of_tune_are_understood():
    lines = re.findall(r"^mla-cute tune (.*)$", text_of("tuning"), re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        values = command.parser().parse_args(shlex.split(line))
        options = command.options_of(vars(values))
        if options.from_log is None and options.diff is None:
            assert command.shapes_of(options), line


def test_recipes_are_named():
    named = [row[0].strip("`") for row in tables("tuning") if row[0].strip("`") in recipes.names()]
    assert sorted(named) == recipes.names()


def test_tuned_files_are_searched_in_the_order_of_the_page(monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_CUTE_TUNED_DIR", str(tmp_path))
    labels = [label for label, _ in select.search_path("NVIDIA H200")]
    assert labels == ["MLA_CUTE_TUNED_DIR", "user", "shipped"]
    rows = [row[0] for row in tables("tuning") if row[0].endswith("NVIDIA_H200.json`")]
    assert ["MLA_CUTE_TUNED_DIR" in rows[0], "cache_dir()" in rows[1], "tuned/data" in rows[2]] == [True] * 3
    assert {path.name for _, path in select.search_path("NVIDIA H200")} == {"NVIDIA_H200.json"}


# ------------------------------------------------------------------------------------------------ numbers


def record(name):
    [path] = RECORDS.glob(f"{name}_????-??-??.json")
    return json.loads(path.read_text(encoding="utf-8"))


def check_rows():
    found = {}
    for row in record("fp8_check")["rows"]:
        assert not row["failures"], row
        found[row["data"], row["kv_format"], row["q"], row["num_heads"], row["accuracy"]] = row
    return found


def error_rows(page):
    datas = {row["data"] for row in record("fp8_check")["rows"]}
    found = [row for row in tables(page) if row[0] in datas]
    assert len(found) == 9
    return found


def test_errors_of_formats_are_the_records():
    rows = check_rows()
    for data, kv_format, *cells in error_rows("formats"):
        keys = [("bf16", 16), ("bf16", 128), ("e4m3", 16), ("e4m3", 128)]
        found = [rows[(data, kv_format, *key, "high")]["format_error"]["rel_err"] for key in keys]
        wanted = [f"{error:.1e}" for error in found]
        assert cells == wanted, (data, kv_format)


def test_errors_of_kernels_are_the_records():
    rows = check_rows()
    for data, kv_format, *cells in error_rows("numerics"):
        for (heads, accuracy), found in zip(
            ((16, "high"), (128, "high"), (128, "native")), zip(cells[::2], cells[1::2], strict=True), strict=True
        ):
            row = rows.get((data, kv_format, "bf16", heads, accuracy))
            error = None if row is None else row["kernel_error"]
            wanted = ("", "") if error is None else tuple(f"{error[name]:.1e}" for name in ("rel_err", "lse_err"))
            assert found == wanted, (data, kv_format, heads, accuracy)


def test_errors_over_a_bf16_cache_are_the_records():
    errors = [row["check"]["rel_err"] for row in record("bf16")["rows"]]
    assert f"found {min(errors):.1e} to {max(errors):.1e}" in prose("numerics")


def ran_tile16(case):
    """Whether a case of the FP8 record, of 22aa337, ran the kernel for few heads: up to so many of its tiles per SM."""
    heads = case["num_heads"]
    tiles = case["batch"] * -(-case["kv_len"] // 64) * -(-heads // 16) / 132
    most = {64: 6, 128: 6} if case["q_fp8"] else {64: 11, 128: 8} if case["kv_format"] == "group" else {64: 18, 128: 16}
    return heads <= 16 or tiles <= most[heads]


def test_times_of_queries_are_the_records():
    rows, cold, few = {}, {}, {}
    for row in record("fp8")["rows"]:
        case = row["case"]
        key = case["num_heads"], (case["batch"], case["kv_len"]), case["kv_format"], case["q_fp8"]
        rows[key], cold[key] = row["us_amortised"], row["us_cold"]
        few[key] = ran_tile16(case)
    found = [row for row in tables("formats") if row[0] in ("16", "64", "128")]
    assert len(found) == 3
    for heads, *cells in found:
        keys = [(kv_format, q_fp8) for kv_format in ("tensor", "group") for q_fp8 in (False, True)]
        assert cells == [f"{rows[(int(heads), (128, 8192), *key)]:.1f}" for key in keys], heads
    saved = {}  # by whether 16-bit and e4m3 queries run the kernel for few heads; both: up to 16 heads, and beyond
    for (*case, q_fp8), us in rows.items():
        if q_fp8:
            kinds = few[(*case, False)], few[(*case, True)]
            if all(kinds):
                kinds = "16 heads" if case[0] <= 16 else "more heads"
            saved.setdefault(kinds, []).append(100 * (1 - us / rows[(*case, False)]))
    assert saved.keys() == {"16 heads", "more heads", (False, False), (True, False)}
    # Of one case a run says 5 %, and the same run with L2 emptied in front of each call -5 %.
    *others, most = sorted(saved["16 heads"])
    emptied = [100 * (1 - us / cold[(*key[:3], False)]) for key, us in cold.items() if key[0] == 16 and key[3]]
    assert max(others) < 2.5
    assert max(emptied) < 2.5
    ranges = {kinds: f"save {min(found):.0f} to {max(found):.0f} %" for kinds, found in saved.items()}
    text = prose("formats")
    assert f"with 16 heads e4m3 queries gain nothing (they {ranges['16 heads']} in the record's cases, " in text
    assert f"{min(emptied):.0f} to {max(emptied):.0f} % with L2 emptied; the {most:.0f} % are one case)" in text
    assert f"in small steps of more they {ranges['more heads']};" in text
    assert f"otherwise, e4m3 queries {ranges[False, False]} in the record's cases" in text
    assert f"but e4m3 ones do not: there they {ranges[True, False]}." in text


def test_what_e4m3_queries_save_in_prefill_is_the_record():
    us = {}
    for row in record("fp8_prefill")["rows"]:
        case = row["case"]
        us[case["num_heads"], str(case["groups"]), case["kv_format"], case["q_fp8"]] = row["us_amortised"]
    saved = {}
    for (*case, kv_format, q_fp8), time in us.items():
        if q_fp8:
            saved.setdefault(kv_format, []).append(100 * (1 - time / us[(*case, kv_format, False)]))
    of = {kv_format: f"{min(found):.0f} to {max(found):.0f} %" for kv_format, found in saved.items()}
    assert f"In prefill they save {of['tensor']} over format tensor, {of['token']} over token" in prose("formats")
    assert max(saved["group"]) < 0


def times_of(rows, size, **facts):
    """Microseconds of a case with L2 as it is and emptied, as the page shows them."""
    wanted = facts | dict(zip(("num_heads", "batch", "kv_len"), map(int, size.split(", ")), strict=True))
    found = [row for row in rows if wanted.items() <= row.items()]
    return [f"{row['us_hot']}, {row['us_cold']}" for row in found]


def test_times_with_l2_emptied_are_the_records():
    bf16, fp8 = record("cold_code")["rows"], record("cold_code_one_copy")
    page = tables("performance")
    [head] = [i for i, row in enumerate(page) if row[1:] == ["copies", "one copy", "copies again"]]
    runs = "before", "after", "before_again"
    for size, *cells in page[head + 2 : head + 2 + len(fp8["before"])]:
        q_fp8 = not size.endswith(", bf16 q")
        wanted = [times_of(fp8[run], size.removesuffix(", bf16 q"), q_fp8=q_fp8) for run in runs]
        assert [[cell] for cell in cells] == wanted, size
    [head] = [i for i, row in enumerate(page) if row[1:2] == ["tiles per SM"]]
    assert len(page[head + 2 : head + 22]) == 20
    for size, _, *cells in page[head + 2 : head + 22]:
        wanted = [times_of(bf16, size, kv_format="", kernel=kernel) for kernel in ("tile64", "tile16")]
        for q_fp8 in (True, False):
            for kernel in ("tile64", "tile16"):
                wanted.append(times_of(fp8["both_kernels_after"], size, q_fp8=q_fp8, kernel=kernel))
        assert [[cell] if cell else [] for cell in cells] == wanted, size


# ------------------------------------------------------------------------------------------------ messages


def template(node):
    """The text of a message, with \\0 for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return None


def strings_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    return [text for node in ast.walk(tree) if id(node) not in parts and (text := template(node))]


def raised():
    """(file, template) of the errors of SOURCES; those of the checks on the device are made in lambdas."""
    found = []
    for name in SOURCES:
        for node in ast.walk(ast.parse((ROOT / "mla_cute" / f"{name}.py").read_text(encoding="utf-8"))):
            message = None
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = template(node.exc.args[0])
            elif isinstance(node, ast.Lambda):
                message = template(node.body)
            if message and message.strip("\0: "):
                found.append((name, message))
    return found


def stems():
    """The code spans of the first columns of the tables of messages."""
    found = [stem for row in tables("troubleshooting") for stem in re.findall(r"`([^`]+)`", row[0])]
    return [stem for stem in found if " " in stem]


def pattern(stem):
    return ".*".join(re.escape(part) for part in re.split(r"\.{3}(?!\.)", stem))


def test_messages_are_the_sources():
    texts = [text for path in (ROOT / "mla_cute").rglob("*.py") for text in strings_of(path)]
    assert len(stems()) > 60
    gone = [stem for stem in stems() if not any(re.search(pattern(stem), text, re.DOTALL) for text in texts)]
    assert not gone


def test_every_error_of_the_calls_is_explained():
    known = [pattern(stem) for stem in stems()]
    errors = raised()
    assert len(errors) > 80
    # "NAME: expected WHAT, got WHAT" of sizes would match everything
    known.remove(pattern("...: expected ..., got ..."))
    sizes = "\0: expected \0, got \0"
    missing = [
        (name, message.replace("\0", "..."))
        for name, message in errors
        if message != sizes and not any(re.match(x, message, re.DOTALL) for x in known)
    ]
    assert not missing


@pytest.mark.parametrize(
    ("stem", "call"),
    [
        ("...: expected shape ...", lambda q, c, i: mla_cute.plan_decode(i[:0], num_heads=1, page_size=1)),
        ("...: expected an int", lambda q, c, i: mla_cute.plan_decode(i, num_heads=1.0, page_size=1)),
        ("plan: expected a plan for ..., got one for ...", None),
    ],
)
def test_messages_read_as_quoted(stem, call):
    q, cache = torch.zeros(1, 2, 576, dtype=torch.bfloat16), torch.zeros(2, 1, 576, dtype=torch.bfloat16)
    indptr = torch.tensor([0, 1], dtype=torch.int32)
    if call is None:
        plan = mla_cute.plan_decode(indptr, num_heads=1, page_size=1)

        def call(q, cache, indptr):
            parts = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:]
            mla_cute.mla_paged_decode(*parts, indptr, indptr[:1], 1.0, plan=plan)

    with pytest.raises((TypeError, ValueError)) as error:
        call(q, cache, indptr)
    assert stem in stems()
    assert re.match(pattern(stem), str(error.value))


# ------------------------------------------------------------------------------------------------ links and names


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = text_of(page)
    targets = [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)]
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (DOCS / path).is_file(), target
        heads = re.findall(r"^#+ (.*)$", (DOCS / path).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")) for head in heads}, target
    for path in re.findall(r"`((?:mla_cute|examples|tune)/[\w./]*\w\.(?:py|toml))`", text):
        assert (ROOT / path).is_file(), path


def test_pages_name_the_releases_of_the_integrations():
    text = text_of("engines") + text_of("libraries")
    for module, named in (("vllm", "0.33.0"), ("sglang", "0.5.23"), ("flashinfer", "0.7.4"),
                          ("flash_mla", "9241ae3"), ("flashinfer_bench", "0.1.2")):  # fmt: skip
        source = (ROOT / "mla_cute" / "integrations" / f"{module}.py").read_text(encoding="utf-8")
        assert named in source.split('"""')[1], module
        assert named in text, module


def test_variables_exist():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mla_cute").rglob("*.py"))
    named = {name for page in PAGES for name in re.findall(r"MLA_CUTE_[A-Z_]+", text_of(page))}
    assert len(named) >= 6
    for name in named:
        assert f'"{name}"' in sources, name


def test_pages_stay_short():
    assert all(text_of(page).count("\n") <= 165 for page in PAGES)


def test_architecture_names_every_file():
    text = text_of("architecture")
    named = {path for cell in re.findall(r"`([\w/.]+)`", text) for path in [cell.strip("/")] if path}
    package = ROOT / "mla_cute"
    for folder in (package, package / "kernels"):
        files = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
        assert files <= named, sorted(files - named)
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders <= named
    known = {path.name for path in package.rglob("*.py")} | folders
    found = set(re.findall(r"\b\w+\.py\b", text))
    assert found <= known, sorted(found - known)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (DOCS / target).is_file(), target


def test_defaults_of_gpus_are_the_formulas():
    gpus = {
        "H200": H200,
        "H100 SXM": GpuSpeed(132, 3352.3, 1980.0),
        "H100 PCIe": GpuSpeed(114, 2039.0, 1755.0),
        "H20": GpuSpeed(78, 4022.8, 1980.0, tensor_share=0.25),
    }
    found = {row[0]: row[1:] for row in tables("performance") if row[0] in gpus}
    assert found.keys() == gpus.keys()
    for name, cells in found.items():
        configs = [default_config(heads, gpus[name]) for heads in (16, 64, 128)]
        wanted = [[getattr(c, field) for c in configs] for field in ("item_overhead", "split_penalty")]
        assert list(cells) == [", ".join(map(str, numbers)) for numbers in wanted], name
    # GB/s of an SM, in the order in which the page tells them.
    shares = [round(gpus[name].gbps_per_sm) for name in ("H20", "H200", "H100 SXM", "H100 PCIe")]
    text = "(H20: {} GB/s of the peak each, H200 {}, H100 {}, H100 PCIe {})".format(*shares)
    assert text in prose("performance")
