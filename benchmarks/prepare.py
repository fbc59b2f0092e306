"""Preparing data, in MB of input a second and bytes of memory: ours, `datasets.map`, bare `tokenizers.encode_batch`.

    python benchmarks/prepare.py [--data FILE.jsonl] [--tokenizer FOLDER] [--mb 60] [--rounds 3] [--json F] [--md F]

Contenders run alternately, each in a process of its own, on the same file, on all processors that this process may use
(`taskset -c 0,1` for two). Without --data a file is made from the texts in ../shared/data where they are, else from
made-up words; without --tokenizer it is ../shared/data's, else one trained on that file.

    ours          build_store: from the file to the finished, memory-mapped store, every start of a worker counted
    encode_batch  time inside of encode_batch alone, 1,000 texts a call, its own threads; nothing read, nothing kept
    datasets.map  load_dataset and map(batched=True, num_proc=processors), without offsets or masks

CPU seconds are of all processes. Memory is the peak over all processes of the sum of resident (RSS: pages of files
count in each process, mapped ones too), proportional (PSS) and private (USS) memory, read every 0.1 s.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
CONTENDERS = ("ours", "encode_batch", "datasets.map")
BATCH = 1000


def texts_of(mb: float) -> Iterator[str]:
    """Documents of some KB: pieces of the shared texts, or made-up words with Zipf's frequencies."""
    rng, size = random.Random(0), 0
    files = sorted(SHARED.glob("raw_en/*/*.txt"))
    sources = [file.read_text(encoding="utf-8") for file in files if file.stat().st_size > 2**17]
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 9))) for _ in range(20_000)]
    while size < mb * 1e6:
        length = int(min(20_000, rng.lognormvariate(7.3, 0.9))) + 20
        if sources:
            source = rng.choice(sources)
            start = rng.randrange(len(source) - length)
            text = source[start : start + length]
        else:
            text = " ".join(words[int(len(words) ** rng.random()) - 1] for _ in range(length // 6 + 1)) + ".\n"
        size += len(text.encode()) + 16
        yield text


def made_data(work: Path, mb: float) -> Path:
    with (work / "data.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts_of(mb))
    return work / "data.jsonl"


def some_tokenizer(work: Path) -> Path:
    shared = SHARED / "tokenizer" / "minimind"
    if shared.is_dir():
        return shared
    from pertoken.data.tokens.train import train_tokenizer

    (work / "sample.txt").write_text("".join(texts_of(2)), encoding="utf-8")
    train_tokenizer([work / "sample.txt"], vocab_size=6400, out_dir=work / "tokenizer")
    return work / "tokenizer"


def ours(data: Path, tokenizer: Path, work: Path) -> float:
    from pertoken.data.store.build import build_store
    from pertoken.data.tokens.tokenizer import load_tokenizer
    from pertoken.recipe.data import DataConfig

    loaded = load_tokenizer(tokenizer)
    config = DataConfig.model_validate({"path": [str(data)], "store": str(work), "max_seq_len": 512})
    start = time.perf_counter()
    store = build_store(config.path, stage="pretrain", tokenizer=loaded, data=config)
    assert not store.report.hit
    return time.perf_counter() - start


def encode_batch(data: Path, tokenizer: Path, work: Path) -> float:
    from pertoken.data.tokens.tokenizer import load_tokenizer

    backend = load_tokenizer(tokenizer).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    seconds, texts = 0.0, []
    with data.open("rb") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == BATCH:
                seconds += encoded_s(backend, texts)
                texts = []
    return seconds + encoded_s(backend, texts)


def encoded_s(backend: Any, texts: list[str]) -> float:
    start = time.perf_counter()
    backend.encode_batch(texts, add_special_tokens=False)
    return time.perf_counter() - start


def datasets_map(data: Path, tokenizer: Path, work: Path) -> float:
    import datasets

    from pertoken.data.tokens.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)

    def tokenized(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": loaded(rows["text"], add_special_tokens=False)["input_ids"]}

    datasets.disable_progress_bars()
    start = time.perf_counter()
    table = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(work))
    table.map(tokenized, batched=True, num_proc=processors(), remove_columns=table.column_names)
    return time.perf_counter() - start


def processors() -> int:
    return len(os.sched_getaffinity(0))


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process and of all below it."""
    sums = dict.fromkeys(("rss", "pss", "uss"), 0)
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has ended
            continue
        kb = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        sums["rss"] += kb["Rss"] * 1024
        sums["pss"] += kb["Pss"] * 1024
        sums["uss"] += (kb["Private_Clean"] + kb["Private_Dirty"]) * 1024
    return sums


def contend(name: str, data: Path, tokenizer: Path, work: Path) -> dict[str, float]:
    """One contender in a process of its own: seconds, CPU seconds, and peak bytes."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        command = [sys.executable, __file__, "--contender", name, "--data", data, "--tokenizer", tokenizer]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        if name == "datasets.map":
            environment["TOKENIZERS_PARALLELISM"] = "false"  # its processes are the threads
        process = subprocess.Popen([*command, "--work", folder], stdout=subprocess.PIPE, env=environment, text=True)
        peak = dict.fromkeys(("rss", "pss", "uss"), 0)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                for key, value in memory_of(process.pid).items():
                    peak[key] = max(peak[key], value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        output, _ = process.communicate()
        ended.set()
        watcher.join()
        if process.returncode:
            raise SystemExit(f"{name}: exit code {process.returncode}")
        return {**json.loads(output.splitlines()[-1]), **{f"{key}_mb": value / 1e6 for key, value in peak.items()}}


def alone(name: str, data: Path, tokenizer: Path, work: Path) -> None:
    run = {"ours": ours, "encode_batch": encode_batch, "datasets.map": datasets_map}[name]
    before = cpu_s()
    seconds = run(data, tokenizer, work)
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s() - before}))


