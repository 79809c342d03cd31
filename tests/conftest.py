"""Eight CPU devices for every test, and quick compilation; both must be set before JAX starts its backend.

With JPEFT_PARITY=required (as in .ci/run) the torch peers must be installed, and a skipped test fails the run.

Tests marked `browser` need Chromium, which pip cannot bring. Where there is none they are not among the tests at all,
and the summary says so; JPEFT_CHROMIUM names the program where it is not found by itself.
"""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

# The tests' programs run once or a few times: most of the time would go into optimising them.
# One of the two ways in which XLA makes fused loops compiles in a third of the time of the other.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# The application keeps compiled programs in the user's cache folder; tests neither read nor fill it.
jax.config.update("jax_enable_compilation_cache", False)

# Every compiled program holds memory mappings, of which Linux grants a process 65,530; XLA crashes without a word when
# it gets no more.
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), 20_000
_tests = 0

REQUIRED = os.environ.get("JPEFT_PARITY") == "required"
CHROMIUM = os.environ.get("JPEFT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_no_browser = 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    global _no_browser  # noqa: PLW0603
    unseen = [] if CHROMIUM else [item for item in items if item.get_closest_marker("browser")]
    if unseen:
        items[:] = [item for item in items if item not in unseen]
        config.hook.pytest_deselected(items=unseen)
        _no_browser = len(unseen)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _no_browser:
        terminalreporter.write_line(f"no Chromium: {_no_browser} tests of pages in a browser were left out")


def pytest_sessionstart() -> None:
    if REQUIRED:
        import peft  # noqa: F401
        import torch  # noqa: F401


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Lets go of compiled programs before they are too many."""
    global _tests  # noqa: PLW0603
    _tests += 1
    if _tests % 10:
        return
    many = _MAPS.read_bytes().count(b"\n") > _MOST_MAPS if _MAPS.exists() else _tests % 100 == 0
    if many:
        jax.clear_caches()
        gc.collect()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: Any) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if REQUIRED and reporter else []
    if skipped:
        reporter.write_line(f"JPEFT_PARITY=required: {len(skipped)} skipped", red=True)
        for report in skipped:
            reporter.write_line(f"  {report.nodeid}: {report.longrepr}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
