import importlib
import sys
from pathlib import Path

from tli_engine.cli import let_segments_grow

names = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
if len(sys.argv) < 2 or sys.argv[1] not in [*names, "readme"]:
    sys.exit(f"usage: python -m bench {{{','.join(names)},readme}} [OPTIONS]")
name = sys.argv.pop(1)
# as the engine's own commands have it
let_segments_grow()
module = "bench.readme" if name == "readme" else f"bench.bench_{name}"
importlib.import_module(module).main()