def cpu_s() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def spread(values: list[float], digits: int = 2) -> dict[str, float]:
    of = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in of.items()}


def machine() -> dict[str, Any]:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "commit": commit + (" with changes" if changed else ""),
        "device": "cpu",
        "processor": names[0] if names else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": processors(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "datasets", "pyarrow")},
    }


def result_of(runs: dict[str, list[dict[str, float]]], mb: float, settings: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "": name,
            "MB/s": spread([mb / run["seconds"] for run in of]),
            "CPU s per 100 MB": spread([run["cpu_s"] / mb * 100 for run in of]),
            **{f"{key.upper()} MB": round(max(run[f"{key}_mb"] for run in of)) for key in ("rss", "pss", "uss")},
        }
        for name, of in runs.items()
    ]
    claims = []
    if "ours" in runs and "encode_batch" in runs:
        # Of neighbors in time: the machine's speed changes more between rounds than between contenders.
        pairs = zip(runs["ours"], runs["encode_batch"], strict=True)
        share = statistics.median(bare["seconds"] / ours["seconds"] for ours, bare in pairs)
        claims.append(claim("MB/s against bare encode_batch", share, "at least 0.8", share >= 0.8))
    if "ours" in runs:
        peak = max(run["rss_mb"] for run in runs["ours"])
        claims.append(claim("peak memory of all processes (RSS), MB", peak, "at most 1000", peak <= 1000))
    return {
        "name": "prepare",
        "title": "Preparing data",
        "machine": machine(),
        "settings": settings,
        "rows": rows,
        "claims": claims,
        "notes": [],
    }


def claim(text: str, measured: float, bound: str, holds: bool) -> dict[str, Any]:
    verdict = "passed" if holds else "not passed"
    return {"claim": text, "measured": round(measured, 3), "bound": bound, "verdict": verdict}


def to_markdown(result: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        return f"{value['median']:g} ({value['min']:g} to {value['max']:g})" if isinstance(value, dict) else str(value)

    def table(rows: list[dict[str, Any]]) -> str:
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        return "\n".join([*lines, *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows)])

    where = result["machine"]
    parts = [f"## {result['title']}", ", ".join(f"{key} {value}" for key, value in result["settings"].items())]
    parts += [table(rows) for rows in (result["rows"], result["claims"]) if rows]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts.append(f"{where['processor']}, {where['threads']} processors; commit {where['commit']}; {versions}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a .jsonl with a text in every row")
    parser.add_argument("--tokenizer", type=Path, help="a folder")
    parser.add_argument("--mb", type=float, default=60, help="how much data to make")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--md", type=Path, help="write the table there")
    parser.add_argument("--out", type=Path, help="a folder for prepare.json and prepare.md")
    parser.add_argument("--work", type=Path, help="where big files go, for a while; left out: the system's place")
    parser.add_argument("--quick", action="store_true", help="see that it works, in a minute")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        alone(arguments.contender, arguments.data, arguments.tokenizer, arguments.work)
        return
    mb, rounds = (2.0, 1) if arguments.quick else (arguments.mb, arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        data = arguments.data or made_data(Path(folder), mb)
        tokenizer = arguments.tokenizer or some_tokenizer(Path(folder))
        names = arguments.contenders.split(",")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                runs[name].append(contend(name, data, tokenizer, Path(folder)))
                print(f"  {runs[name][-1]}", file=sys.stderr, flush=True)
        size = data.stat().st_size / 1e6
    result = result_of(runs, size, {"MB": round(size, 1), "rounds": rounds, "tokenizer": tokenizer.name})
    encoded, text = json.dumps(result, indent=1, ensure_ascii=False) + "\n", to_markdown(result)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "prepare.json").write_text(encoded, encoding="utf-8")
        (arguments.out / "prepare.md").write_text(text, encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(encoded, encoding="utf-8")
    if arguments.md:
        arguments.md.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
