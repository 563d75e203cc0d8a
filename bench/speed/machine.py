"""The machine: what it is, and how much of it others were using. Standard library only."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT = 0.08
"""The share of the machine that others may use during a turn that counts."""
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "sve")


def busy_seconds() -> float:
    """Processor time that everyone has used since the machine started, what a hypervisor took away included."""
    with open("/proc/stat", encoding="ascii") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cores() -> int:
    """Processors of the machine, which is what /proc/stat speaks of."""
    return os.cpu_count() or 1


@dataclass
class Watch:
    """Measures the share of the machine that others use from its making on."""

    began: float
    busy: float
    own: float

    @classmethod
    def start(cls) -> Watch:
        """From now on."""
        return cls(time.perf_counter(), busy_seconds(), time.process_time())

    def others(self, worker_cpu: float = 0.0) -> float:
        """The share since the start, without this process and without what a worker says it used."""
        elapsed = time.perf_counter() - self.began
        used = busy_seconds() - self.busy - (time.process_time() - self.own) - worker_cpu
        return max(0.0, used / (elapsed * cores()))


def wait_for_quiet(patience: float = 60.0, look: float = 0.25) -> float:
    """Wait until others use less than the limit, `patience` seconds at most; what they used at the last look."""
    end = time.perf_counter() + patience
    while True:
        watch = Watch.start()
        time.sleep(look)
        found = watch.others()
        if found <= LIMIT or time.perf_counter() > end:
            return found


def facts() -> dict[str, str]:
    """Model, cores and vector instructions of the processor, memory, kernel."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in lines.items()}
    flags = known.get("flags", known.get("Features", "")).split()
    memory = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[0].split()[1]
    return {
        "processor": known.get("model name", platform.processor() or platform.machine()),
        "cores": str(cores()),
        "instructions": " ".join(flag for flag in _FLAGS if flag in flags),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
